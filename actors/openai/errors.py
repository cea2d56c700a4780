"""What goes wrong, as OpenAI's error body; the errors of the runtime and of the gateway itself."""

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
MAX_MESSAGE_CHARACTERS = 400  # characters of a message: what it says beyond is nobody's to read
RETRY_AFTER_S = 1  # seconds
TARGETS_LOST = "targets_lost"  # code of a request that nobody should send again by itself


class ApiError(InvalidRequest):
    """An answer that is an error: its HTTP status, OpenAI's code for it, and what goes with it.

    retry_after  seconds after which the same request may have luck
    usage        of what was generated all the same
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
            found["x-should-retry"] = "false"  # OpenAI's clients obey it
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        error = {
            "message": sanitize(str(self), MAX_MESSAGE_CHARACTERS),
            "type": kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error} | ({"usage": self.usage} if self.usage is not None else {})


def to_api_error(error: OutriderError) -> ApiError:
    """The answer to an error of the runtime."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(400, "invalid_value", str(error), error.param)
        case Overloaded():
            return ApiError(
                503,
                "overloaded",
                "all places are taken: try again later",
                retry_after=RETRY_AFTER_S,
            )
        case TargetsLost():
            return ApiError(500, TARGETS_LOST, str(error))
        case _:  # what it says is the operator's to read, with addresses in it
            return ApiError(
                503,
                "unavailable",
                "no target can serve the request now: try again later",
                retry_after=RETRY_AFTER_S,
            )


def sanitize(text: str, most: int = limits.ERROR_ECHO_LENGTH) -> str:
    """What an error may repeat of `text`."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most])
