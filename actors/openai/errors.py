"""Converts errors of the runtime and the gateway into OpenAI's error bodies."""

from typing import Any

from runtime.core import limits
from runtime.core.errors import InvalidRequest, OutriderError, Overloaded, TargetsLost

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
MAX_MESSAGE_CHARACTERS = 400
RETRY_AFTER_S = 1
TARGETS_LOST = "targets_lost"  # error code of a request that clients must not retry automatically


class ApiError(InvalidRequest):
    """An error response.

    status       HTTP status
    code         OpenAI's error code
    param        the parameter at fault, if any
    retry_after  seconds after which the client may retry
    usage        tokens that were generated nevertheless
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry_after: int | None = None,
        usage: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message, param)
        self.status, self.code, self.retry_after, self.usage = status, code, retry_after, usage

    @property
    def headers(self) -> dict[str, str]:
        found = {"retry-after": str(self.retry_after)} if self.retry_after is not None else {}
        if self.code == TARGETS_LOST:
            found["x-should-retry"] = "false"  # OpenAI's clients honour it
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def body(self) -> dict[str, Any]:
        """Returns OpenAI's error body."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        error = {
            "message": sanitize(str(self), MAX_MESSAGE_CHARACTERS),
            "type": kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error} | ({"usage": self.usage} if self.usage is not None else {})


def to_api_error(error: OutriderError) -> ApiError:
    """Returns the response for an error of the runtime."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(400, "invalid_value", str(error), error.param)
        case Overloaded():
            return ApiError(
                503,
                "overloaded",
                "server at capacity: try again later",
                retry_after=RETRY_AFTER_S,
            )
        case TargetsLost():
            return ApiError(500, TARGETS_LOST, str(error))
        case _:  # its text is for the operator: it may contain addresses
            return ApiError(
                503,
                "unavailable",
                "no target can serve the request now: try again later",
                retry_after=RETRY_AFTER_S,
            )


def sanitize(text: str, most: int = limits.ERROR_ECHO_LENGTH) -> str:
    """Returns the first `most` characters of `text`, with unprintable ones replaced."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most])
