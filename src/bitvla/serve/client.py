"""A policy on another machine, used like one on this machine. NumPy, msgpack and websockets; nothing of the policy."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as open_websocket

from bitvla.errors import BitvlaError
from bitvla.serve.arrays import pack, unpack

RESET = {"bitvla": "reset"}
_RETRY_SECONDS = 0.05  # between two tries to connect
_MAX_REPLY = 1 << 22  # bytes
_LONGEST_TIMEOUT = 86_400  # seconds: a day, since systems count neither inf nor much more
# What a server may tell otherwise when it comes back or has loaded another policy.
_MAY_CHANGE = ("server", "name", "sha256", "action_range")


class _LostError(Exception):
    """The connection is no more, or not yet; another try may help."""


class RemotePolicy:
    """Has `act`, `reset` and `info` of a loaded policy. Made by `bitvla.connect`. Not for several threads at once.

    Each call answers or raises within about `timeout` seconds, connecting again if it must. Nothing is left of a call
    that failed: its answer, should it still come, is never taken for another one's.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 5.0) -> None:
        if not 0 < timeout <= _LONGEST_TIMEOUT:
            raise BitvlaError(f"timeout is {timeout}; give seconds, more than 0 and up to {_LONGEST_TIMEOUT}")
        self._url, self._timeout = url, timeout
        self._headers = {"Authorization": f"Api-Key {token}"} if token else {}
        self._connection: ClientConnection | None = None
        self._closing = contextlib.ExitStack()
        self._info: dict[str, Any] = {}
        self._call(None)

    @property
    def max_prefix(self) -> int:
        """The most actions that `prefix` of `act` may hold."""
        return int(self._info.get("max_prefix", 0))

    def act(self, observation: dict[str, Any], prefix: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The chunk for an observation, float32 (horizon, action_dim): see `bitvla.runtime.policy.Policy.act`.

        Raises BitvlaError when the policy refuses the observation, or when no answer came in time.
        """
        request = observation if prefix is None else {**observation, "prefix": prefix}
        actions = self._call(pack(request)).get("actions")
        shape = (self._info["horizon"], len(self._info["action"]["names"]))
        if not isinstance(actions, np.ndarray) or actions.shape != shape or not np.isfinite(actions).all():
            self._drop()
            raise BitvlaError(f"{self._url} answered without a chunk of {shape} finite numbers")
        return actions

    def reset(self) -> None:
        """Begin a new episode."""
        self._call(pack(RESET))

    def info(self) -> dict[str, Any]:
        """What the policy expects and does: name, sha256, cameras, state, action, rates."""
        return dict(self._info)

    def close(self) -> None:
        """Leave. May be repeated; another call connects again."""
        self._connection = None
        self._closing.close()

    def __enter__(self) -> RemotePolicy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _call(self, request: bytes | None) -> dict[str, Any]:
        """Connect if need be and send `request`, if any; once more after a loss, until the time is over."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                connection = self._connection or self._connect(deadline)
                return self._ask(connection, request, deadline) if request else {}
            except _LostError as lost:
                if time.monotonic() + _RETRY_SECONDS >= deadline:
                    raise BitvlaError(f"{self._url} did not answer within {self._timeout:g} s: {lost}") from None
            time.sleep(_RETRY_SECONDS)

    def _ask(self, connection: ClientConnection, request: bytes, deadline: float) -> dict[str, Any]:
        try:
            connection.send(request)
            reply = connection.recv(max(0.0, deadline - time.monotonic()))
        except (ConnectionClosed, OSError) as error:  # TimeoutError is an OSError
            self._drop()
            raise _LostError(_reason(error)) from None
        except BaseException:
            self._drop()  # interrupted: the reply is still to come
            raise
        if isinstance(reply, str):
            raise BitvlaError(reply)
        return self._unpack(reply)

    def _connect(self, deadline: float) -> ClientConnection:
        try:
            connection = self._closing.enter_context(
                open_websocket(
                    self._url,
                    additional_headers=self._headers,
                    open_timeout=max(0.001, deadline - time.monotonic()),
                    close_timeout=0.5,
                    ping_interval=None,  # the server pings; here each call has its own deadline
                    compression=None,
                    max_size=_MAX_REPLY,
                    proxy=None,
                )
            )
        except InvalidStatus as error:
            raise self._rejected(error) from None
        except (InvalidURI, InvalidHandshake, ValueError) as error:
            raise BitvlaError(
                f"{self._url} is not a policy served with --protocol openpi ({_reason(error)}); "
                "the address looks like ws://host:8000"
            ) from None
        except (OSError, EOFError) as error:
            raise _LostError(_reason(error)) from None
        self._connection = connection
        _limit_send(connection.socket, self._timeout)
        try:
            greeting = connection.recv(max(0.0, deadline - time.monotonic()))
            self._meet(self._unpack(greeting) if isinstance(greeting, bytes) else {})
        except (ConnectionClosed, OSError) as error:
            self._drop()
            raise _LostError(_reason(error)) from None
        except BaseException:
            self._drop()  # interrupted, or not our server: no call may take the greeting for its reply
            raise
        return connection

    def _rejected(self, error: InvalidStatus) -> Exception:
        status, body = error.response.status_code, error.response.body or b""
        reason = body.decode(errors="replace").strip()[:200] or f"HTTP status {status}"
        return _LostError(reason) if status == 503 else BitvlaError(f"{self._url} refused the connection: {reason}")

    def _meet(self, info: dict[str, Any]) -> None:
        """Take in what the server serves; it must stay the same robot's from connection to connection."""
        if "cameras" not in info or "horizon" not in info:
            raise BitvlaError(f"{self._url} does not say which policy it serves; start it with: bitvla serve")
        changed = [name for name in self._info if name not in _MAY_CHANGE and info.get(name) != self._info[name]]
        if changed:
            raise BitvlaError(f"{self._url} now serves a policy with other {', '.join(changed)}; connect anew")
        self._info = info

    def _unpack(self, data: bytes) -> dict[str, Any]:
        message = unpack(data)
        if not isinstance(message, dict):
            self._drop()
            raise BitvlaError(f"{self._url} answered with a {type(message).__name__}, not a dictionary")
        return message

    def _drop(self) -> None:
        """End the connection at once, without waiting for the other side."""
        if self._connection:
            with contextlib.suppress(OSError):
                self._connection.socket.shutdown(socket.SHUT_RDWR)
        self.close()


def _limit_send(connected: socket.socket, seconds: float) -> None:
    """Sending fails, rather than blocks, when the other side has not read for so long."""
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _reason(error: BaseException) -> str:
    return str(error) or "no answer" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
