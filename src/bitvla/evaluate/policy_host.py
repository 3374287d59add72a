"""The object that runs a policy in its own process. Imports nothing but the runtime (or PyTorch, when asked)."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitvla.bundle import tensor_specs
from bitvla.config import PolicyConfig
from bitvla.evaluate.record import PolicyFacts

PolicySource = str | Callable[[], "Policy"]


class Policy(Protocol):
    """All that evaluation knows of a policy. `info` says at least its "instruction_set"."""

    config: PolicyConfig

    def reset(self) -> None: ...

    def act(self, observation: dict[str, Any]) -> NDArray[np.float32]: ...

    def info(self) -> dict[str, Any]: ...


class PolicyHost:
    """Loads a policy file, a training checkpoint (`full_precision`), or calls a factory; then answers for it."""

    def __init__(self, source: PolicySource, threads: int, full_precision: bool) -> None:
        start = time.perf_counter()
        self._threads = threads
        self._policy = _load(source, threads, full_precision)
        self._source = Path(self._policy.info().get("path") or "" if callable(source) else source)
        self._load_seconds = time.perf_counter() - start

    def facts(self) -> PolicyFacts:
        """What runs here."""
        config, info = self._policy.config, self._policy.info()
        parameters = sum(math.prod(spec.shape) for spec in tensor_specs(config).values())
        return PolicyFacts(
            name=config.name,
            source=self._source.name,
            digest=info.get("sha256") or _digest(self._source),
            precision=config.precision,
            prune=info.get("prune", 0.0),
            isa=info["instruction_set"],
            threads=self._threads,
            parameters=parameters,
            file_bytes=sum(path.stat().st_size for path in _weight_files(self._source)),
            bf16_bytes=2 * parameters,
            cameras=config.processing.cameras,
            state_names=config.processing.state.names,
            action_names=config.processing.action.names,
            horizon=config.action.horizon,
            execute_horizon=config.processing.execute_horizon,
            control_hz=config.processing.control_hz,
            load_seconds=round(self._load_seconds, 4),
        )

    def reset(self) -> None:
        self._policy.reset()

    def act(self, observation: dict[str, Any]) -> tuple[NDArray[np.float32], float]:
        """The chunk float32 (horizon, action_dim) and the milliseconds it took, without the transport."""
        start = time.perf_counter()
        chunk = self._policy.act(observation)
        return chunk, 1e3 * (time.perf_counter() - start)

    def peak_memory(self) -> int:
        """The most memory this process has had in RAM, in bytes."""
        return peak_memory()


def _load(source: PolicySource, threads: int, full_precision: bool) -> Policy:
    if callable(source):
        return source()
    if full_precision:
        from bitvla.model.policy import TorchPolicy

        return TorchPolicy.load(Path(source), threads)
    import bitvla

    return bitvla.load(source, threads=threads)


def _weight_files(source: Path) -> list[Path]:
    """The policy file, or the weights of a checkpoint folder."""
    return [source] if source.is_file() else sorted(source.glob("model*.safetensors")) if source.name else []


def _digest(source: Path) -> str:
    """SHA-256 of the weights of a training checkpoint (a policy file knows its own)."""
    digest = hashlib.sha256()
    for path in _weight_files(source):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def peak_memory() -> int:
    """Peak resident memory of this process in bytes.

    `ru_maxrss` would also count what the parent had when it started us, so Linux's own figure is preferred.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
