"""How to serve: what a person can choose, and what is refused."""

from __future__ import annotations

import ipaddress
from typing import Literal

import msgspec

from bitvla.errors import BitvlaError

Protocol = Literal["openpi", "lerobot", "gr00t"]
PORTS: dict[Protocol, int] = {"openpi": 8000, "lerobot": 8080, "gr00t": 5555}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`port` None is the usual one of the dialect, 0 any free one.

    `http_port` is for health and metrics beside a dialect that does not speak HTTP itself; None leaves them out.
    `map` and `preset` are those of `KeyMap`. `keepalive`: seconds without a sign of life after which a connection ends.
    """

    protocol: Protocol = "openpi"
    host: str = "127.0.0.1"
    port: int | None = None
    http_port: int | None = None
    token: str | None = None
    insecure: bool = False
    max_sessions: int = 16
    max_batch: int = 8
    max_message_mb: float = 16.0
    keepalive: float = 10.0
    map: tuple[str, ...] = ()
    preset: str | None = None
    allow_kill: bool = False

    @property
    def listen_port(self) -> int:
        return PORTS[self.protocol] if self.port is None else self.port

    @property
    def address(self) -> str:
        """Host and port in one, an IPv6 host in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.listen_port}"

    @property
    def max_bytes(self) -> int:
        return int(self.max_message_mb * 1e6)


def check(options: Options) -> Options:
    """Return `options`, or raise BitvlaError for what must not be served so."""
    if options.token is not None and not (options.token.isascii() and options.token.isalnum()):
        raise BitvlaError("the token must be letters and digits; for example the output of: openssl rand -hex 16")
    if not (options.token or options.insecure or _loopback(options.host)):
        raise BitvlaError(
            f"--host {options.host} lets other machines drive the robot: give --token (or BITVLA_TOKEN), "
            "or --insecure where the network itself keeps strangers out"
        )
    for port in (options.listen_port, options.http_port or 0):
        if not 0 <= port <= 65535:
            raise BitvlaError(f"there is no port {port}: choose one up to 65535")
    if options.http_port is not None and options.protocol == "openpi":
        raise BitvlaError("openpi answers /healthz, /readyz and /metrics on its own port; leave --http-port out")
    return options


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may lead anywhere
