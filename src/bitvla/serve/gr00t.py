"""GR00T's dialect: msgpack over ZeroMQ, as the `PolicyClient` of Isaac-GR00T (N1.6 and later) speaks it.

A request is {"endpoint", "data", "api_token"}; endpoints are ping, get_action, reset, get_modality_config and, where
allowed, kill. An observation holds "video", "state" and "language" by name, each with a batch and a time of 1. The
action comes back as {"action": float32 (1, horizon, action_dim)}; get_modality_config tells all these names.
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import zmq
import zmq.asyncio
from numpy.typing import NDArray

from bitvla.config import PolicyConfig
from bitvla.errors import BitvlaError
from bitvla.serve.arrays import array, parse_dtype, unpack_with
from bitvla.serve.core import Engine, Peers
from bitvla.serve.http import same
from bitvla.serve.mapping import KeyMap, Naming
from bitvla.serve.options import Options

NAMING = Naming(
    camera=("video/{}", "video.{}"),
    state=("state/state", "state.state"),
    state_value="state/{}",
    instruction=(
        "language/task",
        "language/annotation.human.task_description",
        "language/annotation.human.action.task_description",
        "annotation.human.task_description",
        "annotation.human.action.task_description",
    ),
)
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<>|\w]{1,8})', 'fortran_order': (True|False), 'shape': "
    rb"\(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), \} *\n",
    re.DOTALL | re.ASCII,
)
_LONGEST_REASON = 1000  # characters
_WAITING = 4  # messages of one robot that wait in ZeroMQ
_LINGER = 500  # milliseconds for the last replies


class Gr00t:
    """Answers each request in the session of the connection that it came by."""

    def __init__(self, engine: Engine, config: PolicyConfig, options: Options, stop: Callable[[], None]) -> None:
        self._engine, self._config, self._options, self._stop = engine, config, options, stop
        self._keys = KeyMap(config, NAMING, options.map, options.preset)
        self._peers = Peers(engine)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._at_once = asyncio.Semaphore(2 * options.max_sessions)
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self) -> int:
        """Accept connections; the port."""
        options, socket = self._options, self._socket
        heartbeat = int(1e3 * options.keepalive)
        for option, value in {
            zmq.IPV6: int(":" in options.host),
            zmq.MAXMSGSIZE: options.max_bytes,
            zmq.RCVHWM: _WAITING,
            zmq.SNDHWM: _WAITING,
            zmq.HEARTBEAT_IVL: heartbeat,
            zmq.HEARTBEAT_TIMEOUT: heartbeat,
            zmq.LINGER: _LINGER,
        }.items():
            socket.setsockopt(option, value)
        try:
            socket.bind(f"tcp://{options.address}")
        except zmq.ZMQError as error:
            raise OSError(str(error)) from None
        self._run(self._receive())
        return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    async def close(self) -> None:
        """End every connection, after the last replies."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        await asyncio.to_thread(self._context.term)  # waits for the last replies, `_LINGER` at most

    def _run(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _receive(self) -> None:
        while True:
            await self._at_once.acquire()
            frames = await self._socket.recv_multipart()
            self._run(self._answer(frames))

    async def _answer(self, frames: list[bytes]) -> None:
        try:
            if len(frames) == 3 and not frames[1]:  # from a REQ socket: who, nothing, what
                await self._socket.send_multipart([frames[0], b"", _pack(await self._reply(frames[0], frames[2]))])
        finally:
            self._at_once.release()

    async def _reply(self, peer: bytes, message: bytes) -> Any:
        """What to tell the robot; never raises."""
        try:
            request = unpack_with(message, _decode)
            if not isinstance(request, dict):
                raise BitvlaError("a request is a dictionary with 'endpoint' and 'data'")
            token = self._options.token
            if token is not None and not same(request.get("api_token"), token):
                raise BitvlaError("Unauthorized: wrong or missing 'api_token'")
            await self._engine.wait_ready()
            return await self._call(peer, request.get("endpoint", "get_action"), request.get("data"))
        except BitvlaError as error:
            return {"error": str(error)[:_LONGEST_REASON]}
        except Exception:  # logged by `request`; its text is for the log, not for strangers
            return {"error": "the server failed to answer; its log has the reason"}

    async def _call(self, peer: bytes, endpoint: object, data: Any) -> Any:
        allowed = {"ping", "get_action", "reset", "get_modality_config", *(["kill"] * self._options.allow_kill)}
        if not isinstance(endpoint, str) or endpoint not in allowed:
            raise BitvlaError(f"unknown endpoint {endpoint!r}"[:200] + "; there are ping, get_action, reset, "
                              "get_modality_config, and with --allow-kill kill")  # fmt: skip
        if endpoint == "ping":
            return {"status": "ok", "message": "Server is running"}
        if endpoint == "get_modality_config":
            return self._modalities()
        if endpoint == "kill":
            self._stop()
            return {"status": "ok"}
        session = self._peers.open(peer, peer.hex())
        with self._engine.request(session):
            if endpoint == "reset":
                session.reset()
                return {}
            if not isinstance(data, dict):
                raise BitvlaError("'data' is not a dictionary with 'observation'")
            answer = await session.act(self._keys.observation(_single(data.get("observation"))))
            return [{"action": answer.chunk[np.newaxis]}, {"infer_ms": answer.inference_ms, "wait_ms": answer.wait_ms}]

    def _modalities(self) -> dict[str, Any]:
        cameras = [camera.name for camera in self._config.processing.cameras]
        state = ["state"] if self._config.processing.state.names else []  # some policies take none
        keys = {"video": cameras, "state": state, "language": ["task"], "action": ["action"]}
        steps = {"action": list(range(self._config.action.horizon))}
        return {
            modality: {
                "__ModalityConfig_class__": True,
                "as_json": {"delta_indices": steps.get(modality, [0]), "modality_keys": names},
            }
            for modality, names in keys.items()
        }


def _single(observation: Any) -> dict[str, Any]:
    """The observation without the dimensions of batch and time, which must be 1."""
    if not isinstance(observation, dict):
        raise BitvlaError("'observation' is not a dictionary of video, state and language")
    return {
        name: {key: _one(f"{name}/{key}", item) for key, item in value.items()}
        if isinstance(value, dict)
        else _one(name, value)
        for name, value in observation.items()
    }


def _one(name: object, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.shape[:2] != (1, 1):
            raise BitvlaError(f"'{name}' has shape {value.shape}; batch and time, its first two, must be 1"[:200])
        return value[0, 0]
    for _ in range(2):  # text comes as [["..."]]
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
    return value


def _pack(message: Any) -> bytes:
    packed: bytes = msgpack.packb(message, default=_encode)
    return packed


def _encode(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"a {type(value).__name__}")
    file = io.BytesIO()
    np.save(file, value, allow_pickle=False)
    return {"__ndarray_class__": True, "as_npy": file.getvalue()}


def _decode(value: dict[Any, Any]) -> Any:
    return _npy(value.get("as_npy")) if "__ndarray_class__" in value else value


def _npy(data: object) -> NDArray[Any]:
    """The array of an .npy file as np.save writes it. NumPy's own reader evaluates the header, and trusts its sizes."""
    header = _HEADER.match(data) if isinstance(data, bytes) else None
    if not isinstance(data, bytes) or not header or header.end() != 10 + int.from_bytes(header[1], "little"):
        raise BitvlaError("an array is not an .npy file (version 1.0) of plain numbers")
    shape = [int(size) for size in header[4].split(b",") if size.strip()]
    dtype, values = parse_dtype(header[2].decode()), data[header.end() :]
    return array(values, dtype, shape[::-1]).T if header[3] == b"True" else array(values, dtype, shape)
