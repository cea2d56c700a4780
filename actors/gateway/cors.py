"""Decides which web pages may read responses: cross-origin resource sharing (CORS).

API keys are sent in a header and never as cookies, so no page gets credentials of a browser.
"""

from collections.abc import Collection, Mapping

from starlette.datastructures import Headers

ANY_ORIGIN = "*"
PREFLIGHT_SECONDS = 600  # that a browser remembers the answer to a preflight
ALLOWED_METHODS = "GET, POST"
ALLOWED_HEADERS = "*, Authorization"  # the star does not include this one
EXPOSED_HEADERS = "Retry-After, X-Request-Id, X-Should-Retry"


def is_preflight(method: str, headers: Mapping[str, str]) -> bool:
    """Tells whether a browser asks what a page may send. Such a request has no API key."""
    return (
        method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers
    )


def cors_headers(
    origins: Collection[str], method: str, headers: Headers
) -> list[tuple[bytes, bytes]]:
    """Returns what a response says about pages of `origins`, the allowed ones.

    Without any origin, CORS is off: nothing is said.
    """
    if not origins:
        return []
    origin = headers.get("origin", "")
    found = {} if ANY_ORIGIN in origins else {"vary": "Origin"}
    if not origin or not (ANY_ORIGIN in origins or origin in origins):
        return encoded(found)
    found["access-control-allow-origin"] = ANY_ORIGIN if ANY_ORIGIN in origins else origin
    if is_preflight(method, headers):
        found["access-control-allow-methods"] = ALLOWED_METHODS
        found["access-control-allow-headers"] = ALLOWED_HEADERS
        found["access-control-max-age"] = str(PREFLIGHT_SECONDS)
    else:
        found["access-control-expose-headers"] = EXPOSED_HEADERS
    return encoded(found)


def encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
