"""Training checkpoints, a folder with everything that `pack` needs: the network from one, and one from the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from bitvla.bundle import EMBEDDING, LANGUAGE_HEAD, to_float32
from bitvla.config import LanguageModelConfig, PolicyConfig, to_dict
from bitvla.convert.source import Source
from bitvla.errors import BitvlaError
from bitvla.files import put
from bitvla.model.lora import checkpoint_name, trained_state
from bitvla.model.network import Backbone, BitVLA, VisionLanguageModel
from bitvla.processing.prompt import Chat, Prompt
from bitvla.runtime.policy import parse_tokenizer


def load_network(start: Source, config: PolicyConfig | None = None) -> tuple[BitVLA, Prompt]:
    """The network of an open checkpoint, filled one tensor after the other, and its prompt builder.

    `config`, by default the checkpoint's, may have another `precision`, a larger `max_prefix`, or other actions; what
    the checkpoint does not have, as projectors and heads, begins at random.
    """
    policy = config or start.config
    if not isinstance(policy, PolicyConfig):
        raise BitvlaError(f"{start.folder} is a base model, which does not act; finetune a policy from it")
    prompt = Prompt(policy, tokenizer_of(start))
    network = BitVLA(policy, prompt.image_id, prompt.proprio_id)
    fill(network, start)
    return network, prompt


def load_language_network(start: Source, config: LanguageModelConfig | None = None) -> tuple[VisionLanguageModel, Chat]:
    """The vision-language model of an open checkpoint, in another precision if `config` says so, and its chat."""
    model = config or start.config
    if not isinstance(model, LanguageModelConfig):
        raise BitvlaError(f"{start.folder} is a policy, not a vision-language model")
    chat = Chat(model, tokenizer_of(start))
    network = VisionLanguageModel(model, chat.image_id)
    fill(network, start)
    return network, chat


def tokenizer_of(start: Source) -> Tokenizer:
    """The tokenizer of an open checkpoint, which neither shortens nor fills texts, as on the robot."""
    try:
        return parse_tokenizer(start.tokenizer)
    except BitvlaError as error:
        raise BitvlaError(f"{start.folder}: {error}") from None


def fill(network: Backbone, start: Source, part: str = "") -> None:
    """Put the weights of an open checkpoint into `network`: those whose names begin with `part` and that both have.

    Tokens that the checkpoint does not know, as those of actions, begin as the mean of those that it does.
    """
    stored, known, rows = start.specs, start.config.language.vocab_size, network.config.language.vocab_size
    for name, value in network.state_dict().items():
        if name in stored and name.startswith(part):
            values = torch.from_numpy(to_float32(start.tensor(name)))
            if name in (EMBEDDING, LANGUAGE_HEAD) and len(values) == known < rows:
                values = torch.cat([values, values.mean(dim=0).expand(rows - known, -1)])
            if name == LANGUAGE_HEAD:  # a base model's is over all words; action tokens are the last ones
                values = values[-len(value) :]
            if values.shape != value.shape:
                raise BitvlaError(f"{start.folder}: tensor {name} is {[*values.shape]}, it must be {[*value.shape]}")
            value.copy_(values)


def save_checkpoint(
    out: Path,
    network: BitVLA | VisionLanguageModel,
    tokenizer: Tokenizer,
    golden: tuple[dict[str, torch.Tensor], list[str]] | None,
    provenance: dict[str, Any],
) -> None:
    """Write everything that `pack` needs. Each file is whole or absent; the weights come last.

    `golden` is of policies alone.
    """
    out.mkdir(parents=True, exist_ok=True)
    _write_text(out / "config.json", json.dumps(to_dict(network.config), indent=1))
    _write_text(out / "tokenizer.json", tokenizer.to_str())
    _write_text(out / "provenance.json", json.dumps(provenance, indent=1))
    if golden is not None:
        tensors, instructions = golden
        _write_tensors(out / "golden.safetensors", tensors, {"instructions": json.dumps(instructions)})
    trained = {checkpoint_name(name): value.detach().float() for name, value in trained_state(network).items()}
    _write_tensors(out / "model.safetensors", trained, None)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    put(temporary, path)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    put(temporary, path)


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
