"""Workers on the machines of a Ray cluster: Ray places and watches them, the pool hands out jobs as it does here."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from bitvla.errors import BitvlaError
from bitvla.evaluate.pool import Pool
from bitvla.evaluate.process import THREAD_POOLS, ProcessError
from bitvla.evaluate.record import PolicyFacts
from bitvla.evaluate.worker import SimulatorFacts, Worker

_Identity = dict[str, Any]


class _Host:
    """The actor. It makes its worker when told to, so that a refusal is an answer and not a death."""

    def start(self, spec: tuple[Any, ...], threads: int, expected: _Identity | None) -> None:
        os.environ.update(dict.fromkeys(THREAD_POOLS, str(threads)))
        try:
            self._worker = Worker(*spec)
            found = _identity(*self._worker.facts())
        except BitvlaError as error:
            raise BitvlaError(f"{platform.node()}: {error}") from None
        for name, value in (expected or {}).items():
            if found.get(name) != value:
                raise BitvlaError(
                    f"{platform.node()} has {name} {found.get(name)}, the first worker {value}: "
                    "give all machines the same policy file and the same versions"
                )

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self._worker, method)(*args)


class _Actor:
    """The driver's side of a worker somewhere in the cluster; used like `process.Remote`."""

    def __init__(self, spec: tuple[Any, ...], threads: int, expected: _Identity | None) -> None:
        # Spread, so that memory is used on all machines; never restarted by Ray: the pool knows what was lost.
        options = {"num_cpus": threads, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        self._actor = ray.remote(**options)(_Host).remote()
        self.connection = self._actor.start.remote(spec, threads, expected)

    def send(self, method: str, *args: Any) -> None:
        self.connection = self._actor.call.remote(method, args)

    def receive(self) -> Any:
        try:
            return ray.get(self.connection)
        except RayTaskError as error:
            if isinstance(error.cause, BitvlaError):
                raise BitvlaError(str(error.cause)) from None
            raise ProcessError(f"{type(error.cause).__name__}: {error.cause}") from None
        except RayError as error:
            raise ProcessError(_first_line(error)) from None

    def call(self, method: str, *args: Any) -> Any:
        self.send(method, *args)
        return self.receive()

    def close(self, grace: float = 0.0) -> None:
        """End the actor; what its worker started ends with it."""
        ray.kill(self._actor)


class RayPool(Pool):
    """Up to `size` workers (default: one for each CPU) on the machines of the cluster at `address`.

    "" is the cluster that this machine belongs to, or else a new one on it alone. Policy and simulator must be at the
    same paths on every machine, and the same; `describe` takes the first worker's word for what they are. Raises
    BitvlaError when the cluster cannot be reached.
    """

    start_attempts = 5  # a machine may be lost as it starts a worker

    def __init__(self, spec: tuple[Any, ...], size: int | None, threads: int, address: str) -> None:
        self._ours = not ray.is_initialized()
        if self._ours:
            try:
                _reach(address)
                ray.init(address or None, log_to_driver=False, logging_level="ERROR")
            except (OSError, RuntimeError, ValueError) as error:
                raise BitvlaError(
                    f"cannot join the Ray cluster {address or 'of this machine'} ({_first_line(error)}); "
                    "start one with `ray start --head`"
                ) from None
        policy, *rest = spec
        spec = (policy if callable(policy) else os.path.abspath(policy), *rest)
        super().__init__(spec, size or max(1, int(ray.cluster_resources().get("CPU", 1)) // threads), threads)
        self._expected: _Identity | None = None

    def describe(self) -> tuple[PolicyFacts, SimulatorFacts]:
        policy, simulator = super().describe()
        self._expected = _identity(policy, simulator)
        return policy, simulator

    def _make(self) -> _Actor:
        return _Actor(self._spec, self._threads, self._expected)

    def _wait(self) -> Sequence[Any]:
        ready: Sequence[Any] = ray.wait(list(self._busy))[0]
        return ready

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in (*self._idle, *(worker for worker, _ in self._busy.values())):
            worker.close()
        if self._ours:
            ray.shutdown()


def _reach(address: str) -> None:
    """OSError where nobody listens: Ray itself would try for a quarter of an hour."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()


def _first_line(error: Exception) -> str:
    """Ray's errors go on with traces and advice."""
    return str(error).partition("\n")[0]


def _identity(policy: PolicyFacts, simulator: SimulatorFacts) -> _Identity:
    """What must be the same on every machine."""
    return {"policy": policy.digest, "precision": policy.precision} | simulator.versions
