"""Guards that keep other sites' pages away from a demo or a server that lets everybody on this machine in."""

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ov_decidiffusion.web.limits import LOOPBACK

READING = ("GET", "HEAD", "OPTIONS")
HOSTS = (*LOOPBACK, "[::1]")  # as written in URLs
HOST_NAME = re.compile(r"(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*")


def check_allowed_hosts(names: Sequence[str]) -> list[str]:
    """The host names under which a demo or a server answers behind a proxy, in lower case.

    Raises:
        ValueError: one is not a valid host name.
    """
    for name in names:
        if not HOST_NAME.fullmatch(name.lower()):
            raise ValueError(f"--allowed-host must be a name such as pictures.example.org, got {name!r}.")
    return [name.lower() for name in names]


def check_api_key(key: str | None) -> None:
    """Refuse an empty key, perhaps from an unset variable, which would let everybody in; and unusable characters.

    Raises:
        ValueError: the message says what to do.
    """
    if key is not None and not key.strip():
        raise ValueError("`api_key` must not be empty: set it, or leave it out (OV_DECIDIFFUSION_API_KEY too).")
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ValueError(
            "`api_key` must be of printable ASCII characters, without spaces around it: HTTP headers carry no others."
        )


class OwnPagesOnly:
    """Refuses what other sites' pages send: pages neither of this machine, nor of the host that was requested.

    Browsers let every page send forms and uploads to any host without asking first, but name the page's site in
    ``Origin``. Programs send no ``Origin``.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str] = ()):
        self.app, self.allowed_hosts = app, tuple(allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] in ("http", "websocket") else Headers()
        origin = headers.get("origin")
        if origin is not None and scope.get("method") not in READING and not self._is_own(origin, headers):
            refusal = PlainTextResponse("Pages of other sites may not ask for anything here.", 403)
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_own(self, origin: str, headers: Headers) -> bool:
        try:
            asked = urlsplit(f"//{headers.get('host', '')}").hostname or ""
            return urlsplit(origin).hostname in (*LOOPBACK, asked, *self.allowed_hosts)
        except ValueError:
            return False


def known_names_only(allowed_hosts: Sequence[str] = ()) -> list[Middleware]:
    """Answer only under this machine's own names and the given ones, and not to pages of other sites.

    A site whose host name was made to point to this machine (DNS rebinding) would send that name as ``Host``.
    """
    names = [*HOSTS, *allowed_hosts]
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False),
        Middleware(OwnPagesOnly, allowed_hosts=allowed_hosts),
    ]
