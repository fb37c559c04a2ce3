"""An HTTP server on a free port of this machine, which answers from a thread as its handler says."""

from __future__ import annotations

import http.server
import threading

POLL_SEC = 0.02  # how often it looks whether it is to stop


class LocalServer:
    """Answers from the moment it is made until it is closed."""

    def __init__(self, handler: type[http.server.BaseHTTPRequestHandler]) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, args=[POLL_SEC], daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Nobody listens at the address from now on."""
        self._server.shutdown()
        self._server.server_close()
