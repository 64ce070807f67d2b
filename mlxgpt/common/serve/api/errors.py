"""What is wrong with a request, in OpenAI's shape: {"error": {message, type, param, code}}."""

import json
from collections.abc import Mapping
from types import MappingProxyType

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error; web/ sends it, and a stream that has begun says it as an event.

    Args:
        status: of HTTP.
        message: one line: what, found, expected.
        param: the field of the request, such as ``messages[0].content``.
        code: a word for programs, such as ``model_not_found``.
        headers: such as Retry-After.
        logged: the line without what the request said, for the log; default: the message.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
        logged: str = "",
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers)
        self.logged = logged or message

    @property
    def type(self) -> str:
        """OpenAI's word for the kind of error."""
        return TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def content(self) -> dict[str, object]:
        """The object that is sent."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def body(self) -> bytes:
        """The same as JSON."""
        return json.dumps(self.content, ensure_ascii=False).encode()


class Gone(Exception):
    """The client has left; there is nobody to answer."""
