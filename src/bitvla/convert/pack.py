"""A checkpoint -> a file of a policy or of a language model: latent weights become ternary codes, tensor by tensor.

The golden observations of the checkpoint are played through the packed policy, and its chunks are stored: `verify`
replays them on every machine. Where the checkpoint says what the PyTorch network answered, the two are compared, and
a policy that differs by more than `PARITY_BOUND` is not written.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

import bitvla
from bitvla.bundle import (
    FORMAT,
    Bundle,
    Document,
    MatrixDtype,
    TensorSpec,
    stored_tensors,
    tensor_specs,
    to_bfloat16,
    to_float32,
    write,
)
from bitvla.config import LanguageModelConfig, PolicyConfig, Precision
from bitvla.convert import official
from bitvla.convert.source import Golden, Progress, Source
from bitvla.convert.training import open_training
from bitvla.errors import BitvlaError, memory_for
from bitvla.files import check_no_folder
from bitvla.processing.vectors import normalize
from bitvla.quantization import Packing, quantize_activations
from bitvla.quantization import pack as pack_codes
from bitvla.runtime.policy import Policy

# Full-precision matrices of up to this many bytes are stored as trained. Rounding them to bfloat16 moves activations by
# 2e-3 relative before the first layer, where the packed network otherwise equals PyTorch to 1e-6.
EXACT_UP_TO = 8 << 20

# Mean difference from PyTorch of one chunk, in normalised units (the range is 2), above which a policy is not written.
# Float sums that round differently flip int8 codes, and flips add up: 0.04 was measured on random networks of nano size
# (0.07 with bfloat16 matrices), while the chunk of another observation is 0.4 or more away.
PARITY_BOUND = 0.1


def pack(
    checkpoint: str | os.PathLike[str],
    out: Path,
    *,
    round_full_precision: bool = False,
    packing: Packing = "2bit",
    matrix_dtype: MatrixDtype | None = None,
    expert: Precision | None = None,
    views: int | None = None,
    statistics: str | None = None,
    control_hz: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack a checkpoint into the policy file `out` and return a summary of it.

    `checkpoint` is a folder that training wrote, or a published BitVLA checkpoint: its folder, or its id on the
    Hugging Face Hub. For the latter, `views` is the number of cameras it was trained with, `statistics` the data set
    whose statistics to use, and `control_hz` the control rate of its robot; see `official.open_official`.

    `round_full_precision` accepts a checkpoint that was trained in full precision, or whose tower was, and rounds it to
    ternary without training: an ablation, not a good policy. `packing` is how ternary weights are stored, which changes
    no result: in 2 bits, or in base 3, a fifth smaller. `matrix_dtype` is how full-precision matrices are stored:
    float32, exactly as trained, bfloat16, half the size, or int8, a quarter; by default as the checkpoint has them, and
    float32 up to `EXACT_UP_TO` bytes of them. `expert` rounds the layers of a flow-matching expert alone, which was
    trained in full precision.

    Raises BitvlaError naming what is missing, not finite, wrongly shaped, or too different from PyTorch; `out` is then
    not touched.
    """
    out = Path(out)
    check_no_folder(out)
    source = _open(checkpoint, views, statistics, control_hz)
    config = _with_expert(source, expert)
    rounded = source.config.precision == "full"
    if rounded and not round_full_precision:
        raise BitvlaError(
            f"{checkpoint} was trained in full precision, so its weights are not ternary; distill it first "
            "(bitvla train distill), or round it without training, which costs most of its skill (--round)"
        )
    if round_full_precision and config.vision is not None and not config.vision.ternary:
        rounded, tower = True, msgspec.structs.replace(config.vision, ternary=True)
        config = msgspec.structs.replace(config, vision=tower)
    if round_full_precision and not rounded:
        raise BitvlaError(f"{checkpoint} is ternary, there is nothing to round; leave out --round")
    rounded |= expert == "ternary"
    matrix_dtype = matrix_dtype or source.matrix_dtype or _matrix_dtype(config)
    config = msgspec.structs.replace(config, precision="ternary")
    document: Document[Any] = Document(
        format=FORMAT,
        config=config,
        packing=packing,
        matrix_dtype=matrix_dtype,
        tokenizer=source.tokenizer,
        golden=tuple(observation["instruction"] for observation in source.golden.observations),
        provenance=source.provenance
        | {
            "packed": {
                "bitvla": bitvla.__version__,
                "checkpoint_sha256": source.sha256,
                "rounded_after_training": rounded,
            }
        },
    )
    parity = {}
    with memory_for(f"packing {checkpoint}", _memory(document)):
        tensors = _pack_tensors(source, config, packing, matrix_dtype, progress)
        if isinstance(config, PolicyConfig):
            parity = _play_golden(document, tensors, source.golden, compare=not rounded)
        digest = write(out, document, tensors)
    return {"path": str(out), "sha256": digest, "file_bytes": out.stat().st_size} | parity


def _open(
    checkpoint: str | os.PathLike[str], views: int | None, statistics: str | None, control_hz: float | None
) -> Source:
    folder = official.local(os.fspath(checkpoint))
    if not folder.is_dir():
        raise BitvlaError(f"{folder} is not a checkpoint folder (config.json, model.safetensors, ...)")
    if official.recognizes(folder):
        return official.open_official(folder, views, statistics, control_hz)
    if views or statistics or control_hz:
        raise BitvlaError(
            f"{folder} knows its cameras, statistics and control rate; --views, --statistics and --control-hz are for "
            "published checkpoints"
        )
    source = open_training(folder)
    if source.provenance.get("stage") == "localize":
        raise BitvlaError(
            f"{folder} is a vision tower (stage 'localize'): its policy has not learnt to act. Train one from it, "
            f"with `bitvla train finetune --init {folder}`"
        )
    return source


def _with_expert(source: Source, expert: Precision | None) -> PolicyConfig | LanguageModelConfig:
    """What `source` holds, with a flow-matching expert of another precision."""
    config = source.config
    if expert is None:
        return config
    flow = config.action.flow if isinstance(config, PolicyConfig) else None
    if not isinstance(config, PolicyConfig) or flow is None:
        raise BitvlaError(f"{source.folder} has no flow-matching expert to store in {expert}; leave out --expert")
    if flow.ternary:
        raise BitvlaError(
            f"the expert of {source.folder} was trained ternary, it cannot be {expert}; leave out --expert"
        )
    action = msgspec.structs.replace(config.action, flow=msgspec.structs.replace(flow, precision=expert))
    return msgspec.structs.replace(config, action=action)


def _memory(document: Document[Any]) -> int:
    """Bytes that packing holds at most, about: the whole file, and its largest tensor once more, in bfloat16."""
    largest = max(math.prod(spec.shape) for spec in tensor_specs(document.config).values())
    return sum(stored.nbytes for stored in stored_tensors(document).values()) + 2 * largest


def _matrix_dtype(config: PolicyConfig | LanguageModelConfig) -> MatrixDtype:
    values = sum(
        math.prod(spec.shape) for spec in tensor_specs(config).values() if spec.kind in ("matrix", "embedding")
    )
    return "F32" if 4 * values <= EXACT_UP_TO else "BF16"


def _pack_tensors(
    source: Source,
    config: PolicyConfig | LanguageModelConfig,
    packing: Packing,
    matrix_dtype: MatrixDtype,
    progress: Progress | None,
) -> dict[str, NDArray[Any]]:
    specs = tensor_specs(config)
    tensors: dict[str, NDArray[Any]] = {}
    for index, (name, spec) in enumerate(specs.items()):
        if spec.kind == "ternary":
            codes, scale = source.ternary(name)
            tensors[name] = pack_codes(codes, packing)
            tensors[f"{name}_scale"] = np.array([scale], dtype=np.float32)
        else:
            tensors |= _full_precision(name, source.tensor(name), spec, matrix_dtype)
        if progress:
            progress(index + 1, len(specs), name)
    return tensors


def _full_precision(
    name: str, weight: NDArray[Any], spec: TensorSpec, matrix_dtype: MatrixDtype
) -> dict[str, NDArray[Any]]:
    """A tensor that training keeps in full precision, as it is stored."""
    dtype = spec.dtype(matrix_dtype)
    if dtype == "I8":
        codes, scales = quantize_activations(to_float32(weight))  # absmax int8, here for each row of weights
        return {name: codes, f"{name}_scale": scales}
    if dtype == "BF16":
        return {name: weight if weight.dtype == np.uint16 else to_bfloat16(weight)}
    return {name: to_float32(weight)}


def _play_golden(
    document: Document[PolicyConfig], tensors: dict[str, NDArray[Any]], golden: Golden, *, compare: bool
) -> dict[str, Any]:
    """Add the golden traces to `tensors` and say how far the packed policy is from PyTorch."""
    policy = Policy(Bundle(document, tensors, sha256=""))
    errors: list[tuple[float, float]] = []
    for index, (observation, expected) in enumerate(zip(golden.observations, golden.chunks, strict=True)):
        chunk = policy.act(observation)
        if "state" in observation:
            tensors[f"golden.{index}.state"] = np.asarray(observation["state"], dtype=np.float32)
        tensors[f"golden.{index}.chunk"] = chunk
        if policy.max_prefix:
            tensors[f"golden.{index}.continued"] = policy.act(observation, prefix=chunk[: policy.max_prefix])
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
