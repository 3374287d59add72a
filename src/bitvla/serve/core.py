"""One policy, many robots: what is the same whichever dialect they speak.

Everything here runs on the event loop, except the policy itself: it lives in one worker thread, since the loop must
keep answering while it computes, and calls of a policy wait for each other. A session has room for one waiting
observation; a newer one takes its place. So at most one observation a robot waits, sessions take turns in the order in
which they asked, and nothing piles up. What waits when the policy becomes free is computed together, where that is
faster; nothing waits for company.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bitvla.config import PolicyConfig, Statistics, to_dict
from bitvla.errors import BitvlaError
from bitvla.serve.telemetry import Metrics, log

Observation = dict[str, Any]
_BATCH_PAYS = 0.95  # of the time of two calls: what a batch of two must take less than
_LONG_SECONDS = 0.25  # a call that takes longer has work enough for all cores, and trying batches would delay the start
_IDLE_SECONDS = 5.0  # after which a robot that has no connection to lose may lose its session to another


class Policy(Protocol):
    """All that a server knows of a policy. Every observation stands alone, so sessions can share it.

    `act_batch` takes several of them, with a prefix or None for each, and answers (observations, horizon, action_dim).
    """

    config: PolicyConfig

    def act_batch(
        self, observations: Sequence[Observation], prefixes: Sequence[Any] | None = None, /
    ) -> NDArray[np.float32]: ...

    def info(self) -> dict[str, Any]: ...


class UnavailableError(BitvlaError):
    """The server cannot answer now: it is full, stopping, or not the right one. No fault of the observation."""


class SupersededError(BitvlaError):
    """A newer observation of the same session took this one's place before its turn came."""


class Answer(NamedTuple):
    """A chunk float32 (horizon, action_dim) in the robot's units, and the milliseconds it waited, and it and those
    computed with it took."""

    chunk: NDArray[np.float32]
    wait_ms: float
    inference_ms: float


class _Request(NamedTuple):
    observation: Observation
    prefix: Any
    arrived: float
    answer: asyncio.Future[Answer]


class Session:
    """One robot. Made by `Engine.open`; `close` it when the robot has gone."""

    def __init__(self, engine: Engine, number: int, peer: str) -> None:
        self.number, self.peer = number, peer
        self.used = time.monotonic()
        self._engine = engine
        self._waiting: _Request | None = None

    async def act(self, observation: Observation, prefix: Any = None) -> Answer:
        """The answer of the policy; `prefix` are actions that are decided already, for those that can continue them.

        Raises:
            SupersededError: `act` or `reset` was called again on this session before this call's turn came.
            UnavailableError: the server stops.
            BitvlaError: the policy refused the observation.
        """
        self.touch()
        request = _Request(observation, prefix, self.used, asyncio.get_running_loop().create_future())
        self._engine.enqueue(self, request)
        return await request.answer

    def touch(self) -> None:
        """A sign of life."""
        self.used = time.monotonic()

    def reset(self) -> None:
        """Begin a new episode: an observation of the last one that still waits is not answered."""
        self.touch()
        if self._waiting:
            self._give_up(SupersededError("the session was reset before this observation's turn came"))

    def close(self) -> None:
        """Leave. May be repeated."""
        if self._waiting:
            self._give_up(UnavailableError("the session was closed"))
        self._engine.forget(self)

    def put(self, request: _Request) -> bool:
        """Let `request` wait; False when it took the place of an older one, whose turn it inherits."""
        first = self._waiting is None
        if not first:
            self._give_up(SupersededError("a newer observation of the same session took this one's place"))
        self._waiting = request
        return first

    def take(self) -> _Request | None:
        request, self._waiting = self._waiting, None
        return request

    def _give_up(self, error: BitvlaError) -> None:
        request = self.take()
        if request and not request.answer.done():
            request.answer.set_exception(error)


class Engine:
    """Owns a policy and gives each session its turn. `load` reads the policy, at the start and at every reload."""

    def __init__(
        self, load: Callable[[], Policy], *, max_sessions: int = 16, max_batch: int = 8, metrics: Metrics | None = None
    ) -> None:
        self.metrics = metrics or Metrics()
        self._load, self._max_sessions, self._max_batch = load, max_sessions, max_batch
        self._batch = 1  # the most observations of a call; the warm-up finds out
        self._worker = ThreadPoolExecutor(1, "policy")
        self._policy: Policy | None = None
        self._sessions: dict[Session, None] = {}
        self._opened = 0
        self._turns: asyncio.Queue[Session] = asyncio.Queue()
        self._ready = asyncio.Event()
        self._stopping = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._taking_turns: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        return self._ready.is_set() and not self._stopping

    @property
    def full(self) -> bool:
        return len(self._sessions) >= self._max_sessions

    @property
    def policy(self) -> Policy:
        """The policy in use. Only its constant parts (`config`, `info`) are for others than the worker."""
        if self._policy is None:
            raise UnavailableError("the policy is not loaded yet")
        return self._policy

    async def load(self) -> PolicyConfig:
        """Load the policy. Raises what loading raises."""
        self._policy = await self._work(self._load)
        return self.policy.config

    async def warm_up(self) -> None:
        """Call the loaded policy, find out whether batches pay, then begin to answer."""
        self._batch = await self._work(partial(_warm_up, self.policy, self._max_batch))
        self._taking_turns = asyncio.create_task(self._take_turns())
        self._ready.set()
        self.metrics.ready.set(1)
        sha256 = self.policy.info().get("sha256")
        log(logging.INFO, "ready", policy=self.policy.config.name, sha256=sha256, batch=self._batch)

    async def reload(self) -> None:
        """Load the policy again and swap it between two calls; keep the old one when the new one does not fit.

        Robots hold what the old one told them, so cameras, state, actions and rates must be the same.
        """
        try:
            policy = await self._work(self._load)
            batch = await self._work(partial(_warm_up, policy, self._max_batch))
            differences = _differences(interface(self.policy.config), interface(policy.config))
            if differences:
                raise BitvlaError(
                    f"it is for another robot: {', '.join(differences)} differ; start a new server for it"
                )
        except Exception as error:  # a half-copied or foreign file must not end a server in use
            self.metrics.reloads.labels("refused").inc()
            log(logging.ERROR, "reload refused; the old policy goes on", reason=str(error))
            return
        self._policy, self._batch = policy, batch
        self.metrics.reloads.labels("done").inc()
        log(logging.INFO, "reloaded", policy=policy.config.name, sha256=policy.info().get("sha256"))

    async def wait_ready(self) -> None:
        """Until the policy is warm, or the server stops."""
        await self._ready.wait()

    def open(self, peer: str) -> Session:
        """A session for a robot. Raises UnavailableError when there are too many."""
        if self._stopping:
            raise UnavailableError("the server is stopping")
        if self.full:
            raise UnavailableError(f"all {self._max_sessions} sessions are taken; see --max-sessions")
        self._opened += 1
        session = Session(self, self._opened, peer)
        self._sessions[session] = None
        self.metrics.sessions.set(len(self._sessions))
        log(logging.INFO, "session opened", session=session.number, peer=peer)
        return session

    def forget(self, session: Session) -> None:
        if session in self._sessions:
            del self._sessions[session]
            self.metrics.sessions.set(len(self._sessions))
            log(logging.INFO, "session closed", session=session.number, peer=session.peer)

    def enqueue(self, session: Session, request: _Request) -> None:
        if self._stopping or session not in self._sessions:
            raise UnavailableError("the server is stopping" if self._stopping else "the session was closed")
        if session.put(request):
            self._turns.put_nowait(session)
        else:
            self.metrics.superseded.inc()

    @contextlib.contextmanager
    def request(self, session: Session) -> Iterator[None]:
        """Around one request, from its message to the reply that was sent: `stop` waits for it, metrics count it.

        Logs what went wrong; the caller tells it the robot.
        """
        self._in_flight += 1
        self._idle.clear()
        outcome = "failed"
        try:
            yield
            outcome = "answered"
        except (UnavailableError, SupersededError):
            outcome = "unavailable"
            raise
        except BitvlaError as error:
            outcome = "refused"
            log(logging.WARNING, "refused", session=session.number, peer=session.peer, reason=str(error))
            raise
        except (ConnectionError, asyncio.CancelledError):
            outcome = "unavailable"  # the robot has gone
            raise
        except Exception:
            log(logging.ERROR, "failed", session=session.number, peer=session.peer, exc_info=True)
            raise
        finally:
            self.metrics.requests.labels(outcome).inc()
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def stop(self, grace: float) -> bool:
        """Refuse what waits, finish what runs within `grace` seconds. False when the policy still computes."""
        self._stopping = True
        self.metrics.ready.set(0)
        self._ready.set()  # whoever waits to open a session is refused
        for session in list(self._sessions):
            request = session.take()
            if request and not request.answer.done():
                request.answer.set_exception(UnavailableError("the server is stopping"))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace)
        finished = not self._in_flight
        if self._taking_turns:
            self._taking_turns.cancel()
        self._worker.shutdown(wait=False, cancel_futures=True)
        return finished

    async def _take_turns(self) -> None:
        """One call of the policy after the other, each for what waits by then."""
        while True:
            requests = self._taken(await self._turns.get())
            while len(requests) < self._batch and not self._turns.empty():
                requests += self._taken(self._turns.get_nowait())
            if not requests:
                continue
            started = time.monotonic()
            results = await self._work(partial(_answer, self.policy, requests))
            ended = time.monotonic()
            self.metrics.inference.observe(ended - started)
            self.metrics.batch.observe(len(requests))
            for request, result in zip(requests, results, strict=True):
                if request.answer.done():
                    continue
                if isinstance(result, Exception):  # BitvlaError, or a fault of the policy: `request` logs either
                    request.answer.set_exception(result)
                    continue
                self.metrics.wait.observe(started - request.arrived)
                times = (1e3 * (started - request.arrived), 1e3 * (ended - started))
                request.answer.set_result(Answer(result, *times))

    @staticmethod
    def _taken(session: Session) -> list[_Request]:
        request = session.take()
        return [] if request is None or request.answer.cancelled() else [request]

    async def _work(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function)


class Peers:
    """Sessions of robots that have no connection whose end could be seen, by what identifies them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sessions: dict[Any, Session] = {}

    def get(self, peer: Any) -> Session | None:
        return self._sessions.get(peer)

    def open(self, peer: Any, name: str) -> Session:
        """The session of `peer`, a new one if need be; where all are taken, one that has long been idle ends."""
        known = self._sessions.get(peer)
        if known:
            return known
        if self._engine.full:
            self._close_idle()
        session = self._sessions[peer] = self._engine.open(name)
        return session

    def _close_idle(self) -> None:
        now = time.monotonic()
        for peer, session in list(self._sessions.items()):
            if now - session.used > _IDLE_SECONDS:
                del self._sessions[peer]
                session.close()


def interface(config: PolicyConfig) -> dict[str, Any]:
    """What a robot must know of a policy: plain data, fit for a message."""
    processing = config.processing
    return {
        "cameras": [to_dict(camera) for camera in processing.cameras],
        "state": _names(processing.state),
        "action": _names(processing.action),
        "control_hz": processing.control_hz,
        "horizon": config.action.horizon,
        "max_prefix": config.action.max_prefix,
        "execute_horizon": processing.execute_horizon,
        "gripper": processing.gripper,
        "rotate180": processing.image.rotate180,
    }


def _names(statistics: Statistics) -> dict[str, list[str]]:
    return {"names": list(statistics.names), "units": list(statistics.units)}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [name for name, value in old.items() if new[name] != value]


def _answer(policy: Policy, requests: list[_Request]) -> list[NDArray[np.float32] | Exception]:
    """A chunk for each request, or why there is none. Where a batch fails each is asked alone, and one alone fails."""
    try:
        return list(policy.act_batch([request.observation for request in requests], [r.prefix for r in requests]))
    except Exception as error:
        if len(requests) == 1:
            return [error]
        return [result for request in requests for result in _answer(policy, [request])]


def _warm_up(policy: Policy, max_batch: int) -> int:
    """Let it see something: gray images, the middle of every state. How many observations a call should have at most:
    `max_batch`, or 1 where two together take as long as one after the other, so that the first need not wait."""
    config = policy.config
    state = config.processing.state
    observation: dict[str, Any] = {
        "images": {
            camera.name: np.full((camera.height, camera.width, 3), 128, np.uint8)
            for camera in config.processing.cameras
        },
        "instruction": "warm up",
    }
    if state.names:
        middle = (np.asarray(state.low) + np.asarray(state.high)) / 2
        observation["state"] = np.where(state.mask, middle, 0).astype(np.float32)

    def seconds(count: int) -> float:
        start = time.monotonic()
        policy.act_batch([observation] * count)
        return time.monotonic() - start

    if seconds(1) > _LONG_SECONDS or max_batch == 1:
        return 1
    alone, together = (min(seconds(count) for _ in range(3)) for count in (1, 2))
    return max_batch if together < _BATCH_PAYS * 2 * alone else 1
