"""What every rung needs."""

from __future__ import annotations

import signal

# A shell starts what it runs in the background with these ignored, and whatever a test starts would inherit that.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number is signal.SIGINT else signal.SIG_DFL)
