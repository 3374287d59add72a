"""openpi's dialect: msgpack over a websocket. The server says what it serves; then it is one request, one reply.

A request is an observation with any of the keys below, flat or nested; so the observation of `bitvla.load(...).act` is
one as it is. The reply holds "actions", float32 (horizon, action_dim), and "server_timing" in milliseconds. What went
wrong is a text frame, as openpi's clients expect. Two additions of ours: {"bitvla": "reset"} begins a new episode, and
"prefix" beside an observation holds actions that are decided already.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from bitvla import __version__
from bitvla.config import PolicyConfig
from bitvla.errors import BitvlaError
from bitvla.serve.arrays import pack, unpack
from bitvla.serve.client import RESET
from bitvla.serve.core import Engine, Session, UnavailableError, interface
from bitvla.serve.http import TRANSPORT_LOG, Pages, port_of, text
from bitvla.serve.mapping import KeyMap, Naming
from bitvla.serve.options import Options

NAMING = Naming(
    camera=("images/{}", "observation/images/{}", "observation/{}"),
    state=("state", "observation/state"),
    state_value="observation/{}",
    instruction=("instruction", "prompt"),
)
_LONGEST_REASON = 1000  # characters


class OpenPi:
    """Speaks to each connection in a session of its own."""

    def __init__(self, engine: Engine, config: PolicyConfig, options: Options) -> None:
        self._engine, self._options = engine, options
        self._keys = KeyMap(config, NAMING, options.map, options.preset)
        self._pages = Pages(engine, options.token)
        self._server: Server | None = None

    async def listen(self) -> int:
        """Accept connections; the port."""
        options = self._options
        self._server = await serve(
            self._talk,
            options.host,
            options.listen_port,
            process_request=self._admit,
            logger=TRANSPORT_LOG,
            origins=[None],  # a page in a browser must not drive a robot through its visitor's loopback
            compression=None,
            max_size=options.max_bytes,
            max_queue=1,
            ping_interval=options.keepalive,
            ping_timeout=options.keepalive,
            close_timeout=1,
            server_header=None,
        )
        return port_of(self._server)

    async def close(self) -> None:
        """End every connection."""
        if self._server:
            self._server.close()
            await self._server.wait_closed()

    def _admit(self, _: ServerConnection, request: Request) -> Response | None:
        page = self._pages(request)
        if page:
            return page
        if request.path.partition("?")[0] != "/":
            return text(HTTPStatus.NOT_FOUND, "the policy is at /; beside it are /healthz, /readyz and /metrics\n")
        if not self._pages.allowed(request):
            return text(HTTPStatus.UNAUTHORIZED, "wrong or missing token; send it as 'Authorization: Api-Key TOKEN'\n")
        if self._engine.full:
            return text(HTTPStatus.SERVICE_UNAVAILABLE, "all sessions are taken; see --max-sessions\n")
        return None

    async def _talk(self, connection: ServerConnection) -> None:
        await self._engine.wait_ready()
        try:
            session = self._engine.open(_address(connection))
        except UnavailableError as error:
            await connection.close(CloseCode.TRY_AGAIN_LATER, str(error))
            return
        try:
            await connection.send(pack(self._metadata()))
            timing: dict[str, float] = {}
            async for message in connection:
                timing = await self._answer(connection, session, message, timing)
        except (ConnectionClosed, ConnectionError):
            pass  # robots come and go
        finally:
            session.close()

    async def _answer(
        self, connection: ServerConnection, session: Session, message: str | bytes, last: dict[str, float]
    ) -> dict[str, float]:
        """Reply to one message. What the robot did wrong is told; the connection goes on."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            with self._engine.request(session):
                reply = await self._reply(session, message)
                timing = reply.get("server_timing", {})
                if "prev_total_ms" in last:
                    timing["prev_total_ms"] = last["prev_total_ms"]
                await _send(connection, pack(reply))
        except UnavailableError as error:
            await connection.close(CloseCode.SERVICE_RESTART, str(error))
        except BitvlaError as error:
            await connection.send(str(error)[:_LONGEST_REASON])
        except ConnectionError:
            raise
        except Exception:  # logged by `request`; its text is for the log, not for strangers
            await connection.send("the server failed to answer; its log has the reason")
        return {"prev_total_ms": 1e3 * (loop.time() - started)}

    async def _reply(self, session: Session, message: str | bytes) -> dict[str, Any]:
        if isinstance(message, str):
            raise BitvlaError("a request is a binary frame with msgpack, and this is text")
        request = unpack(message)
        if request == RESET:
            session.reset()
            return RESET
        prefix = request.pop("prefix", None) if isinstance(request, dict) else None
        answer = await session.act(self._keys.observation(request), prefix)
        return {
            "actions": answer.chunk,
            "server_timing": {"infer_ms": answer.inference_ms, "wait_ms": answer.wait_ms},
        }

    def _metadata(self) -> dict[str, Any]:
        policy = self._engine.policy
        info = policy.info()
        return {
            "server": f"bitvla {__version__}",
            "name": policy.config.name,
            "sha256": info.get("sha256"),
            "action_range": info.get("action_range"),
            **interface(policy.config),
        }


async def _send(connection: ServerConnection, reply: bytes) -> None:
    try:
        await connection.send(reply)
    except ConnectionClosed:
        raise ConnectionResetError("the robot has gone") from None


def _address(connection: ServerConnection) -> str:
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)
