"""A request's body, within its limits, and its client, who may leave."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from mlxgpt.common.serve.api.errors import ApiError, Gone
from mlxgpt.common.serve.web.json_body import parse
from mlxgpt.common.serve.web.settings import Settings

_THREAD_SIZE = 64 * 1024  # bytes above which parsing leaves the event loop's thread: about a millisecond's work

T = TypeVar("T")


async def read_json(request: Request, settings: Settings) -> dict[str, Any]:
    """The object that a POST's body is.

    Raises:
        ApiError: 400, 408 too slow, 413 too large, 415 of another type.
        Gone: the client left before the end.
    """
    check_type(request)
    body = await _read(request, settings)
    if len(body) <= _THREAD_SIZE:
        return parse(body)
    return await asyncio.to_thread(parse, body)


def check_type(request: Request) -> None:
    """Only JSON, which a foreign page's form cannot send.

    Raises:
        ApiError: 415.
    """
    given = request.headers.get("content-type", "")
    kind, *parameters = (part.strip().lower() for part in given.split(";"))
    if kind != "application/json":
        found = f"found {given[:60]!r}" if given else "found none"
        raise ApiError(
            415, f"expected the header Content-Type: application/json, {found}", code="unsupported_media_type"
        )
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in ("utf-8", "utf8", "us-ascii"):
            raise ApiError(415, f"expected charset=utf-8, found {value[:40]!r}", code="unsupported_media_type")
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() not in ("identity", ""):
        raise ApiError(
            415, f"expected a body without Content-Encoding, found {coding[:40]!r}", code="unsupported_media_type"
        )


async def _read(request: Request, settings: Settings) -> bytes:
    limit, close = settings.max_body, {"Connection": "close"}
    length = request.headers.get("content-length", "0")
    large = ApiError(
        413, f"the body is larger than {limit} bytes, which --max-body says", code="request_too_large", headers=close
    )
    if int(length) > limit:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise large
    except TimeoutError:
        slow = f"the body took more than {settings.body_seconds:g} s"
        raise ApiError(408, slow, code="request_timeout", headers=close) from None
    except ClientDisconnect:
        raise Gone from None
    return bytes(body)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives; it is cancelled when the client leaves.

    Raises:
        Gone: the client left before its end.
    """
    doing, watch = asyncio.ensure_future(work), asyncio.ensure_future(leaves(receive))
    try:
        await asyncio.wait((doing, watch), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise Gone
    finally:
        for task in (doing, watch):
            task.cancel()
        await asyncio.gather(doing, watch, return_exceptions=True)


async def leaves(receive: Receive) -> None:
    """Waits until the client leaves; the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
