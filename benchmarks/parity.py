"""How far the packed policy is from the official arithmetic: hidden states layer by layer, int8 codes, actions.

    python benchmarks/parity.py --reduced                    # every layer small; seconds
    python benchmarks/parity.py --width                      # full width, two layers of each kind; a minute, 3 GB
    python benchmarks/parity.py --whole --folder runs/full   # the whole network; ten minutes, 3 GB

A checkpoint of random weights in the published layout is written, packed and run. Beside the packed policy, the
official network runs in PyTorch, a layer at a time: the blocks of `transformers`, whose linear layers multiply
dequantised activations by dequantised weights. It runs in float64, in float32, and in bfloat16 as the official code
does. `--folder` keeps `checkpoint/` and `policy.safetensors`, and uses them where they exist.

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
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.models.bitnet.modeling_bitnet import BitNetRMSNorm

from bitvla.bundle import read
from bitvla.config import LanguageConfig, PolicyConfig
from bitvla.convert.make_checkpoint import make_checkpoint
from bitvla.convert.pack import pack
from bitvla.display import as_json, progress, show
from bitvla.model.network import ActionHead, Connector, Decoder, ProprioProjector, VisionTower
from bitvla.processing.images import crop_resized, to_patches, to_pixels
from bitvla.processing.observation import check_observation
from bitvla.processing.prompt import Prompt
from bitvla.processing.vectors import normalize
from bitvla.runtime import network as runtime
from bitvla.runtime.policy import Policy

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from checkpoints import observation

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
        for part in ("action_head", "proprio_projector"):
            (path,) = folder.glob(f"{part}--*_checkpoint.pt")
            state = torch.load(path, weights_only=True)
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

    def __init__(self, config: PolicyConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self._fill = partial(checkpoint.fill, dtype=dtype)
        self._embedding = partial(checkpoint.tensor, "language_model.model.embed_tokens.weight")
        self.module = nn.Module()  # the one loaded last

    def patch_embedding(self) -> Apply:
        tower = VisionTower(msgspec.structs.replace(self.config.vision, num_layers=0))
        self.module = self._fill(tower, "vision_tower.")
        return lambda pixels: tower.vision_model.embeddings(pixels).flatten(0, 1)

    def vision_layer(self, index: int) -> Apply:
        vision = self.config.vision
        with META:
            (layer,) = VisionTower(msgspec.structs.replace(vision, num_layers=1)).vision_model.encoder.layers
        self.module = self._fill(layer, f"vision_tower.vision_model.encoder.layers.{index}.", ternary=True)
        views = (-1, vision.num_patches, vision.hidden_size)
        return lambda x: layer(x.reshape(views), attention_mask=None).flatten(0, 1)

    def connector(self) -> Apply:
        with META:
            connector = Connector(self.config.vision, self.config.language)
        self.module = self._fill(connector, "multi_modal_projector.")
        return connector

    def embed(self, ids: Tensor, is_image: Tensor, is_proprio: Tensor, state: Tensor) -> Apply:
        """Image features -> the decoder's input. Slots are zeros."""
        with META:
            projector = ProprioProjector(self.config.action, self.config.language)
        self.module = self._fill(projector, "proprio_projector.")
        text = self._embedding()[ids].to(self.dtype)
        text[-1 - self.config.action.num_slots : -1] = 0

        def apply(features: Tensor) -> Tensor:
            x = text.clone()
            x[is_image] = features
            x[is_proprio] = projector(state.to(self.dtype)[None])
            return x

        return apply

    def decoder_layer(self, index: int) -> Apply:
        with META:
            blocks = Decoder(msgspec.structs.replace(self.config.language, vocab_size=1, num_layers=1))
        (layer,) = blocks.model.layers
        self.module = self._fill(layer, f"language_model.model.layers.{index}.", ternary=True)

        def apply(x: Tensor) -> Tensor:
            everything = torch.zeros(1, 1, len(x), len(x), dtype=x.dtype)  # the mask of a bidirectional decoder
            table = rotary(self.config.language, len(x), x.dtype)
            return layer(x[None], attention_mask=everything, position_embeddings=table)[0]

        return apply

    def norm(self) -> Apply:
        with META:
            norm = BitNetRMSNorm(self.config.language.hidden_size, eps=self.config.language.rms_norm_eps)
        self.module = self._fill(norm, "language_model.model.norm.")
        return norm

    def head(self) -> Apply:
        with META:
            head = ActionHead(self.config.action, self.config.language)
        self.module = self._fill(head, "action_head.")
        return lambda answers: head(answers.reshape(self.config.action.horizon, -1))


# The packed policy.


def run_packed(policy: Policy, pixels: list[NDArray[np.float32]], state: NDArray[np.float32], instruction: str) -> Any:
    """Hidden states and int8 codes of the packed policy, by name, and the positions of its answers."""
    network, plan = policy.network, policy.plan(instruction)
    states: dict[str, Tensor] = {}
    blocks: dict[str, list[NDArray[np.int8]]] = {}
    names = {
        id(getattr(layer, field)): f"{part}.{index}.{field}"
        for part, layers in (("vision", network.vision_layers), ("decoder", network.decoder.layers))
        for index, layer in enumerate(layers, 1)
        for field in set(RECORDED) & set(layer._fields)
    }

    def ternary(x: runtime.Quantized, layer: runtime.Ternary, *rest: Any, **options: Any) -> None:
        if name := names.get(id(layer)):
            blocks.setdefault(name, []).append(x.codes[:, : layer.columns].copy())
        product(x, layer, *rest, **options)

    product = runtime._ternary
    network.record = lambda name, values: states.__setitem__(name, torch.from_numpy(values))
    with mock.patch.object(runtime, "_ternary", ternary):
        features = network.see(np.concatenate([to_patches(view, policy.config.vision.patch_size) for view in pixels]))
        states["actions"] = torch.from_numpy(network.act(network.think(plan, features, state)))
    return states, {name: torch.from_numpy(np.concatenate(parts)) for name, parts in blocks.items()}, plan.answers


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
def compare(checkpoint: Path, policy_file: Path) -> dict[str, Any]:
    """Both tables, the shares of flipped codes, and the mean difference of actions in normalised units."""
    policy = Policy(read(policy_file))
    config, processing = policy.config, policy.config.processing
    seen = check_observation(observation(config), config)
    state = normalize(seen.state, processing.state)
    pixels = [
        to_pixels(crop_resized(image, processing.image, config.vision.image_size), processing.image)
        for image in seen.images
    ]
    prompt = Prompt(config, Tokenizer.from_file(str(checkpoint / "tokenizer.json")))
    ids = torch.from_numpy(prompt.ids(seen.instruction))

    weights = Checkpoint(checkpoint)
    networks = {name: Official(config, weights, dtype) for name, dtype in DTYPES.items()}
    total = config.vision.num_layers + config.language.num_layers + 5
    with progress("comparing") as bar:
        packed = run_packed(policy, pixels, state, seen.instruction)
        done: list[str] = []

        def moved(name: str) -> None:
            done.append(name)
            bar(len(done), total, name)

        comparison = Comparison(networks, packed, moved)
        comparison.start(torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2)))
        comparison.advance("vision.0", Official.patch_embedding)
        for index in range(config.vision.num_layers):
            comparison.advance(f"vision.{index + 1}", partial(Official.vision_layer, index=index))
        comparison.advance("connector", Official.connector)
        places = (ids, ids == prompt.image_id, ids == prompt.proprio_id, torch.from_numpy(state))
        comparison.advance("decoder.0", lambda network: network.embed(*places))
        for index in range(config.language.num_layers):
            comparison.advance(
                f"decoder.{index + 1}",
                partial(Official.decoder_layer, index=index),
                answers_only=index == config.language.num_layers - 1,
            )
        comparison.advance("answers", Official.norm)
        comparison.advance("actions", Official.head)
    exact = comparison.inputs["through"]["float64"]
    chunks = {"packed": comparison.states["actions"]} | comparison.inputs["through"]
    return {
        "tokens": len(ids),
        "alone": comparison.rows["alone"],
        "through": comparison.rows["through"],
        "flipped alone": comparison.flips["alone"],
        "flipped through": comparison.flips["through"],
        "mean difference of actions": {
            name: float((chunk.double() - exact).abs().mean()) for name, chunk in chunks.items() if name != "float64"
        },
    }


def parity(folder: Path, *, reduced: bool = False, layers: int | None = None) -> dict[str, Any]:
    """Compare the random checkpoint and its packed file in `folder`; what is missing is made."""
    checkpoint, policy = folder / "checkpoint", folder / "policy.safetensors"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, reduced=reduced, layers=layers)
    if not policy.exists():
        pack(checkpoint, policy)
    return compare(checkpoint, policy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--reduced", action="store_true", help="the whole network, every layer small")
    size.add_argument("--width", action="store_true", help="full width, two layers of each kind")
    size.add_argument("--whole", action="store_true", help="the whole network of 3 billion parameters")
    parser.add_argument("--folder", type=Path, help="where checkpoint and policy are or will be kept")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        result = parity(folder, reduced=arguments.reduced, layers=2 if arguments.width else None)
    show(result)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(as_json(result))


if __name__ == "__main__":
    main()
