"""Decides through which proxy a gateway is reached."""

from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from actors.rpc.endpoints import is_loopback


def proxy_of(url: str) -> str | None:
    """Returns the proxy that the environment names for the URL; None for a direct connection.

    The variables are http_proxy, https_proxy, all_proxy and no_proxy. Loopback goes past proxies:
    theirs is another one.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # whoever opens it says so
        return None
    if is_loopback(parts.hostname or "") or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    known = getproxies()
    found = known.get(parts.scheme) or known.get("all")
    return found if not found or "://" in found else f"http://{found}"


def proxy_note(url: str) -> str:
    """Returns words that name the proxy between here and the URL, "" without one.

    They hold no password.
    """
    proxy = proxy_of(url)
    if proxy is None:
        return ""
    scheme, _, rest = proxy.partition("://")
    return f" through the proxy {scheme}://{rest.rpartition('@')[2]}"
