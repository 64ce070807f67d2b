"""Runs a module in this process without a network, as far as the system lets a user do that; nothing is loaded before.

``python -m mlxgpt.common.user_code.guard torch_ref.sample REQUEST.json``. It keeps honest code from the network;
it is no cage for code that means harm.
"""

import ctypes
import os
import runpy
import sys
from typing import Any

_NEWNET, _NEWUSER = 0x40000000, 0x10000000
_CLOSED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


def close_network() -> None:
    """A network namespace of its own where Linux gives one, and sockets that refuse other machines."""
    if sys.platform == "linux":
        _unshare()
    sys.addaudithook(_refuse)


def _unshare() -> None:
    """Leaves the network; before any thread starts, as user namespaces demand."""
    try:
        libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
        if libc.unshare(_NEWNET) == 0 or libc.unshare(_NEWNET | _NEWUSER) != 0:
            return
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    except (OSError, AttributeError):
        pass  # a kernel that forbids it: the sockets still refuse


def _refuse(event: str, given: tuple[Any, ...]) -> None:
    if event in _CLOSED and not (len(given) > 1 and isinstance(given[1], str | bytes)):  # a path is a local socket
        raise OSError("no network here: mlxgpt runs this file without one; put what it needs beside it")


if __name__ == "__main__":
    name, sys.argv = sys.argv[1], sys.argv[1:]
    close_network()
    runpy.run_module(name, run_name="__main__", alter_sys=True)
