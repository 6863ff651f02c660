"""What keeps pages of other sites away from a demo or a server that lets everybody on this machine in."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ov_decidiffusion.web.limits import LOOPBACK

READING = ("GET", "HEAD", "OPTIONS")


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

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] in ("http", "websocket") else {}
        origin = headers.get("origin")
        if origin is not None and scope.get("method") not in READING and not _is_own(origin, headers.get("host", "")):
            refusal = PlainTextResponse("Pages of other sites may not ask for anything here.", 403)
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _is_own(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).hostname in (*LOOPBACK, urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


# A page elsewhere whose name was made to point to this machine would send its own name as Host.
HOSTS = [*LOOPBACK, "[::1]"]  # as addresses have it
THIS_MACHINE_ONLY = (Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS), Middleware(OwnPagesOnly))
