"""The checkpoint folder that `bitvla train` writes, opened for packing or more training.

A run with low-rank adapters writes these and what it trained whole; its provenance.json says to which checkpoint they
belong. Here they are put together, so that nothing else knows of adapters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bitvla.bundle import TensorSpec, tensor_specs, to_float32
from bitvla.config import LanguageModelConfig, PolicyConfig, Record, check, from_dict
from bitvla.convert import official
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

Reader = Callable[[str], NDArray[np.float32]]  # of a tensor by its name


class Adapters(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Low-rank adapters of a training checkpoint: `base` (folder or Hub id) is what they are added to.

    `sha256` is that of the base's weights.
    """

    base: str
    sha256: str
    rank: int
    alpha: float


def open_start(checkpoint: str | os.PathLike[str], tower: str | os.PathLike[str] | None = None) -> Source:
    """Open a checkpoint as the start of training: a folder that training wrote, or a published one.

    The latter by its folder or by its id on the Hugging Face Hub, and so the `tower` that a published language model
    needs to see; see `official.open_start`.
    """
    folder = official.local(os.fspath(checkpoint))
    if official.recognizes(folder):
        return official.open_start(folder, None if tower is None else official.local(os.fspath(tower)))
    if tower is not None:
        raise BitvlaError(f"{folder} {official.SEES}")
    return open_training(folder)


def open_training(checkpoint: Path) -> Source:
    """Open a training checkpoint, of a policy or a vision-language model; BitvlaError names what does not fit."""
    config, provenance = read_config(checkpoint), read_json(checkpoint / "provenance.json")
    weights, specs = checkpoint / "model.safetensors", tensor_specs(config)
    with safetensors(weights) as file:
        names = set(file.keys())
    if "adapters" in provenance:
        adapters = from_dict(Adapters, provenance["adapters"], f"{checkpoint / 'provenance.json'}: adapters")
        tensor = _adapted(weights, names, specs, adapters)
        # Where the base was is nobody's business but this machine's.
        provenance["adapters"].pop("base")
    else:
        tensor = _whole(weights, names, specs)
    return Source(
        folder=checkpoint,
        config=config,
        tokenizer=read_text(checkpoint / "tokenizer.json"),
        golden=_read_golden(checkpoint / "golden.safetensors", config),
        provenance=provenance,
        sha256=sha256(weights),
        tensor=tensor,
        ternary=lambda name: ternarize(tensor(name)),
    )


def _whole(weights: Path, names: set[str], specs: Mapping[str, TensorSpec]) -> Reader:
    """Reads tensors of a checkpoint that holds all of them."""
    check_names(weights, names, specs)
    return lambda name: _read_weight(weights, name, specs[name])


def _adapted(weights: Path, names: set[str], specs: Mapping[str, TensorSpec], adapters: Adapters) -> Reader:
    """Reads tensors of a checkpoint with adapters: what was trained whole, otherwise the base's with its adapter."""
    import torch

    from bitvla.model.lora import merged

    base = _open_base(weights.parent, adapters)
    parts = {
        name: _parts(name, spec, adapters.rank)
        for name, spec in specs.items()
        if spec.kind in ("ternary", "matrix") and name not in names
    }
    check_names(weights, names, {*(names & specs.keys()), *(part for pair in parts.values() for part in pair)})
    check_names(weights, specs.keys() & (names | tensor_specs(base.config).keys()), specs)

    def tensor(name: str) -> NDArray[np.float32]:
        if name in names:
            return _read_weight(weights, name, specs[name])
        weight = to_float32(base.tensor(name))
        if name not in parts:
            return weight
        a, b = (torch.from_numpy(_read_weight(weights, part, spec)) for part, spec in parts[name].items())
        return merged(torch.from_numpy(weight), a, b, adapters.alpha / adapters.rank).numpy()

    return tensor


def _parts(name: str, spec: TensorSpec, rank: int) -> dict[str, TensorSpec]:
    """The two matrices of a weight's adapter."""
    (rows, columns), layer = spec.shape, name.removesuffix(".weight")
    return {
        f"{layer}.lora_A": TensorSpec("matrix", (rank, columns)),
        f"{layer}.lora_B": TensorSpec("matrix", (rows, rank)),
    }


def _open_base(checkpoint: Path, adapters: Adapters) -> Source:
    try:
        base = open_start(adapters.base)
    except BitvlaError as error:
        raise BitvlaError(
            f"{checkpoint} holds adapters, and what they adapt cannot be read: {error}. Put it back, or say in "
            "provenance.json where it is"
        ) from None
    if base.sha256 != adapters.sha256:
        raise BitvlaError(
            f"{checkpoint} holds adapters of another checkpoint than the one now at {adapters.base} (SHA-256 "
            f"{base.sha256[:12]}, not {adapters.sha256[:12]}); put the right one back, or say where it is in "
            "provenance.json"
        )
    return base


def read_config(checkpoint: Path) -> PolicyConfig | LanguageModelConfig:
    """The policy or the vision-language model of a training checkpoint."""
    origin = checkpoint / "config.json"
    if not origin.is_file():
        raise BitvlaError(f"{origin} is missing: {checkpoint} is not a training checkpoint, nor a published one")
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
