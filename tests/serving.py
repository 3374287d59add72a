"""A real server in a thread of this process, on a free port, for tests that speak to it over sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import bitvla
from bitvla.config import PolicyConfig
from bitvla.runtime.policy import Policy
from bitvla.serve.app import Running, running
from bitvla.serve.options import Options

HELPERS = "lerobot.async_inference.helpers"
NANO = Path(bitvla.__file__).parent / "policies" / "metaworld-mt10-nano.safetensors"


def load() -> Policy:
    return bitvla.load(NANO, threads=1)


@cache
def config() -> PolicyConfig:
    return load().config


def observation(seed: int = 0) -> dict[str, Any]:
    """Something that the shipped policy can see, different for every seed."""
    random = np.random.default_rng(seed)
    processing = config().processing
    return {
        "images": {
            camera.name: random.integers(0, 256, (camera.height, camera.width, 3), np.uint8)
            for camera in processing.cameras
        },
        "state": random.uniform(processing.state.low, processing.state.high).astype(np.float32),
        "instruction": ["open the drawer", "push the button", "close the window"][seed % 3],
    }


@cache
def expected(seed: int = 0) -> NDArray[np.float32]:
    """What the policy answers, without a server."""
    return load().act(observation(seed))


class Held:
    """The shipped policy, that computes only while `going` is set. `began` tells that a call has begun.

    `batches` are the numbers of observations of its calls but for those of the warm-up, where any number takes as long
    as one: batches pay.
    """

    def __init__(self, going: bool = False) -> None:
        self._policy = load()
        self.config = self._policy.config
        self.going, self.began = threading.Event(), threading.Event()
        self.batches: list[int] = []
        if going:
            self.going.set()

    def info(self) -> dict[str, Any]:
        return self._policy.info()

    def act_batch(self, observations: Sequence[dict[str, Any]], prefixes: Any = None) -> NDArray[np.float32]:
        self.began.set()
        if observations[0]["instruction"] == "warm up":
            assert self.going.wait(30)
            time.sleep(0.005)
            return np.zeros((len(observations), self.config.action.horizon, self.config.action.dim), np.float32)
        self.batches.append(len(observations))
        assert self.going.wait(30)
        return self._policy.act_batch(observations, prefixes)


class Served:
    """A running server as tests see it."""

    def __init__(self, server: Running, loop: asyncio.AbstractEventLoop) -> None:
        self.server, self._loop = server, loop
        self.port = server.port
        self.address = f"127.0.0.1:{server.port}"
        self.url = f"ws://{self.address}"

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has already ended
            self._loop.call_soon_threadsafe(self.server.stop)

    def reload(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.engine.reload(), self._loop).result(30)

    def get(self, path: str, token: str | None = None) -> tuple[int, str]:
        """Status and body of a page."""
        return get(self.server.http_port or self.port, path, token)

    def metric(self, name: str, **labels: str) -> float:
        return self.server.engine.metrics.registry.get_sample_value(name, labels) or 0.0


def get(port: int, path: str, token: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def serving(load: Callable[[], Any] = load, ready: bool = True, **options: Any) -> Iterator[Served]:
    """A server with the shipped policy, or what `load` makes, stopped at the end; `ready` waits for its warm-up."""
    started = threading.Event()
    box: list[Any] = []

    async def main() -> None:
        async with running(load, Options(**{"port": 0} | options)) as server:
            box[:] = [Served(server, asyncio.get_running_loop())]
            if ready:
                await server.engine.wait_ready()
            started.set()
            await server.wait()

    def target() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            box.append(error)
            started.set()

    thread = threading.Thread(target=target)
    thread.start()
    assert started.wait(30)
    if isinstance(box[-1], BaseException):
        raise box[-1]
    try:
        yield box[0]
    finally:
        box[0].stop()
        thread.join(30)
        assert not thread.is_alive(), "the server hangs"
        if isinstance(box[-1], BaseException):
            raise box[-1]


def lerobot_messages(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """LeRobot's message classes under the names by which pickles know them, fields as in lerobot 0.4."""

    @dataclass
    class TimedObservation:
        timestamp: float
        timestep: int
        observation: dict[str, Any]
        must_go: bool = False

    @dataclass
    class TimedAction:
        timestamp: float
        timestep: int
        action: Any

    @dataclass
    class RemotePolicyConfig:
        policy_type: str
        pretrained_name_or_path: str
        lerobot_features: dict[str, Any]
        actions_per_chunk: int
        device: str = "cpu"
        rename_map: dict[str, str] = field(default_factory=dict)

    module: Any = types.ModuleType(HELPERS)
    for kind in (TimedObservation, TimedAction, RemotePolicyConfig):
        kind.__module__, kind.__qualname__ = HELPERS, kind.__name__
        setattr(module, kind.__name__, kind)
    for name in ("lerobot", "lerobot.async_inference"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, HELPERS, module)
    return module


@contextlib.contextmanager
def stalling_network(port: int, stalls: Iterator[float]) -> Iterator[str]:
    """A relay to `port` that holds every packet back for the next of `stalls`, in seconds, as a bad radio link does."""
    relay = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = relay.accept()
                far = socket.create_connection(("127.0.0.1", port))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=carry, args=pair, daemon=True).start()

    def carry(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError, StopIteration):
            while data := source.recv(1 << 20):
                time.sleep(next(stalls))
                sink.sendall(data)
        for end in (source, sink):
            end.close()

    threading.Thread(target=accept, daemon=True).start()
    with relay:
        yield f"ws://127.0.0.1:{relay.getsockname()[1]}"


def locked(values: Iterator[float]) -> Iterator[float]:
    """An iterator that several threads may share."""
    lock = threading.Lock()
    while True:
        with lock:
            value = next(values)
        yield value
