"""Workers in parallel processes: hand out jobs, replace the dead, lose nothing."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, NamedTuple

from bitvla.errors import BitvlaError
from bitvla.evaluate.process import ProcessError, Remote
from bitvla.evaluate.record import Episode, Job, PolicyFacts, Protocol
from bitvla.evaluate.worker import SimulatorFacts, Worker

ATTEMPTS = 2  # a job whose process died is run once more, then recorded as an error


class _Task(NamedTuple):
    job: Job
    attempt: int


class Pool:
    """Up to `size` workers made by `Worker(*spec)`; a context manager that leaves no process behind."""

    start_attempts = 1  # here, a worker that dies as it starts has found no memory

    def __init__(self, spec: tuple[Any, ...], size: int, threads: int) -> None:
        self._spec, self.size, self._threads = spec, size, threads
        self._failed_starts = 0
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, _Task | None]] = {}  # by what is waited for; None: the worker is starting

    def describe(self) -> tuple[PolicyFacts, SimulatorFacts]:
        """Start the first worker and ask it what it runs. BitvlaError when it cannot run."""
        while not self._idle:
            self._finish_start(self._start())
        try:
            facts: tuple[PolicyFacts, SimulatorFacts] = self._idle[0].call("facts")
        except ProcessError as error:
            raise BitvlaError(f"the simulator could not be started: {error}") from None
        return facts

    def run(
        self, jobs: Sequence[Job], protocol: Protocol, filmed: Collection[Job]
    ) -> Iterator[tuple[Episode, bytes | None]]:
        """Run all jobs; yield each episode, with its film if its job is in `filmed`, as it ends."""
        queue = deque(_Task(job, 1) for job in jobs)
        while queue or any(task for _, task in self._busy.values()):
            self._employ(queue, protocol, filmed)
            for connection in self._wait():
                yield from self._collect(connection, queue)

    def _employ(self, queue: deque[_Task], protocol: Protocol, filmed: Collection[Job]) -> None:
        while queue and self._idle:
            worker, task = self._idle.pop(), queue.popleft()
            with contextlib.suppress(ProcessError):  # its closed connection is collected next
                worker.send("run", task.job, protocol, task.job in filmed)
            self._busy[worker.connection] = (worker, task)
        starting = sum(task is None for _, task in self._busy.values())
        for _ in range(min(len(queue) - starting, self.size - len(self._busy))):
            self._start()

    def _collect(self, connection: Any, queue: deque[_Task]) -> Iterator[tuple[Episode, bytes | None]]:
        worker, task = self._busy[connection]
        if task is None:
            self._finish_start(worker)
            return
        del self._busy[connection]
        try:
            episode, film = worker.receive()
        except ProcessError as error:
            worker.close(grace=0)  # whatever is wrong with it must not touch the next job
            if task.attempt < ATTEMPTS:
                queue.appendleft(_Task(task.job, task.attempt + 1))
                return
            job = task.job
            yield Episode(task=job.task, seed=job.seed, group=job.group, attempts=task.attempt, error=str(error)), None
            return
        self._idle.append(worker)
        yield episode, film

    def _start(self) -> Any:
        worker = self._make()
        self._busy[worker.connection] = (worker, None)
        return worker

    def _make(self) -> Any:
        """Something used like `Remote`, in which a worker starts."""
        return Remote(Worker, *self._spec, threads=self._threads)

    def _wait(self) -> Sequence[Any]:
        """Those of the busy workers' connections that have something to say; waits for the first."""
        return wait(list(self._busy))

    def _finish_start(self, worker: Any) -> None:
        try:
            worker.receive()
        except ProcessError as error:
            self._failed_starts += 1
            if self._failed_starts == self.start_attempts:
                raise BitvlaError(f"a worker could not start ({error}); try fewer processes") from None
            del self._busy[worker.connection]
            worker.close(grace=0)
            return
        del self._busy[worker.connection]
        self._idle.append(worker)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        workers = [*self._idle, *(worker for worker, _ in self._busy.values())]
        for worker in workers:
            worker.connection.close()  # told all at once, they end side by side
        for worker in workers:
            worker.close(grace=5 if kind is None else 0)
