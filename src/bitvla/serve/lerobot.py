"""LeRobot's dialect: gRPC, as its stock asynchronous `robot_client` speaks it (lerobot 0.4 to 0.6).

Ready and SendPolicyInstructions begin a session, SendObservations brings what the robot sees, GetActions waits for the
chunk that follows. Each observation is answered unless a newer one comes before its turn; none is left out because it
looks like the last, which makes arms stutter. Payloads are pickles, read by `pickles`, which cannot execute them.

A robot is known by its connection, so each needs one of its own: one process a robot. The stock client sends no token:
let it come over loopback or a tunnel, or serve with --insecure in a network that keeps strangers out.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from weakref import WeakKeyDictionary

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from bitvla.config import PolicyConfig
from bitvla.errors import BitvlaError
from bitvla.serve.core import Engine, Peers, Session, SupersededError, UnavailableError
from bitvla.serve.http import same
from bitvla.serve.mapping import KeyMap, Naming
from bitvla.serve.options import Options
from bitvla.serve.pickles import Global, Record, dumps, loads, rows_as_tensors

NAMING = Naming(camera=("{}",), state=(), state_value="{}", instruction=("task",))
SERVICE = "transport.AsyncInference"
_PATIENCE_SECONDS = 2.0  # that GetActions waits for a chunk before it answers that there is none yet
_CLOSE_SECONDS = 0.5  # for calls that still run when the server stops
_LONGEST_REASON = 1000  # characters
_BEGIN, _END = 1, 3
_IMAGES, _STATE = "observation.images.", "observation.state"


def _messages() -> dict[str, Any]:
    """The messages of the service, described here so that no generated code ties us to one version of protobuf."""
    fields: dict[str, list[tuple[str, int]]] = {
        "Empty": [],
        "PolicySetup": [("data", 1)],
        "Observation": [("transfer_state", 1), ("data", 2)],
        "Actions": [("data", 1)],
    }
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="transport.proto", package="transport", syntax="proto3")
    for name, members in fields.items():
        message = file.message_type.add(name=name)
        for member, number in members:
            # An enum (0 unknown, 1 begin, 2 middle, 3 end) is an int32 on the wire.
            type_ = kind.TYPE_BYTES if member == "data" else kind.TYPE_INT32
            message.field.add(name=member, number=number, type=type_, label=kind.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"transport.{name}")) for name in fields}


MESSAGES = _messages()


class Robot:
    """What a robot asked for, and the newest answer that it has not fetched. It must not hold its session, with which
    it is forgotten."""

    def __init__(self, setup: Record, actions_per_chunk: int) -> None:
        self.actions_per_chunk = actions_per_chunk
        self.timed_action = Global(setup.kind.module, "TimedAction")
        self._answers: asyncio.Queue[bytes | BitvlaError] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    def answer(self, work: Coroutine[Any, Any, bytes]) -> None:
        """Begin to work on the answer to an observation."""
        task = asyncio.create_task(self._publish(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def fetch(self) -> bytes:
        """The newest answer, b"" when there is none for a while. Raises what went wrong instead."""
        try:
            answer = await asyncio.wait_for(self._answers.get(), _PATIENCE_SECONDS)
        except TimeoutError:
            return b""
        if isinstance(answer, BitvlaError):
            raise answer
        return answer

    def reset(self) -> None:
        """Begin a new episode: what the last one saw is not answered, even if the policy computes it now."""
        for task in self._tasks:
            task.cancel()
        self._forget()

    async def _publish(self, work: Coroutine[Any, Any, bytes]) -> None:
        try:
            answer: bytes | BitvlaError = await work
        except SupersededError:
            return
        except BitvlaError as error:
            answer = error
        except Exception:  # logged by `request`; its text is for the log, not for strangers
            answer = BitvlaError("the server failed to answer; its log has the reason")
        self._forget()
        self._answers.put_nowait(answer)

    def _forget(self) -> None:
        while not self._answers.empty():
            self._answers.get_nowait()


class LeRobot:
    """The service. Every method is called with a message as bytes and returns one."""

    def __init__(self, engine: Engine, config: PolicyConfig, options: Options) -> None:
        self._engine, self._config, self._options = engine, config, options
        self._keys = KeyMap(config, NAMING, options.map, options.preset)
        self._peers = Peers(engine)
        self._robots: WeakKeyDictionary[Session, Robot] = WeakKeyDictionary()
        self._server: grpc.aio.Server | None = None

    async def listen(self) -> int:
        """Accept connections; the port."""
        options = self._options
        logging.getLogger("grpc").setLevel(logging.CRITICAL)  # what matters of a stranger's nonsense is logged by us
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", options.max_bytes),
                ("grpc.so_reuseport", 0),  # a second server on the port is a mistake, not a way to share it
                ("grpc.keepalive_time_ms", int(1e3 * options.keepalive)),
                ("grpc.keepalive_timeout_ms", int(1e3 * options.keepalive)),
            ]
        )
        methods = {
            "Ready": grpc.unary_unary_rpc_method_handler(self._guarded(self._ready)),
            "SendPolicyInstructions": grpc.unary_unary_rpc_method_handler(self._guarded(self._instruct)),
            "SendObservations": grpc.stream_unary_rpc_method_handler(self._guarded(self._observe)),
            "GetActions": grpc.unary_unary_rpc_method_handler(self._guarded(self._act)),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        try:
            port = self._server.add_insecure_port(options.address)
        except RuntimeError:  # which does not say why
            raise OSError(f"{options.address} is in use, or not an address of this machine") from None
        await self._server.start()
        return int(port)

    async def close(self) -> None:
        """End every connection."""
        if self._server:
            await self._server.stop(_CLOSE_SECONDS)

    def _guarded(self, method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[bytes]]:
        """`method` for those with the token; what goes wrong becomes a status that the stock client logs."""

        async def guarded(request: Any, context: Any) -> bytes:
            if not self._allowed(context):
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or missing token in 'authorization'")
            try:
                return (await method(request, context)).SerializeToString()
            except UnavailableError as error:
                code, reason = grpc.StatusCode.UNAVAILABLE, str(error)
            except (BitvlaError, DecodeError) as error:
                code, reason = grpc.StatusCode.INVALID_ARGUMENT, str(error)
            await context.abort(code, reason[:_LONGEST_REASON])
            raise AssertionError("abort raises")

        return guarded

    def _allowed(self, context: Any) -> bool:
        sent = dict(context.invocation_metadata()).get("authorization", "")
        return self._options.token is None or same(sent.partition(" ")[2], self._options.token)

    async def _ready(self, _: bytes, context: Any) -> Any:
        await self._engine.wait_ready()
        session = self._peers.get(context.peer())
        if session:
            session.reset()
            self._robots[session].reset()
        return MESSAGES["Empty"]()

    async def _instruct(self, request: bytes, context: Any) -> Any:
        await self._engine.wait_ready()
        setup = _record(loads(MESSAGES["PolicySetup"].FromString(request).data), "RemotePolicyConfig")
        count = self._check(setup.fields)
        session = self._peers.open(context.peer(), unquote(context.peer()))
        self._robots[session] = Robot(setup, count)
        return MESSAGES["Empty"]()

    async def _observe(self, chunks: AsyncIterator[bytes], context: Any) -> Any:
        session, robot = self._known(context)
        robot.answer(self._answer(session, robot, await self._collected(chunks)))
        return MESSAGES["Empty"]()

    async def _act(self, _: bytes, context: Any) -> Any:
        session, robot = self._known(context)
        session.touch()
        return MESSAGES["Actions"](data=await robot.fetch())

    async def _answer(self, session: Session, robot: Robot, data: bytes) -> bytes:
        """From a pickled TimedObservation to a pickled list of TimedAction."""
        with self._engine.request(session):
            seen = _record(loads(data), "TimedObservation").fields
            timestamp, timestep = seen.get("timestamp"), seen.get("timestep")
            if not isinstance(timestamp, float) or not math.isfinite(timestamp) or type(timestep) is not int:
                raise BitvlaError("the observation has no time stamp and time step")
            answer = await session.act(self._keys.observation(_flat(seen.get("observation"))))
            chunk = answer.chunk[: robot.actions_per_chunk]
            period = 1 / self._config.processing.control_hz
            return dumps([
                Record(
                    robot.timed_action,
                    {"timestamp": timestamp + row * period, "timestep": timestep + row, "action": action},
                )
                for row, action in enumerate(rows_as_tensors(chunk))
            ])  # fmt: skip

    async def _collected(self, chunks: AsyncIterator[bytes]) -> bytes:
        """The payload of a message that comes in pieces: one of state begin, some of middle, one of end."""
        data = bytearray()
        async for chunk in chunks:
            part = MESSAGES["Observation"].FromString(chunk)
            if part.transfer_state == _BEGIN:
                data.clear()
            data += part.data
            if len(data) > self._options.max_bytes:
                raise BitvlaError(f"the observation is larger than {self._options.max_message_mb:g} MB")
            if part.transfer_state == _END:
                return bytes(data)
        raise BitvlaError("the observation ends before its end")

    def _check(self, setup: dict[str, Any]) -> int:
        """The number of actions that the robot wants of a chunk. BitvlaError when it is not for this policy."""
        names, wanted = self._names(), setup.get("pretrained_name_or_path")
        if not isinstance(wanted, str) or wanted not in names:
            asked = wanted[:100] if isinstance(wanted, str) else type(wanted).__name__
            raise BitvlaError(
                f"this server has the policy '{names[0]}', the robot asks for '{asked}'; "
                f"start it with --pretrained_name_or_path={names[0]}"
            )
        if setup.get("rename_map"):
            raise BitvlaError("rename cameras where the policy is served: bitvla serve --map KEY=CAMERA")
        self._keys.check([*_features(setup.get("lerobot_features")), *NAMING.instruction])
        count = setup.get("actions_per_chunk")
        if type(count) is not int or count < 1:
            raise BitvlaError("actions_per_chunk is not a number of at least 1")
        return count

    def _names(self) -> list[str]:
        path = Path(self._engine.policy.info().get("path") or "")
        return [self._config.name, path.name, path.stem, str(path)]

    def _known(self, context: Any) -> tuple[Session, Robot]:
        session = self._peers.get(context.peer())
        if session is None:
            raise BitvlaError("this connection has no session here; start the robot client again")
        return session, self._robots[session]


def _record(value: Any, name: str) -> Record:
    if not isinstance(value, Record) or value.kind.name != name:
        raise BitvlaError(f"the message is not a {name}")
    return value


def _flat(observation: Any) -> dict[str, Any]:
    """A raw observation: numbers, arrays and text by name, and nothing that holds more of them."""
    if not isinstance(observation, dict):
        raise BitvlaError("the observation is not a dictionary")
    for name, value in observation.items():
        if not isinstance(value, np.ndarray | np.generic | int | float | str):
            raise BitvlaError(f"'{name}' is a {type(value).__name__}, not a number, an array or text"[:200])
    return observation


def _features(features: Any) -> Iterator[str]:
    """The keys of the raw observations that a robot with these features will send."""
    if not isinstance(features, dict):
        raise BitvlaError("lerobot_features is not a dictionary")
    for name, feature in features.items():
        if name.startswith(_IMAGES):
            yield name.removeprefix(_IMAGES)
        elif name == _STATE:
            names = feature.get("names") if isinstance(feature, dict) else None
            if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
                raise BitvlaError(f"lerobot_features['{_STATE}'] has no names")
            yield from names
