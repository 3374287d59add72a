"""A checkpoint, whatever its layout, as packing and training read it, and the files of which checkpoints are made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bitvla.bundle import MatrixDtype, TensorSpec, tensor_specs
from bitvla.config import LanguageModelConfig, PolicyConfig
from bitvla.errors import BitvlaError

Progress = Callable[[int, int, str], None]  # tensors done, tensors in all, name of the tensor

_CHUNK = 1 << 22  # values looked at together, so that checking a large tensor takes little memory


class Golden(msgspec.Struct):
    """The golden observations of a checkpoint; `chunks[i]` is what PyTorch answered, None where not recorded."""

    observations: list[dict[str, Any]]
    chunks: list[NDArray[np.float32] | None]


@dataclass(frozen=True)
class Source:
    """The open checkpoint in `folder`. `config.precision` says what its linear layers were trained with.

    `tensor` reads one tensor by its name in `bitvla.bundle.tensor_specs`, as float32, or as bfloat16 seen as uint16;
    `ternary` the codes and the scale of a ternary weight. `matrix_dtype` is how full-precision matrices should be
    stored, None for the choice by size. `sha256` is over the weights. Of tensors whose names begin with `lacks` there
    are none: training begins with random ones.
    """

    folder: Path
    config: PolicyConfig | LanguageModelConfig
    tokenizer: str
    golden: Golden
    provenance: dict[str, Any]
    sha256: str
    tensor: Callable[[str], NDArray[Any]]
    ternary: Callable[[str], tuple[NDArray[np.int8], np.float32]]
    matrix_dtype: MatrixDtype | None = None
    lacks: str | None = None

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that can be read."""
        specs = tensor_specs(self.config)
        return {name: spec for name, spec in specs.items() if self.lacks is None or not name.startswith(self.lacks)}


@contextmanager
def safetensors(path: Path, framework: str = "numpy") -> Iterator[Any]:
    """An open safetensors file; BitvlaError where it is missing or damaged."""
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except FileNotFoundError:
        raise BitvlaError(f"{path} is missing: the checkpoint is not complete") from None
    except (SafetensorError, OSError) as error:
        raise BitvlaError(f"{path} cannot be read: {error}") from None


def check_names(path: Path, present: Iterable[str], expected: Iterable[str]) -> None:
    """Raise BitvlaError unless the weights at `path` are exactly those expected."""
    missing, unknown = set(expected) - set(present), set(present) - set(expected)
    for names, problem in ((missing, "lacks the tensor"), (unknown, "has the unknown tensor")):
        if names:
            raise BitvlaError(f"{path} {problem} {min(names)} ({len(names)} in all): it does not fit its config.json")


def check_finite(path: Path, name: str, values: NDArray[Any]) -> None:
    """Raise BitvlaError for a value that is NaN, infinite, or beyond what bfloat16 can hold."""
    flat = values.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        finite = (part & 0x7F80).max() < 0x7F80 if part.dtype == np.uint16 else np.abs(part).max() < 3e38
        if not finite:  # also where the comparison is with NaN
            raise BitvlaError(f"{path}: tensor {name} has values that are not finite; the training has diverged")


def read_text(path: Path, missing: str = "the checkpoint is not complete") -> str:
    """The text of a file that a checkpoint must have, or `missing` says why it should be there."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BitvlaError(f"{path} is missing: {missing}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BitvlaError(f"{path} cannot be read: {error}") from None


def read_json(path: Path, missing: str = "the checkpoint is not complete") -> dict[str, Any]:
    """The JSON object in such a file."""
    try:
        value = json.loads(read_text(path, missing))
    except ValueError as error:
        raise BitvlaError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BitvlaError(f"{path} does not hold a JSON object")
    return value


def sha256(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
