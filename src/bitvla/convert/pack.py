"""A training checkpoint -> a policy file: latent weights become ternary codes, tensor by tensor.

The golden observations of the checkpoint are played through the packed policy, and its chunks are stored: `verify`
replays them on every machine. Where the checkpoint says what the PyTorch network answered, the two are compared, and
a policy that differs by more than `PARITY_BOUND` is not written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

import bitvla
from bitvla.bundle import FORMAT, Bundle, Document, MatrixDtype, TensorSpec, tensor_specs, to_bfloat16, write
from bitvla.config import PolicyConfig, check, from_dict
from bitvla.errors import BitvlaError
from bitvla.processing.vectors import normalize
from bitvla.quantization import pack as pack_codes
from bitvla.quantization import ternarize
from bitvla.runtime.policy import Policy

# Full-precision matrices of up to this many bytes are stored as trained. Rounding them to bfloat16 moves activations by
# 2e-3 relative before the first layer, where the packed network otherwise equals PyTorch to 1e-6.
EXACT_UP_TO = 8 << 20

# Mean difference from PyTorch of one chunk, in normalised units (the range is 2), above which a policy is not written.
# Float sums that round differently flip int8 codes, and flips add up: 0.04 was measured on random networks of nano size
# (0.07 with bfloat16 matrices), while the chunk of another observation is 0.4 or more away.
PARITY_BOUND = 0.1

Progress = Callable[[int, int, str], None]  # tensors done, tensors in all, name of the tensor


class _Golden(msgspec.Struct):
    """The golden observations of a checkpoint; `chunks[i]` is what PyTorch answered, None where not recorded."""

    observations: list[dict[str, Any]]
    chunks: list[NDArray[np.float32] | None]


def pack(
    checkpoint: Path,
    out: Path,
    *,
    round_full_precision: bool = False,
    matrix_dtype: MatrixDtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack a training checkpoint folder into the policy file `out` and return a summary of it.

    `round_full_precision` accepts a checkpoint trained in full precision and rounds it to ternary without training: an
    ablation, not a good policy. `matrix_dtype` is how full-precision matrices are stored: float32, exactly as trained,
    or bfloat16, half the size; by default float32 up to `EXACT_UP_TO` bytes of them.

    Raises BitvlaError naming what is missing, not finite, wrongly shaped, or too different from PyTorch; `out` is then
    not touched.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    config = _read_config(checkpoint, round_full_precision)
    golden = _read_golden(checkpoint, config)
    matrix_dtype = matrix_dtype or _matrix_dtype(config)
    tensors = _pack_tensors(checkpoint / "model.safetensors", config, matrix_dtype, progress)
    document = Document(
        format=FORMAT,
        config=msgspec.structs.replace(config, precision="ternary"),
        matrix_dtype=matrix_dtype,
        tokenizer=_read_text(checkpoint / "tokenizer.json"),
        golden=tuple(observation["instruction"] for observation in golden.observations),
        provenance=_read_json(checkpoint / "provenance.json")
        | {
            "packed": {
                "bitvla": bitvla.__version__,
                "checkpoint_sha256": _sha256(checkpoint / "model.safetensors"),
                "rounded_after_training": config.precision == "full",
            }
        },
    )
    parity = _play_golden(document, tensors, golden, compare=config.precision == "ternary")
    digest = write(out, document, tensors)
    return {"path": str(out), "sha256": digest, "file_bytes": out.stat().st_size} | parity


def _read_config(checkpoint: Path, round_full_precision: bool) -> PolicyConfig:
    if not checkpoint.is_dir():
        raise BitvlaError(f"{checkpoint} is not a checkpoint folder (config.json, model.safetensors, ...)")
    origin = checkpoint / "config.json"
    config = from_dict(PolicyConfig, _read_json(origin), str(origin))
    try:
        check(config)
    except BitvlaError as error:
        raise BitvlaError(f"{origin}: {error}") from None
    if config.precision == "full" and not round_full_precision:
        raise BitvlaError(
            f"{checkpoint} was trained in full precision, so its weights are not ternary; distill it first "
            "(bitvla train distill), or round it without training, which costs most of its skill (--round)"
        )
    return config


def _matrix_dtype(config: PolicyConfig) -> MatrixDtype:
    values = sum(math.prod(spec.shape) for spec in tensor_specs(config).values() if spec.kind == "matrix")
    return "F32" if 4 * values <= EXACT_UP_TO else "BF16"


def _pack_tensors(
    path: Path, config: PolicyConfig, matrix_dtype: MatrixDtype, progress: Progress | None
) -> dict[str, NDArray[Any]]:
    specs = tensor_specs(config)
    tensors: dict[str, NDArray[Any]] = {}
    with _safetensors(path) as file:
        names = set(file.keys())
        _check_names(path, names, set(specs))
        for index, (name, spec) in enumerate(specs.items()):
            weight = _read_weight(path, file, name, spec)
            if spec.kind == "ternary":
                codes, scale = ternarize(weight)
                tensors[name] = pack_codes(codes)
                tensors[f"{name}_scale"] = np.array([scale], dtype=np.float32)
            else:
                is_half = spec.kind == "matrix" and matrix_dtype == "BF16"
                tensors[name] = to_bfloat16(weight) if is_half else weight
            if progress:
                progress(index + 1, len(specs), name)
    return tensors


def _check_names(path: Path, present: set[str], expected: set[str]) -> None:
    for names, problem in ((expected - present, "lacks the tensor"), (present - expected, "has the unknown tensor")):
        if names:
            raise BitvlaError(f"{path} {problem} {min(names)} ({len(names)} in all): it does not fit its config.json")


def _read_weight(path: Path, file: Any, name: str, spec: TensorSpec) -> NDArray[np.float32]:
    entry = file.get_slice(name)
    if entry.get_dtype() != "F32" or tuple(entry.get_shape()) != spec.shape:
        raise BitvlaError(
            f"{path}: tensor {name} is {entry.get_dtype()} {entry.get_shape()}, the policy needs F32 {list(spec.shape)}"
        )
    weight: NDArray[np.float32] = file.get_tensor(name)
    largest = np.abs(weight).max()
    if not largest < 3e38:  # NaN, infinite, or beyond what bfloat16 can hold
        raise BitvlaError(f"{path}: tensor {name} has values that are not finite; the training has diverged")
    return weight


def _read_golden(checkpoint: Path, config: PolicyConfig) -> _Golden:
    """Golden observations; what is in them is checked when the policy plays them."""
    path = checkpoint / "golden.safetensors"
    with _safetensors(path) as file:
        try:
            instructions = msgspec.json.decode((file.metadata() or {})["instructions"], type=list[str])
        except (KeyError, msgspec.MsgspecError) as error:
            raise BitvlaError(f"{path} lacks its list of instructions ({error}); write the checkpoint again") from None
        names, golden = set(file.keys()), _Golden([], [])
        for index, instruction in enumerate(instructions):
            images = {
                camera.name: _golden_tensor(path, file, names, f"{index}.image.{camera.name}")
                for camera in config.processing.cameras
            }
            state = _golden_tensor(path, file, names, f"{index}.state")
            golden.observations.append({"images": images, "state": state, "instruction": instruction})
            chunk = f"{index}.chunk"
            golden.chunks.append(file.get_tensor(chunk) if chunk in names else None)
    if not golden.observations:
        raise BitvlaError(f"{path} holds no golden observation; a policy without one cannot be verified")
    return golden


def _golden_tensor(path: Path, file: Any, names: set[str], name: str) -> NDArray[Any]:
    if name not in names:
        raise BitvlaError(f"{path} lacks the tensor {name}; write the checkpoint again")
    tensor: NDArray[Any] = file.get_tensor(name)
    return tensor


def _play_golden(
    document: Document, tensors: dict[str, NDArray[Any]], golden: _Golden, *, compare: bool
) -> dict[str, Any]:
    """Add the golden traces to `tensors` and say how far the packed policy is from PyTorch."""
    policy = Policy(Bundle(document, tensors, sha256=""))
    errors: list[tuple[float, float]] = []
    for index, (observation, expected) in enumerate(zip(golden.observations, golden.chunks, strict=True)):
        chunk = policy.act(observation)
        tensors[f"golden.{index}.state"] = np.asarray(observation["state"], dtype=np.float32)
        tensors[f"golden.{index}.chunk"] = chunk
        for camera, image in observation["images"].items():
            tensors[f"golden.{index}.image.{camera}"] = image
        if compare and expected is not None:
            errors.append(_difference(index, chunk, expected, document.config))
    means, largest = zip(*errors, strict=True) if errors else ((), ())
    return {
        "golden": len(golden.observations),
        "compared_with_pytorch": len(errors),
        "mean_error": max(means, default=None),
        "max_error": max(largest, default=None),
    }


def _difference(
    index: int, chunk: NDArray[np.float32], expected: NDArray[np.float32], config: PolicyConfig
) -> tuple[float, float]:
    """Mean and largest difference of two chunks in normalised units; BitvlaError where rounding cannot explain it."""
    if chunk.shape != expected.shape:
        raise BitvlaError(f"golden chunk {index} has shape {expected.shape}, the policy answers {chunk.shape}")
    statistics = config.processing.action
    error = np.abs(normalize(chunk, statistics) - normalize(expected, statistics))
    if not error.mean() <= PARITY_BOUND:
        raise BitvlaError(
            f"the packed policy differs from PyTorch by {error.mean():.3g} in normalised units on golden observation "
            f"{index}; rounding explains at most {PARITY_BOUND}: weights and golden traces do not belong together"
        )
    return float(error.mean()), float(error.max())


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError:
        raise BitvlaError(f"{path} is missing: the checkpoint is not complete") from None
    except (SafetensorError, OSError) as error:
        raise BitvlaError(f"{path} cannot be read: {error}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BitvlaError(f"{path} is missing: the checkpoint is not complete") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BitvlaError(f"{path} cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise BitvlaError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BitvlaError(f"{path} does not hold a JSON object")
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
