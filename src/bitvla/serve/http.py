"""What a server says of itself over HTTP: /healthz, /readyz, /metrics. And who may speak to it."""

from __future__ import annotations

import hmac
import logging
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from bitvla.serve.core import Engine

# The websocket library reports each stranger's nonsense with a traceback; what matters is logged by us.
TRANSPORT_LOG = logging.getLogger("bitvla.serve.transport")
TRANSPORT_LOG.setLevel(logging.CRITICAL)


class Pages:
    """Answers HTTP requests about an engine, for `process_request` of a websocket server."""

    def __init__(self, engine: Engine, token: str | None) -> None:
        self._engine, self._token = engine, token

    def __call__(self, request: Request) -> Response | None:
        """The answer to a request for a page; None for any other path."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return text(HTTPStatus.OK, "OK\n")
        if path == "/readyz":
            ready = self._engine.ready
            return text(
                HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, "ready\n" if ready else "not ready\n"
            )
        if path != "/metrics":
            return None
        if not self.allowed(request):
            return text(HTTPStatus.UNAUTHORIZED, "wrong or missing token\n")
        body = generate_latest(self._engine.metrics.registry)
        return _response(HTTPStatus.OK, CONTENT_TYPE_LATEST, body)

    def allowed(self, request: Request) -> bool:
        """Does the request carry the token? `Authorization: Api-Key TOKEN`, as openpi sends it, or `Bearer TOKEN`."""
        sent = request.headers.get_all("Authorization")
        return self._token is None or (len(sent) == 1 and same(sent[0].partition(" ")[2], self._token))


def same(sent: object, token: str) -> bool:
    """Compare a token in a time that does not depend on where it differs."""
    return isinstance(sent, str) and hmac.compare_digest(sent.encode(errors="replace"), token.encode())


async def serve_pages(pages: Pages, host: str, port: int) -> Server:
    """An HTTP server of its own, beside a dialect that does not speak HTTP."""

    def answer(_: ServerConnection, request: Request) -> Response:
        return pages(request) or text(HTTPStatus.NOT_FOUND, "there are /healthz, /readyz and /metrics\n")

    async def never(_: ServerConnection) -> None:
        """Every request is answered above."""

    return await serve(never, host, port, process_request=answer, logger=TRANSPORT_LOG, server_header=None)


def port_of(server: Server) -> int:
    """The port on which a server listens, which the system chose where 0 was asked for."""
    return int(next(iter(server.sockets)).getsockname()[1])


def text(status: HTTPStatus, body: str) -> Response:
    return _response(status, "text/plain; charset=utf-8", body.encode())


def _response(status: HTTPStatus, kind: str, body: bytes) -> Response:
    headers = Headers({"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"})
    return Response(status.value, status.phrase, headers, body)
