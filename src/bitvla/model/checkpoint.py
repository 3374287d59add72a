"""Training checkpoints: a folder with everything that `pack` needs."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from bitvla.config import ActionConfig, FlowConfig, PolicyConfig, check, from_dict, to_dict
from bitvla.errors import BitvlaError
from bitvla.model.network import BitVLA
from bitvla.processing.prompt import Prompt


def load_config(checkpoint: Path) -> PolicyConfig:
    """The policy configuration of a checkpoint folder."""
    path = checkpoint / "config.json"
    stored = _read_json(path)
    if isinstance(stored, dict) and "model_type" in stored:
        raise BitvlaError(f"{checkpoint} is a published checkpoint; `bitvla pack` reads it, training does not")
    return check(from_dict(PolicyConfig, stored, str(path)))


def load_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder."""
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        raise BitvlaError(f"{checkpoint} has no tokenizer.json: it is not a training checkpoint of bitvla")
    return Tokenizer.from_file(str(path))


def load_network(checkpoint: Path, config: PolicyConfig | None = None) -> tuple[BitVLA, Prompt]:
    """The network of a checkpoint and its prompt builder.

    With another `precision`, a larger `max_prefix`, or another action head if `config` says so; projectors and a head
    that the checkpoint does not have begin at random.
    """
    config = config or load_config(checkpoint)
    prompt = Prompt(config, load_tokenizer(checkpoint))
    network = BitVLA(config, prompt.image_id, prompt.proprio_id)
    weights = checkpoint / "model.safetensors"
    if not weights.is_file():
        raise BitvlaError(f"{checkpoint} has no model.safetensors: the training run has not saved a checkpoint yet")
    stored, action = load_file(weights), load_config(checkpoint).action
    absent: tuple[str, ...] = () if action.max_prefix else ("prefix_projector.",)
    if action.bins and not config.action.bins:
        del stored["language_model.lm_head.weight"]
        absent += ("proprio_projector.", "action_head.")
    elif _flow_sizes(action) != _flow_sizes(config.action):
        stored = {name: value for name, value in stored.items() if not name.startswith("action_head.")}
        absent += ("action_head.",)
    stored = {name: value for name, value in network.state_dict().items() if name.startswith(absent)} | stored
    missing, unexpected = network.load_state_dict(stored, strict=False)
    if missing or unexpected:
        raise BitvlaError(
            f"{weights} does not fit its configuration: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    return network, prompt


def _flow_sizes(action: ActionConfig) -> FlowConfig | None:
    """The flow without what may change and keep its weights: how many steps it takes, and in which precision."""
    return action.flow and msgspec.structs.replace(action.flow, steps=1, ternary=False)


def save_policy(
    out: Path,
    network: BitVLA,
    tokenizer: Tokenizer,
    golden: tuple[dict[str, torch.Tensor], list[str]],
    provenance: dict[str, Any],
) -> None:
    """Write everything that `pack` needs. Each file is whole or absent; the weights come last."""
    out.mkdir(parents=True, exist_ok=True)
    _write_text(out / "config.json", json.dumps(to_dict(network.config), indent=1))
    _write_text(out / "tokenizer.json", tokenizer.to_str())
    _write_text(out / "provenance.json", json.dumps(provenance, indent=1))
    tensors, instructions = golden
    _write_tensors(out / "golden.safetensors", tensors, {"instructions": json.dumps(instructions)})
    _write_tensors(out / "model.safetensors", {k: v.detach().float() for k, v in network.state_dict().items()}, None)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise BitvlaError(f"{path} is missing: {path.parent} is not a training checkpoint of bitvla") from None
    except (OSError, ValueError) as error:
        raise BitvlaError(f"{path} cannot be read: {error}") from None


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def golden_tensors(
    observations: list[dict[str, Any]], chunks: list[np.ndarray[Any, np.dtype[np.float32]]]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Raw observations and the chunks that the network answered, in the layout that `pack` reads."""
    tensors: dict[str, torch.Tensor] = {}
    for i, (observation, chunk) in enumerate(zip(observations, chunks, strict=True)):
        for camera, image in observation["images"].items():
            tensors[f"{i}.image.{camera}"] = torch.from_numpy(np.array(image))
        if "state" in observation:
            tensors[f"{i}.state"] = torch.from_numpy(np.asarray(observation["state"], dtype=np.float32))
        tensors[f"{i}.chunk"] = torch.from_numpy(chunk)
    return tensors, [str(observation["instruction"]) for observation in observations]
