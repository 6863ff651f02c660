"""What keeps pages of other sites away from a demo or a server that lets everybody on this machine in."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ov_decidiffusion.limits import LOOPBACK

READING = ("GET", "HEAD", "OPTIONS")


class OwnPagesOnly:
    """Refuses what a page of another site sends.

    Browsers let every page send forms and uploads anywhere without asking first, and say in ``Origin`` whose page it
    was. Programs send none.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] in ("http", "websocket") else None
        if origin is not None and scope.get("method") not in READING and not _is_of_this_machine(origin):
            refusal = PlainTextResponse("Pages of other sites may not ask for anything here.", 403)
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _is_of_this_machine(origin: str) -> bool:
    try:
        return urlsplit(origin).hostname in LOOPBACK
    except ValueError:
        return False


# A page elsewhere whose name was made to point to this machine would send its own name as Host.
THIS_MACHINE_ONLY = (Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK)), Middleware(OwnPagesOnly))
