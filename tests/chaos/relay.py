"""A proxy before the binary cache that a test breaks; runs in a pod, with nothing but the standard library.

The file MODE says how it treats each answer: pass, slow (RATE bytes a second), garbage (the right length, other bytes),
page (a page of HTML, as a portal sends it), cut (half of it), silent (no answer for 20 seconds).
"""

import http.server
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

MODE = Path("/mode")
RATE = 20_000
BLOCK = 2_000


class Relay(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        mode = MODE.read_text().strip()
        if mode == "silent":
            time.sleep(20)
            self.close_connection = True
            return
        try:
            with urllib.request.urlopen(f"{sys.argv[1]}{self.path}", timeout=30) as answer:
                status, kind, body = answer.status, answer.headers.get("Content-Type", ""), answer.read()
        except urllib.error.HTTPError as error:
            status, kind, body = error.code, "text/plain", error.read()
        except OSError:
            status, kind, body = 502, "text/plain", b""
        if mode == "page":
            status, kind, body = 200, "text/html", b"<!doctype html><title>Log in</title>"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if mode == "garbage" and status == 200:
            body = os.urandom(len(body))
        if mode == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        if mode != "slow":
            self.wfile.write(body)
            return
        for begin in range(0, len(body), BLOCK):
            self.wfile.write(body[begin : begin + BLOCK])
            time.sleep(BLOCK / RATE)

    def do_HEAD(self) -> None:
        self.do_GET()


http.server.ThreadingHTTPServer(("", 8080), Relay).serve_forever()
