"""The checkpoint folder that `bitvla train` writes, opened for packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bitvla.bundle import TensorSpec, tensor_specs
from bitvla.config import LanguageModelConfig, PolicyConfig, check, from_dict
from bitvla.convert.source import (
    Golden,
    Source,
    check_finite,
    check_names,
    read_json,
    read_text,
    safetensors,
    sha256,
)
from bitvla.errors import BitvlaError
from bitvla.quantization import ternarize


def open_training(checkpoint: Path) -> Source:
    """Open a training checkpoint, of a policy or a vision-language model; BitvlaError names what does not fit."""
    config, provenance = _read_config(checkpoint), read_json(checkpoint / "provenance.json")
    if provenance.get("stage") == "localize":
        raise BitvlaError(
            f"{checkpoint} is a vision tower (stage 'localize'): its policy has not learnt to act. Train one from it, "
            f"with `bitvla train finetune --init {checkpoint}`"
        )
    weights, specs = checkpoint / "model.safetensors", tensor_specs(config)
    with safetensors(weights) as file:
        check_names(weights, file.keys(), specs)
    return Source(
        config=config,
        tokenizer=read_text(checkpoint / "tokenizer.json"),
        golden=_read_golden(checkpoint / "golden.safetensors", config),
        provenance=provenance,
        sha256=sha256(weights),
        tensor=lambda name: _read_weight(weights, name, specs[name]),
        ternary=lambda name: ternarize(_read_weight(weights, name, specs[name])),
    )


def _read_config(checkpoint: Path) -> PolicyConfig | LanguageModelConfig:
    origin = checkpoint / "config.json"
    stored = read_json(origin)
    config: PolicyConfig | LanguageModelConfig
    if "chat" in stored:
        config = from_dict(LanguageModelConfig, stored, str(origin))
    else:
        config = from_dict(PolicyConfig, stored, str(origin))
    try:
        return check(config)
    except BitvlaError as error:
        raise BitvlaError(f"{origin}: {error}") from None


def _read_weight(path: Path, name: str, spec: TensorSpec) -> NDArray[np.float32]:
    with safetensors(path) as file:
        entry = file.get_slice(name)
        dtype, shape = entry.get_dtype(), entry.get_shape()
        if dtype != "F32" or tuple(shape) != spec.shape:
            raise BitvlaError(f"{path}: tensor {name} is {dtype} {shape}, the policy needs F32 {list(spec.shape)}")
        weight: NDArray[np.float32] = file.get_tensor(name)
    check_finite(path, name, weight)
    return weight


def _read_golden(path: Path, config: PolicyConfig | LanguageModelConfig) -> Golden:
    """Golden observations; what is in them is checked when the policy plays them. A language model has none."""
    if isinstance(config, LanguageModelConfig):
        return Golden([], [])
    with safetensors(path) as file:
        try:
            instructions = msgspec.json.decode((file.metadata() or {})["instructions"], type=list[str])
        except (KeyError, msgspec.MsgspecError) as error:
            raise BitvlaError(f"{path} lacks its list of instructions ({error}); write the checkpoint again") from None
        names, golden = set(file.keys()), Golden([], [])
        for index, instruction in enumerate(instructions):
            images = {
                camera.name: _golden_tensor(path, file, names, f"{index}.image.{camera.name}")
                for camera in config.processing.cameras
            }
            seen = {"images": images, "instruction": instruction}
            if config.action.state_dim:
                seen["state"] = _golden_tensor(path, file, names, f"{index}.state")
            golden.observations.append(seen)
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
