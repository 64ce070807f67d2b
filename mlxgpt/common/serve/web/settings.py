"""What the web half is told when it starts."""

import re
from dataclasses import dataclass

from mlxgpt.common.errors import UserError

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/@?#\s]+/?", re.IGNORECASE)
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """Who may ask, from where, and how much; sizes in bytes, times in seconds."""

    host: str = "127.0.0.1"  # that the socket is bound to; 0.0.0.0 and :: mean every address of this machine
    port: int = 8000
    keys: tuple[str, ...] = ()  # any of them opens; none: no key is asked for
    origins: tuple[str, ...] = ()  # of --allow-origin: https://chat.example.com; * is every page
    max_body: int = 4 * MIB  # of a request
    max_headers: int = 32 * 1024  # of a request: its first line and headers
    max_connections: int = 200  # open at once; a Mac allows 256 open files
    header_seconds: float = 10.0  # from a connection, or a request's first byte, to the end of its headers
    body_seconds: float = 30.0  # from there to the end of the body
    stalled_seconds: float = 60.0  # that a client may leave an answer unread
    idle_seconds: int = 30  # that a connection is kept for a next request
    max_prompts: int = 64  # of a request: no more than fit into the queue, or it could never be answered
    keep_alive_seconds: float = 10.0  # between comments in a stream that has nothing to say
    retry_seconds: int = 5  # Retry-After where nothing better is known
    backend: str = ""  # mlx or torch, for /metrics

    def __post_init__(self) -> None:
        for origin in self.origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise UserError(f"--allow-origin {origin}: expected scheme and host, such as https://chat.example.com")
