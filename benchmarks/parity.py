"""How far the packed policy is from the official arithmetic: hidden states layer by layer, int8 codes, actions.

    python benchmarks/parity.py --reduced                    # every layer small; seconds
    python benchmarks/parity.py --width                      # full width, two layers of each kind; a minute, 3 GB
    python benchmarks/parity.py --whole --folder runs/full   # the whole network; ten minutes, 3 GB
    python benchmarks/parity.py --reduced --kind pretrained  # another of the published models

A checkpoint of random weights in the published layout is written, packed and run. Beside the packed policy, the
official network runs in PyTorch, a layer at a time: the blocks of `transformers`, whose linear layers multiply
dequantised activations by dequantised weights. It runs in float64, in float32, and in bfloat16 as the official code
does. A fine-tune ends in actions. Base models, which are causal, end in the logits of the token that follows their
prompt: an answer about an image, or the first token of an action. `--folder` keeps `checkpoint/` and
`policy.safetensors`, and uses them where they exist.

Two questions, two tables. "alone": every layer is given the packed policy's own input, so an error is that layer's.
"through": every network goes on from its own states, so errors add up. Two layers of each kind are the least, because
the last one of the decoder is computed at the answers only, whose inputs without a layer before it are all zero.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.models.bitnet.modeling_bitnet import BitNetRMSNorm

from bitvla import progress
from bitvla.bundle import LANGUAGE_HEAD, is_language_model, read, read_language_model
from bitvla.config import LanguageConfig, LanguageModelConfig, PolicyConfig, VisionConfig
from bitvla.convert.make_checkpoint import Kind, make_checkpoint
from bitvla.convert.pack import pack
from bitvla.display import as_json, show
from bitvla.model.network import ActionHead, Connector, Decoder, ProprioProjector, VisionTower
from bitvla.processing.images import crop_resized, to_patches, to_pixels
from bitvla.processing.observation import check_observation
from bitvla.processing.prompt import Prompt
from bitvla.processing.vectors import normalize
from bitvla.runtime import network as runtime
from bitvla.runtime.language import Conversation, LanguageModel
from bitvla.runtime.network import Network
from bitvla.runtime.policy import Policy

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from checkpoints import observation

KINDS: tuple[Kind, ...] = ("libero", "vision-language", "vision-language-bf16-tower", "pretrained")
QUESTION = "What is on the table?"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("alone", "through")
# One of the layers that share an input: their int8 codes are the same.
RECORDED = ("q_proj", "out_proj", "o_proj", "fc1", "fc2", "gate_proj", "down_proj")
META = torch.device("meta")  # modules without memory, until weights are assigned

Apply = Callable[[Tensor], Tensor]


# The official arithmetic.


class FakeQuantized(nn.Linear):
    """Ternary weights, already dequantised, times int8 activations, dequantised too. The last codes are kept."""

    codes: Tensor

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(at_least_float32(x.dtype))
        scale = 127 / wide.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        codes = (wide * scale).round().clamp(-128, 127)
        self.codes = codes.to(torch.int8)
        return nn.functional.linear((codes / scale).to(x.dtype), self.weight, self.bias)


class WideRMSNorm(BitNetRMSNorm):
    """That of transformers computes in float32, also where more is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(at_least_float32(x.dtype))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def fake_quantized(weight: Tensor) -> Tensor:
    """Ternary codes times their scale."""
    wide = weight.to(at_least_float32(weight.dtype))
    alpha = wide.abs().mean().clamp(min=1e-5)
    return ((wide * (1 / alpha)).round().clamp(-1, 1) * alpha).to(weight.dtype)


def rotary(language: LanguageConfig, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, length, head_dim), as official; in float64 the angles too are float64."""
    if dtype != torch.float64:
        blocks = Decoder(msgspec.structs.replace(language, vocab_size=1, num_layers=0))
        return blocks.rotary(torch.zeros(1, dtype=dtype), torch.arange(length)[None])
    powers = torch.arange(0, language.head_dim, 2, dtype=dtype) / language.head_dim
    angles = torch.arange(length, dtype=dtype)[:, None] * language.rope_theta**-powers
    angles = torch.cat([angles, angles], dim=-1)[None]
    return angles.cos(), angles.sin()


class Checkpoint:
    """Tensors of a folder in the published layout, read one by one."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        self._files = {name: folder / file for name, file in index.items()}
        self._beside: dict[str, Tensor] = {}
        for path in folder.glob("*--*_checkpoint.pt"):
            part, state = path.name.split("--")[0], torch.load(path, weights_only=True)
            self._beside |= {f"{part}.{name.removeprefix('module.')}": tensor for name, tensor in state.items()}

    def tensor(self, name: str) -> Tensor:
        if name in self._beside:
            return self._beside[name]
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, *, ternary: bool = False) -> nn.Module:
        """Give `module` the weights below `prefix`, and where asked the official quantisation."""
        state = {name: self.tensor(prefix + name).to(dtype) for name in module.state_dict()}
        for name, child in module.named_modules():
            if isinstance(child, BitNetRMSNorm):
                child.__class__ = WideRMSNorm
            elif ternary and isinstance(child, nn.Linear):
                child.__class__ = FakeQuantized
                state[f"{name}.weight"] = fake_quantized(state[f"{name}.weight"])
        module.load_state_dict(state, assign=True)
        if attention := getattr(module, "self_attn", None):
            # Eager is the official one; its softmax is float32, also where more is asked for.
            attention.config._attn_implementation = "sdpa" if dtype == torch.float64 else "eager"
        return module


class Official:
    """The official network in one dtype; every method loads a part of it and returns that as a function of rows."""

    def __init__(self, config: PolicyConfig | LanguageModelConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        assert config.vision is not None
        self.vision, self.language, self.dtype = config.vision, config.language, dtype
        self.action = config.action if isinstance(config, PolicyConfig) else None
        self._fill = partial(checkpoint.fill, dtype=dtype)
        self._embedding = partial(checkpoint.tensor, "language_model.model.embed_tokens.weight")
        self._head = partial(checkpoint.tensor, LANGUAGE_HEAD)
        self.module = nn.Module()  # the one loaded last

    def patch_embedding(self) -> Apply:
        tower = VisionTower(msgspec.structs.replace(self.vision, num_layers=0))
        self.module = self._fill(tower, "vision_tower.")
        return lambda pixels: tower.vision_model.embeddings(pixels).flatten(0, 1)

    def vision_layer(self, index: int) -> Apply:
        vision = self.vision
        with META:
            (layer,) = VisionTower(msgspec.structs.replace(vision, num_layers=1)).vision_model.encoder.layers
        prefix = f"vision_tower.vision_model.encoder.layers.{index}."
        self.module = self._fill(layer, prefix, ternary=vision.ternary)
        views = (-1, vision.num_patches, vision.hidden_size)
        return lambda x: layer(x.reshape(views)).flatten(0, 1)

    def connector(self) -> Apply:
        with META:
            connector = Connector(self.vision, self.language)
        self.module = self._fill(connector, "multi_modal_projector.")
        return connector

    def embed(self, ids: Tensor, is_image: Tensor, is_proprio: Tensor, state: Tensor) -> Apply:
        """Image features -> the decoder's input. Slots are zeros."""
        text = self._embedding()[ids].to(self.dtype)
        if self.action and self.action.num_slots:
            with META:
                projector = ProprioProjector(self.action, self.language)
            self.module = self._fill(projector, "proprio_projector.")
            text[-1 - self.action.num_slots : -1] = 0
            text[is_proprio] = projector(state.to(self.dtype)[None])

        def apply(features: Tensor) -> Tensor:
            x = text.clone()
            x[is_image] = features
            return x

        return apply

    def decoder_layer(self, index: int) -> Apply:
        with META:
            blocks = Decoder(msgspec.structs.replace(self.language, vocab_size=1, num_layers=1))
        (layer,) = blocks.model.layers
        self.module = self._fill(layer, f"language_model.model.layers.{index}.", ternary=True)

        def apply(x: Tensor) -> Tensor:
            mask = torch.zeros(1, 1, len(x), len(x), dtype=x.dtype)
            if not self.language.bidirectional:
                mask += torch.full_like(mask, torch.finfo(x.dtype).min).triu(1)
            table = rotary(self.language, len(x), x.dtype)
            return layer(x[None], attention_mask=mask, position_embeddings=table)[0]

        return apply

    def norm(self) -> Apply:
        with META:
            norm = BitNetRMSNorm(self.language.hidden_size, eps=self.language.rms_norm_eps)
        self.module = self._fill(norm, "language_model.model.norm.")
        return norm

    def action_head(self) -> Apply:
        action = self.action
        assert action is not None
        with META:
            head = ActionHead(action, self.language)
        self.module = self._fill(head, "action_head.")
        return lambda answers: head(answers.reshape(action.horizon, -1))

    def language_head(self) -> Apply:
        rows = self._head()[-self.action.bins if self.action else None :].to(self.dtype)
        return lambda answers: answers @ rows.T


# The packed file.


class Subject(NamedTuple):
    """What is compared: what a packed file is given, and where its answers are; `run` makes it answer.

    `pixels` are those of each image (size, size, 3), `ids` the tokens of the whole sequence. `run` is given the
    recorder of hidden states, and returns the last ones by their name.
    """

    config: PolicyConfig | LanguageModelConfig
    parts: LanguageModel | Network
    pixels: list[NDArray[np.float32]]
    ids: NDArray[np.int64]
    image_id: int
    proprio_id: int
    state: NDArray[np.float32]
    answers: slice
    run: Callable[[runtime.Record], Mapping[str, NDArray[np.float32]]]


def policy_subject(policy: Policy, tokenizer: Tokenizer) -> Subject:
    config, processing = policy.config, policy.config.processing
    seen = check_observation(observation(config), config)
    state = normalize(seen.state, processing.state)
    pixels = [
        to_pixels(crop_resized(image, processing.image, config.vision.image_size), processing.image)
        for image in seen.images
    ]
    prompt, plan, network = Prompt(config, tokenizer), policy.plan(seen.instruction), policy.network

    def run(record: runtime.Record) -> Mapping[str, NDArray[np.float32]]:
        network.record = record
        actions = network.act(
            network.think([plan], network.see(patches_of(pixels, config.vision), [plan]), state[None])
        )[0]
        return {} if config.action.bins else {"actions": actions}

    ids = prompt.ids(seen.instruction)
    return Subject(config, network, pixels, ids, prompt.image_id, prompt.proprio_id, state, plan.answers, run)


def model_subject(model: LanguageModel) -> Subject:
    config, vision, tower = model.config, model.config.vision, model.vision
    assert vision is not None
    assert tower is not None
    assert config.image is not None
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    pixels = [to_pixels(crop_resized(image, config.image, vision.image_size), config.image)]
    conversation = Conversation(model)
    list(conversation.say(QUESTION, images=[image], max_tokens=1))
    ids = np.array(conversation.ids[:-1])
    answers = slice(len(ids) - 1, len(ids))

    def run(record: runtime.Record) -> Mapping[str, NDArray[np.float32]]:
        x = model.decoder.embedding_rows(ids)
        x[ids == model.chat.image_id] = tower.see(patches_of(pixels, vision), record)
        span = runtime.Span(len(ids), answers, runtime.Cache(config.language, len(ids)))
        state = model.decoder.run(x, [span], record)
        logits = np.empty((1, config.language.vocab_size), np.float32)
        model.head.apply(state, logits)
        return {"logits.0": logits}

    return Subject(config, model, pixels, ids, model.chat.image_id, -1, np.zeros(0, np.float32), answers, run)


def patches_of(pixels: list[NDArray[np.float32]], vision: VisionConfig) -> NDArray[np.float32]:
    return np.concatenate([to_patches(view, vision.patch_size) for view in pixels])


def run_packed(subject: Subject) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Hidden states and int8 codes of the packed file, by name."""
    states: dict[str, NDArray[Any]] = {}
    blocks: dict[str, list[NDArray[np.int8]]] = {}
    tower = subject.parts.vision
    assert tower is not None
    names = {
        id(getattr(layer, field)): f"{part}.{index}.{field}"
        for part, layers in (("vision", tower.layers), ("decoder", subject.parts.decoder.layers))
        for index, layer in enumerate(layers, 1)
        for field in set(RECORDED) & set(layer._fields)
    }

    def ternary(x: runtime.Quantized, layer: runtime.Ternary, *rest: Any, **options: Any) -> None:
        if name := names.get(id(layer)):
            blocks.setdefault(name, []).append(x.codes[:, : layer.columns].copy())
        product(x, layer, *rest, **options)

    def record(name: str, values: NDArray[Any]) -> None:
        states.setdefault(name, values)

    product = runtime._ternary
    with mock.patch.object(runtime, "_ternary", ternary):
        states |= subject.run(record)
    # Tokens that are written after the prompt pass the same layers; only the prompt is compared.
    codes = {name: np.concatenate(parts)[: _tokens(name, subject)] for name, parts in blocks.items()}
    return (
        {name: torch.from_numpy(values) for name, values in states.items()},
        {name: torch.from_numpy(values) for name, values in codes.items()},
    )


def _tokens(name: str, subject: Subject) -> int | None:
    """Rows of a decoder layer's input that belong to the prompt."""
    part, index, field = name.split(".")
    last = int(index) == subject.config.language.num_layers
    if part == "vision":
        return None
    answers = subject.answers.stop - subject.answers.start
    return answers if last and field not in ("k_proj", "v_proj") else len(subject.ids)


# Side by side.


class Comparison:
    """Advances the official networks layer by layer and compares each state with the packed policy's."""

    def __init__(self, networks: Mapping[str, Official], packed: Any, moved: Callable[[str], None]) -> None:
        self.networks, self.moved = networks, moved
        self.states, self.codes, self.answers = packed
        self.rows: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
        self.flips: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
        self.inputs: dict[str, dict[str, Tensor]] = {}

    def start(self, inputs: Tensor) -> None:
        self.inputs = {mode: {name: inputs.to(dtype) for name, dtype in DTYPES.items()} for mode in MODES}

    def advance(self, state: str, part: Callable[[Official], Apply], *, answers_only: bool = False) -> None:
        """Apply a part to each network's state, which becomes the one called `state`."""
        outputs: dict[str, dict[str, Tensor]] = {mode: {} for mode in MODES}
        codes: dict[str, dict[str, dict[str, Tensor]]] = {mode: {} for mode in MODES}
        for name, network in self.networks.items():
            apply = part(network)
            for mode in MODES:
                output = apply(self.inputs[mode][name])
                outputs[mode][name] = output[self.answers] if answers_only else output
                codes[mode][name] = {
                    f"{state}.{field}": module.codes.flatten(0, -2)
                    for field, module in ((n.split(".")[-1], m) for n, m in network.module.named_modules())
                    if isinstance(module, FakeQuantized) and field in RECORDED
                }
        for mode in MODES:
            self.rows[mode].append({"state": state} | self._errors(outputs[mode], self.states[state]))
            if codes[mode]["float64"]:
                self.flips[mode].append({"layer": state} | self._flips(codes[mode]))
        self.inputs = {
            "alone": {name: self.states[state].to(dtype) for name, dtype in DTYPES.items()},
            "through": outputs["through"],
        }
        self.moved(state)

    def _errors(self, official: Mapping[str, Tensor], packed: Tensor) -> dict[str, Any]:
        exact = official["float64"]
        errors = {"packed": relative(packed, exact)}
        errors |= {name: relative(official[name], exact) for name in ("float32", "bfloat16")}
        return errors | {
            "closest": min(errors, key=errors.__getitem__),
            "packed, median token": relative(packed, exact, dim=-1),
            "packed to float32": relative(packed, official["float32"]),
            "packed to bfloat16": relative(packed, official["bfloat16"]),
        }

    def _flips(self, official: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Share of the int8 codes that are not those of float64."""
        everything = {"packed": {name: self.codes[name] for name in official["float64"]}} | dict(official)

        def codes(of: str) -> Tensor:
            # Where the packed policy computes its answers only, only they count.
            parts = (
                part if len(part) == len(self.codes[name]) else part[self.answers]
                for name, part in everything[of].items()
            )
            return torch.cat([part.flatten() for part in parts])

        exact = codes("float64")
        return {of: (codes(of) != exact).double().mean().item() for of in ("packed", "float32", "bfloat16")}


def relative(values: Tensor, exact: Tensor, dim: int | None = None) -> float:
    """|values - exact| / |exact|, with Euclidean norms over the whole state, or the median of those along `dim`."""
    exact = exact.double()
    return float(((values.double() - exact).norm(dim=dim) / exact.norm(dim=dim).clamp(min=1e-30)).median())


@torch.inference_mode()
def compare(checkpoint: Path, packed_file: Path) -> dict[str, Any]:
    """Both tables, the shares of flipped codes, and the mean difference of what comes out last."""
    if is_language_model(packed_file):
        subject = model_subject(LanguageModel(read_language_model(packed_file)))
    else:
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        subject = policy_subject(Policy(read(packed_file)), tokenizer)
    config, ids = subject.config, torch.from_numpy(subject.ids)
    assert config.vision is not None
    layers = config.language.num_layers
    total = config.vision.num_layers + layers + 5
    by_actions = isinstance(config, PolicyConfig) and not config.action.bins

    weights = Checkpoint(checkpoint)
    networks = {name: Official(config, weights, dtype) for name, dtype in DTYPES.items()}
    with progress.bar("comparing") as bar:
        packed = run_packed(subject)
        done: list[str] = []

        def moved(name: str) -> None:
            done.append(name)
            bar(len(done), total, name)

        comparison = Comparison(networks, (*packed, subject.answers), moved)
        comparison.start(torch.from_numpy(np.stack(subject.pixels).transpose(0, 3, 1, 2)))
        comparison.advance("vision.0", Official.patch_embedding)
        for index in range(config.vision.num_layers):
            comparison.advance(f"vision.{index + 1}", partial(Official.vision_layer, index=index))
        comparison.advance("connector", Official.connector)
        places = (ids, ids == subject.image_id, ids == subject.proprio_id, torch.from_numpy(subject.state))
        comparison.advance("decoder.0", lambda network: network.embed(*places))
        for index in range(layers):
            part = partial(Official.decoder_layer, index=index)
            comparison.advance(f"decoder.{index + 1}", part, answers_only=index == layers - 1)
        comparison.advance("answers", Official.norm)
        last = "actions" if by_actions else "logits.0"
        comparison.advance(last, Official.action_head if by_actions else Official.language_head)
    exact = comparison.inputs["through"]["float64"]
    outputs = {"packed": comparison.states[last]} | comparison.inputs["through"]
    result = {
        "tokens": len(ids),
        "alone": comparison.rows["alone"],
        "through": comparison.rows["through"],
        "flipped alone": comparison.flips["alone"],
        "flipped through": comparison.flips["through"],
        f"mean difference of {last}": {
            name: float((output.double() - exact).abs().mean()) for name, output in outputs.items() if name != "float64"
        },
    }
    if not by_actions:
        result["likeliest token"] = {name: int(output.argmax()) for name, output in outputs.items()}
    return result


def parity(folder: Path, *, kind: Kind = "libero", reduced: bool = False, layers: int | None = None) -> dict[str, Any]:
    """Compare the random checkpoint and its packed file in `folder`; what is missing is made."""
    checkpoint, policy = folder / "checkpoint", folder / "policy.safetensors"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, kind=kind, reduced=reduced, layers=layers)
    if not policy.exists():
        pack(checkpoint, policy, control_hz=5 if kind == "pretrained" else None)
    return compare(checkpoint, policy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--reduced", action="store_true", help="the whole network, every layer small")
    size.add_argument("--width", action="store_true", help="full width, two layers of each kind")
    size.add_argument("--whole", action="store_true", help="the whole network of 3 billion parameters")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="of checkpoint (default: a fine-tune)")
    parser.add_argument("--folder", type=Path, help="where checkpoint and policy are or will be kept")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        layers = 2 if arguments.width else None
        result = parity(folder, kind=arguments.kind, reduced=arguments.reduced, layers=layers)
    show(result)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(as_json(result))


if __name__ == "__main__":
    main()
