"""The server's process, which ends in an orderly way however many signals it gets."""

import signal
from types import FrameType

import uvicorn
from fastapi import FastAPI

SECONDS_TO_END = 60  # time to finish the current pictures


def run_server(app: FastAPI, host: str, port: int) -> None:
    """Serve until a signal comes; then finish what was begun, and raise the signal again.

    SIGHUP, from a closed terminal, counts too; a second signal cuts nothing off.
    """
    options = {"host": host, "port": port, "log_level": "warning", "timeout_graceful_shutdown": SECONDS_TO_END}
    server = _Server(uvicorn.Config(app, **options))
    hangup = getattr(signal, "SIGHUP", None)  # not available on Windows
    before = None if hangup is None else signal.getsignal(hangup)
    if hangup is not None and before is not signal.SIG_IGN:  # as under nohup
        signal.signal(hangup, server.handle_exit)
    try:
        server.run()
    finally:
        if hangup is not None:
            signal.signal(hangup, before)
    if server.ended_by is not None:
        signal.raise_signal(server.ended_by)


class _Server(uvicorn.Server):
    ended_by: int | None = None  # the first signal that came

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Replaces uvicorn's handler, which cuts off current answers at a second SIGINT."""
        self.should_exit = True
        self.ended_by = self.ended_by or sig
