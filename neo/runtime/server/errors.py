"""Errors as HTTP answers, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

RETRY_LATER, UNAVAILABLE, TOO_LARGE, TIMED_OUT = 503, 503, 413, 504


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        kind: ``type`` in the body.
        param: the offending field of the request, where there is one.
        retry_after_s: for the header ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code if self.code is not None else self.status,
            }
        }

    def headers(self) -> dict[str, str]:
        """Headers beside it."""
        found = {}
        if self.retry_after_s is not None:
            found["retry-after"] = str(self.retry_after_s)
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found


def bad(param: str | None, message: str, code: str | None = None) -> ApiError:
    """400, naming the field."""
    return ApiError(400, message, param=param, code=code)


def server_error(message: str, status: int = 500) -> ApiError:
    """A failure that is not the client's."""
    return ApiError(status, message, "server_error")
