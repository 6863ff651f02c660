"""What keeps pages of other sites away from a demo or a server that lets everybody on this machine in."""

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
HOSTS = (*LOOPBACK, "[::1]")  # as addresses have it
HOST_NAME = re.compile(r"(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*")


def check_allowed_hosts(names: Sequence[str]) -> list[str]:
    """The names under which a demo or a server answers behind a proxy, in lower case.

    Raises:
        ValueError: one is no name of a host.
    """
    for name in names:
        if not HOST_NAME.fullmatch(name.lower()):
            raise ValueError(f"--allowed-host must be a name such as pictures.example.org, got {name!r}.")
    return [name.lower() for name in names]


def check_api_key(key: str | None) -> None:
    """An empty key, as of a variable that was meant to hold one, would let everybody in.

    Raises:
        ValueError: says what to do.
    """
    if key is not None and not key.strip():
        raise ValueError("`api_key` must not be empty: set it, or leave it out (OV_DECIDIFFUSION_API_KEY too).")
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ValueError(
            "`api_key` must be of printable ASCII characters, without spaces around it: HTTP headers carry no others."
        )


class OwnPagesOnly:
    """Refuses what a page of another site sends: one that is neither of this machine nor of the name that was asked.

    Browsers let every page send forms and uploads anywhere without asking first, and say in ``Origin`` whose page it
    was. Programs send none.
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
    """Answer under this machine's own names and those given, and no page of another site.

    A page elsewhere whose name was made to point to this machine would send its own name as Host.
    """
    names = [*HOSTS, *allowed_hosts]
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False),
        Middleware(OwnPagesOnly, allowed_hosts=allowed_hosts),
    ]
