"""Who may ask: the Host that a request names, the page that it comes from, and its key."""

import hmac
import re
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from mlxgpt.common.serve.api.errors import ApiError
from mlxgpt.common.serve.web.settings import Settings

# of every answer; the page says a policy of its own
POLICY = b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
HEADERS: list[tuple[bytes, bytes]] = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", POLICY),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
EXPOSED = b"X-Seed, X-Ignored-Fields, X-Request-Id, Retry-After"
OPEN = ("/", "/health")  # without a key: the page asks for it
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?", re.ASCII)
_CLOSE = {"Connection": "close"}
_WILDCARDS = ("", "0.0.0.0", "::")
_PORTS = {"http": 80, "https": 443}


def not_http(why: str) -> ApiError:
    """What no client sends; nothing that follows on the connection is read."""
    return ApiError(400, f"not valid HTTP/1.1: {why}", code="invalid_http", headers=_CLOSE)


def too_long(most: int) -> ApiError:
    """The headers of a request are larger than that."""
    message = f"the request's headers are larger than {most} bytes"
    return ApiError(431, message, code="headers_too_large", headers=_CLOSE)


class Guard:
    """Refuses what a foreign page could send, and what has no key."""

    def __init__(self, settings: Settings) -> None:
        self._max_headers = settings.max_headers
        self._keys = [key.encode() for key in settings.keys]
        self._origins = frozenset(origin.rstrip("/").lower() for origin in settings.origins)
        self._any_origin = "*" in self._origins
        self._hosts = {"localhost", "127.0.0.1", "::1", settings.host.strip("[]").lower()} - {*_WILDCARDS}
        self._wild = settings.host in _WILDCARDS
        if self._wild:
            name = socket.gethostname().lower()
            self._hosts |= {name, name.removesuffix(".local") + ".local"}
        # a name that a page of ours may have is one of ours: a proxy's, a tunnel's
        self._proxies = {_place(*_parts(origin)) for origin in self._origins if "://" in origin}

    def check_place(self, scope: Scope) -> None:
        """Refuses a request by the Host that it names and the page that it comes from.

        Raises:
            ApiError: 400, 403 or 431.
        """
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"])
        if size > self._max_headers:
            raise too_long(self._max_headers)
        if scope["http_version"] not in ("1.0", "1.1"):
            raise not_http("expected HTTP/1.1")
        headers = Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:
            raise not_http("Content-Length and Transfer-Encoding in one request")
        self._check_host(scope, headers.get("host"))
        for name in ("origin", "authorization", "content-type"):
            if len(headers.getlist(name)) > 1:
                raise not_http(f"the header {name} more than once")
        self._check_origin(scope, headers)

    def _check_host(self, scope: Scope, host: str | None) -> None:
        if host is None and scope["http_version"] == "1.0":
            return  # no browser, whose pages alone are to be kept out, speaks it
        address, port = scope["server"]
        match = _HOST.fullmatch((host or "").lower())
        if match:
            name, given = match[1].strip("[]").rstrip("."), int(match[2] or 80)
            # a socket of both IPs writes the older one as ::ffff:10.0.0.1
            if given == port and (name in self._hosts or (self._wild and name == address.removeprefix("::ffff:"))):
                return
            if _place(name, int(match[2]) if match[2] else None) in self._proxies:
                return
        expected = "localhost" if self._wild else next(iter(sorted(self._hosts - {"127.0.0.1", "::1"})))
        raise ApiError(
            403,
            f"the header Host names a place that is not served here: expected {expected}:{port}; for the name of a "
            "proxy or a tunnel, start the server with --allow-origin https://NAME",
            code="host_not_allowed",
        )

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None:
            site = headers.get("sec-fetch-site", "none")
            link = headers.get("sec-fetch-mode") == "navigate" and scope["path"] == "/" and scope["method"] == "GET"
            if site in ("same-origin", "none") or link or self._any_origin:
                return
            found = f"a page of another origin ({'same-site' if site == 'same-site' else 'cross-site'})"
        else:
            own = f"{scope['scheme']}://{headers.get('host', '')}".lower()
            if origin.lower() == own or self.allows(origin):
                return
            found = "a page of another origin"
        raise ApiError(
            403,
            f"{found} may not use this server; to allow it, start the server with --allow-origin ORIGIN",
            code="origin_not_allowed",
        )

    def allows(self, origin: str) -> bool:
        """Whether --allow-origin has it."""
        return self._any_origin or origin.lower() in self._origins

    def cors(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """Headers that let an allowed page read the answer; none without --allow-origin."""
        if not self._origins:
            return []
        origin = Headers(scope=scope).get("origin")
        vary = (b"vary", b"Origin")
        if origin is None or not self.allows(origin):
            return [vary]
        allowed = b"*" if self._any_origin else origin.encode("latin-1")
        return [(b"access-control-allow-origin", allowed), (b"access-control-expose-headers", EXPOSED), vary]

    def preflight(self, scope: Scope) -> list[tuple[bytes, bytes]] | None:
        """Headers of the answer to a browser that asks, before a page's request, whether it may; None: it asks not."""
        headers = Headers(scope=scope)
        asks = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if not asks or not self.allows(headers.get("origin", "")):
            return None
        made = [
            (b"access-control-allow-methods", b"GET, POST"),
            # none of them makes a request dangerous that the page may send at all
            (b"access-control-allow-headers", headers.get("access-control-request-headers", "").encode("latin-1")),
            (b"access-control-max-age", b"600"),
        ]
        if headers.get("access-control-request-private-network") == "true":
            made.append((b"access-control-allow-private-network", b"true"))
        return made

    def check_key(self, scope: Scope) -> None:
        """Refuses a request without one of the keys.

        Raises:
            ApiError: 401.
        """
        if not self._keys or (scope["path"] in OPEN and scope["method"] in ("GET", "HEAD")):
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() == b"bearer" and _matches(token.strip(), self._keys):
            return
        found = "no API key" if not given else "a wrong API key"
        raise ApiError(
            401,
            f"{found}: expected the header Authorization: Bearer KEY, with a key of --api-key-file",
            code="invalid_api_key",
            headers={"WWW-Authenticate": 'Bearer realm="mlxgpt"'},
        )


def _matches(token: bytes, keys: Sequence[bytes]) -> bool:
    """Compares with every key, in a time that tells nothing about them."""
    return sum(hmac.compare_digest(token, key) for key in keys) > 0


def _parts(origin: str) -> tuple[str, int | None]:
    parts = urlsplit(origin)
    port = parts.port
    return (parts.hostname or "").rstrip("."), None if port == _PORTS.get(parts.scheme) else port


def _place(name: str, port: int | None) -> tuple[str, int | None]:
    return name, None if port in _PORTS.values() else port
