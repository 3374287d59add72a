"""One object in a process of its own, called over a socket.

Evaluation keeps three kinds of process apart: the one that counts, the ones that simulate, the ones that run a
policy. A crash of one is then an answer to the others, and the memory of a policy can be measured alone. Children
start from a fresh interpreter (never a fork of OpenGL or of thread pools) and end when their parent does, because
their end of the socket closes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from bitvla.errors import BitvlaError

THREAD_POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS")

_BOOT = (
    "import json, sys; fd, sys.path[:] = json.loads(sys.argv[1]);from bitvla.evaluate.process import _host; _host(fd)"
)


class ProcessError(Exception):
    """A child process died, or its object raised something other than BitvlaError."""


class Remote:
    """An object that lives in a child process.

    `factory(*args)` is called in the child; both must be picklable (module-level functions or classes). The object's
    methods are reached with `call`, or with `send` and `receive` when several children work at once. `threads`
    bounds the thread pools of native libraries in the child.
    """

    def __init__(self, factory: Callable[..., Any], *args: Any, threads: int = 1) -> None:
        ours, theirs = socket.socketpair()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as the child
        boot = json.dumps([theirs.fileno(), [entry or os.getcwd() for entry in sys.path]])
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, boot],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,  # the parent's standard output is for results alone
                stderr=self._errors,
                env=os.environ | dict.fromkeys(THREAD_POOLS, str(threads)),
                start_new_session=True,  # Ctrl-C is for the parent, who decides what happens to the children
            )
        self.connection: Connection = Connection(ours.detach())
        self.connection.send((factory, args))

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, method: str, *args: Any) -> None:
        """Ask for a method call without waiting; `receive` gives its answer."""
        try:
            self.connection.send((method, args))
        except OSError:
            raise self._death() from None

    def receive(self) -> Any:
        """The next answer. The first one (None) says that the object exists.

        Raises:
            BitvlaError: the object raised it.
            ProcessError: the child died or raised anything else.
        """
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if kind == "refused":
            raise BitvlaError(value)
        if kind == "failed":
            raise ProcessError(value)
        return value

    def call(self, method: str, *args: Any) -> Any:
        """Call a method and wait for its answer; errors as in `receive`."""
        self.send(method, *args)
        return self.receive()

    def _death(self) -> ProcessError:
        code = self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4096))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return ProcessError(f"the process {how}" + (f": {lines[-1].strip()}" if lines else ""))

    def close(self, grace: float = 5.0) -> None:
        """End the child: it is told by the closed socket, and killed after `grace` seconds. May be repeated."""
        self.connection.close()
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(grace=0.0 if isinstance(error, KeyboardInterrupt) else 5.0)


def _host(fd: int) -> None:
    """The child's side: build the object, answer calls until the socket closes."""
    connection: Connection = Connection(fd)
    target = None
    try:
        factory, args = connection.recv()
        target = _answer(connection, factory, args, stays=True)
        while target is not None:
            method, args = connection.recv()
            _answer(connection, getattr(target, method), args)
    except (EOFError, OSError):
        pass  # the parent has gone or needs no more
    close = getattr(target, "close", None)
    if close is not None:
        close()


def _answer(connection: Connection, function: Callable[..., Any], args: tuple[Any, ...], stays: bool = False) -> Any:
    """Send what `function(*args)` returns (None if it `stays` here) or raises; return it, None for an error."""
    try:
        value = function(*args)
    except BitvlaError as error:
        connection.send(("refused", str(error)))
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {error}"))
    else:
        connection.send(("ok", None if stays else value))
        return value
    return None
