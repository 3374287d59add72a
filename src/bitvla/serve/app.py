"""A server from start to stop: the policy, a dialect, signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from websockets.asyncio.server import Server

import bitvla
from bitvla.config import PolicyConfig
from bitvla.errors import BitvlaError
from bitvla.serve.core import Engine, Policy
from bitvla.serve.http import Pages, port_of, serve_pages
from bitvla.serve.options import Options, check
from bitvla.serve.telemetry import log, start_logging

_GRACE_SECONDS = 5.0  # for the requests that run when the server is told to stop
_WATCH_SECONDS = 1.0


class Dialect(Protocol):
    """What a module of a dialect offers. `listen` returns the port."""

    async def listen(self) -> int: ...

    async def close(self) -> None: ...


class Running:
    """A server that listens. `finished` tells, in the end, whether every request was answered."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.port = 0
        self.http_port: int | None = None
        self.finished = True
        self._stopped = asyncio.Event()
        self._error: BaseException | None = None

    def stop(self) -> None:
        self._stopped.set()

    async def wait(self) -> None:
        """Until `stop` was called. Raises what the warm-up raised."""
        await self._stopped.wait()
        if self._error:
            raise self._error

    def warmed_up(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception():
            self._error = task.exception()
            self.stop()


def serve(
    source: str, options: Options, *, threads: int | None = None, prune: float = 0.0, watch: bool = False
) -> dict[str, Any]:
    """Serve the policy `source` until SIGTERM or SIGINT. SIGHUP loads it again; so does a change of a `watch`ed file.

    Returns {"requests": {outcome: count}}. Raises BitvlaError for what cannot be served so.
    """
    if watch and not Path(source).is_file():
        raise BitvlaError(f"--watch: {source} is not a file")
    start_logging()
    return asyncio.run(_serve(source, options, partial(bitvla.load, source, threads, prune), watch))


async def _serve(source: str, options: Options, load: Callable[[], Policy], watch: bool) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def reload() -> None:
        task = loop.create_task(server.engine.reload())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async with running(load, options) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop)
        loop.add_signal_handler(signal.SIGHUP, reload)
        if watch:
            tasks.add(loop.create_task(_watch(Path(source), reload)))
        await server.wait()
        for task in tasks:
            task.cancel()
    if not server.finished:
        # The interpreter would wait for the worker thread, however long the policy takes.
        log(logging.ERROR, "stopped in the middle of a call of the policy")
        os._exit(1)
    return {"requests": server.engine.metrics.totals()}


@contextlib.asynccontextmanager
async def running(load: Callable[[], Policy], options: Options) -> AsyncIterator[Running]:
    """A server that listens, warming up or ready, inside the block; what still runs is finished at its end."""
    check(options)
    engine = Engine(load, max_sessions=options.max_sessions, max_batch=options.max_batch)
    server = Running(engine)
    warm_up: asyncio.Task[None] | None = None
    async with contextlib.AsyncExitStack() as stack:
        try:
            config = await engine.load()
            dialect = _dialect(engine, config, options, server.stop)
            stack.push_async_callback(dialect.close)
            with _explained(options):
                server.port = await dialect.listen()
                if options.http_port is not None:
                    pages = await serve_pages(Pages(engine, options.token), options.host, options.http_port)
                    stack.push_async_callback(_close_pages, pages)
                    server.http_port = port_of(pages)
            log(logging.INFO, "listening", protocol=options.protocol, host=options.host, port=server.port)
            warm_up = asyncio.create_task(engine.warm_up())
            warm_up.add_done_callback(server.warmed_up)
            yield server
        finally:
            # Before anything is closed: the replies are still to be sent.
            server.finished = await engine.stop(_GRACE_SECONDS)
            if warm_up:
                warm_up.cancel()


def _dialect(engine: Engine, config: PolicyConfig, options: Options, stop: Callable[[], None]) -> Dialect:
    """Made by its module, which alone needs its library."""
    if options.protocol == "lerobot":
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # heeded at its import; what matters is logged by us
        from bitvla.serve.lerobot import LeRobot

        return LeRobot(engine, config, options)
    if options.protocol == "gr00t":
        from bitvla.serve.gr00t import Gr00t

        return Gr00t(engine, config, options, stop)
    from bitvla.serve.openpi import OpenPi

    return OpenPi(engine, config, options)


@contextlib.contextmanager
def _explained(options: Options) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BitvlaError(
            f"cannot listen on {options.host}: {error.strerror or error}; choose another --host, --port or --http-port"
        ) from None


async def _close_pages(pages: Server) -> None:
    pages.close()
    await pages.wait_closed()


async def _watch(path: Path, changed: Callable[[], None]) -> None:
    """Call `changed` whenever the file is another one; one that is still being copied is refused, then seen again."""
    seen = _signature(path)
    while True:
        await asyncio.sleep(_WATCH_SECONDS)
        now = _signature(path)
        if now and now != seen:
            seen = now
            changed()


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
