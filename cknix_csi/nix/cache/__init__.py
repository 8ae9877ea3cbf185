"""The binary cache: what nodes fetch closures from, over HTTP and signed with the cluster's key.

The protocol is the one of every Nix binary cache (``/nix-cache-info``, ``/<hash>.narinfo``, the NAR at the narinfo's
``URL``), so a stock ``nix`` is the client.  A directory of files would do for the protocol; serving straight from the
store and its database keeps one copy of everything on disk and makes a path available the moment it is valid.
"""
