"""Model files of other engines, in the shapes of a policy of bitvla and with random weights: what `peers.py` measures.

    pip install gguf
    python benchmarks/peers_files.py policy.safetensors runs/peers

Writes the decoder alone as llama.cpp (TQ2_0, TQ1_0) and bitnet.cpp (I2_S) read it, architecture `bitnet`, its
vocabulary cut down to 256 tokens so that the language head costs nothing; and the whole policy as vla.cpp reads it on a
CPU, in bfloat16. Weights are ternary; layers of the same shape get the same ones, which no engine can notice.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from bitvla.bundle import read
from bitvla.config import LanguageConfig, PolicyConfig

VOCABULARY = 256
SCALE = 0.02  # of the ternary weights: keeps activations finite through all layers
I2_S = 36  # bitnet.cpp's own type, unknown to the package
FORMATS = ("TQ2_0", "TQ1_0", "I2_S")

Array = np.ndarray[Any, Any]


def write(path: Path, architecture: str, fill: Callable[[GGUFWriter], None]) -> None:
    """A GGUF file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    writer = GGUFWriter(temporary, architecture)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB")


class Weights:
    """Random ternary matrices (rows, columns) in one format, one for each shape: writers only refer to them."""

    def __init__(self, kind: str) -> None:
        self._kind, self._random = kind, np.random.default_rng(0)
        self._made: dict[tuple[int, int], dict[str, Any]] = {}

    def __call__(self, rows: int, columns: int) -> dict[str, Any]:
        """Arguments of `GGUFWriter.add_tensor`."""
        if (rows, columns) not in self._made:
            self._made[rows, columns] = self._make(rows, columns)
        return self._made[rows, columns]

    def _make(self, rows: int, columns: int) -> dict[str, Any]:
        if self._kind == "BF16":
            values = bfloat16(np.array([-SCALE, 0, SCALE], np.float32))
            some = values[self._random.integers(0, 3, (min(rows, 8192), columns), np.uint8)]
            return {"tensor": np.resize(some, (rows, columns)), "raw_dtype": GGMLQuantizationType.BF16}
        if self._kind == "I2_S":  # the scale follows the matrix
            scale = np.zeros(8, np.float32)
            scale[0] = SCALE
            packed = np.concatenate([self._fours(rows * columns // 4), scale.view(np.uint8)])
            return {"tensor": packed.view(np.int8), "raw_shape": (rows, columns), "raw_dtype": I2_S}
        # Blocks of 256 weights, each with its scale behind it.
        blocks = rows * columns // 256
        codes = self._random.bytes(52 * blocks) if self._kind == "TQ1_0" else self._fours(64 * blocks)
        scales = np.full((blocks, 1), SCALE, np.float16).view(np.uint8)
        packed = np.hstack([np.frombuffer(codes, np.uint8).reshape(blocks, -1), scales]).reshape(rows, -1)
        return {"tensor": packed, "raw_dtype": GGMLQuantizationType[self._kind]}

    def _fours(self, count: int) -> Array:
        """Random bytes, each of four codes from 0 to 2. In base 3, as TQ1_0 has them, any byte is valid."""
        first, second, third, fourth = np.indices((3, 3, 3, 3)).reshape(4, -1)
        valid = (first << 6 | second << 4 | third << 2 | fourth).astype(np.uint8)
        return valid[self._random.integers(0, len(valid), count, np.uint8)]


def bfloat16(values: Array) -> Array:
    """float32 -> the upper halves of their bits, uint16."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def add_language_model(writer: GGUFWriter, config: LanguageConfig, kind: str) -> None:
    hidden, inner, keys = config.hidden_size, config.intermediate_size, config.num_kv_heads * config.head_dim
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    weights, ones = Weights(kind), np.ones(max(hidden, inner), np.float32)
    embedding = np.random.default_rng(1).standard_normal((VOCABULARY, hidden)).astype(np.float16)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", ones[:hidden])
    for layer in range(config.num_layers):
        prefix = f"blk.{layer}."
        for name, rows, columns in [
            ("attn_q", hidden, hidden),
            ("attn_k", keys, hidden),
            ("attn_v", keys, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ]:
            writer.add_tensor(f"{prefix}{name}.weight", **weights(rows, columns))
        for name, size in [
            ("attn_norm", hidden),
            ("attn_sub_norm", hidden),
            ("ffn_norm", hidden),
            ("ffn_sub_norm", inner),
        ]:
            writer.add_tensor(f"{prefix}{name}.weight", ones[:size])


def add_policy(writer: GGUFWriter, config: PolicyConfig) -> None:
    """Names and sizes as vla.cpp's loader asks for them."""
    vision, language, action = config.vision, config.language, config.action
    hidden, inner, keys = language.hidden_size, language.intermediate_size, language.num_kv_heads * language.head_dim
    width, patch = vision.hidden_size, 3 * vision.patch_size**2
    for name, size in {
        "vit.hidden": width,
        "vit.layers": vision.num_layers,
        "vit.heads": vision.num_heads,
        "vit.head_dim": width // vision.num_heads,
        "vit.inter": vision.intermediate_size,
        "vit.image_size": vision.image_size,
        "vit.patch_size": vision.patch_size,
        "vit.n_patches": vision.num_patches,
        "lm.hidden": hidden,
        "lm.layers": language.num_layers,
        "lm.q_heads": language.num_heads,
        "lm.kv_heads": language.num_kv_heads,
        "lm.head_dim": language.head_dim,
        "lm.inter": inner,
        "lm.max_pos": language.max_positions,
        "lm.vocab_size": language.vocab_size,
        "action.num_actions_chunk": action.horizon,
        "action.action_dim": action.dim,
        "action.proprio_dim": action.state_dim,
    }.items():
        writer.add_uint32(f"bitvla.{name}", size)
    weights = Weights("BF16")

    def matrix(name: str, rows: int, columns: int, bias: bool = True) -> None:
        writer.add_tensor(f"{name}.weight", **weights(rows, columns))
        if bias:
            writer.add_tensor(f"{name}.bias", np.zeros(rows, np.float32))

    def norm(name: str, size: int, bias: bool = True) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))
        if bias:
            writer.add_tensor(f"{name}.bias", np.zeros(size, np.float32))

    matrix("vit.patch_embd", width, patch)
    matrix("vit.pos_embd", vision.num_patches, width, bias=False)
    for layer in range(vision.num_layers):
        prefix = f"vit.blk.{layer}."
        norm(f"{prefix}ln1", width)
        norm(f"{prefix}ln2", width)
        for name in "qkvo":
            matrix(f"{prefix}attn_{name}", width, width)
        matrix(f"{prefix}fc1", vision.intermediate_size, width)
        matrix(f"{prefix}fc2", width, vision.intermediate_size)
    matrix("mm.linear_1", hidden, width)
    matrix("mm.linear_2", hidden, hidden)
    matrix("aex.proprio.fc1", hidden, action.state_dim)
    matrix("aex.proprio.fc2", hidden, hidden)
    matrix("token_embd", language.vocab_size, hidden, bias=False)
    norm("lm.output_norm", hidden, bias=False)
    for layer in range(language.num_layers):
        prefix = f"lm.blk.{layer}."
        norm(f"{prefix}attn_norm", hidden, bias=False)
        norm(f"{prefix}attn_sub_norm", hidden, bias=False)
        norm(f"{prefix}ffn_norm", hidden, bias=False)
        norm(f"{prefix}ffn_sub_norm", inner, bias=False)
        matrix(f"{prefix}attn_q", hidden, hidden, bias=False)
        matrix(f"{prefix}attn_k", keys, hidden, bias=False)
        matrix(f"{prefix}attn_v", keys, hidden, bias=False)
        matrix(f"{prefix}attn_o", hidden, hidden, bias=False)
        matrix(f"{prefix}ffn_gate", inner, hidden, bias=False)
        matrix(f"{prefix}ffn_up", inner, hidden, bias=False)
        matrix(f"{prefix}ffn_down", hidden, inner, bias=False)
    state, head = action.slots_per_step * hidden, action.head_hidden_size
    norm("aex.head.ln1", state)
    matrix("aex.head.fc1", head, state)
    for block in range(action.head_blocks):
        norm(f"aex.head.blk.{block}.ln", head)
        matrix(f"aex.head.blk.{block}.fc", head, head)
    norm("aex.head.ln2", head)
    matrix("aex.head.fc2", action.dim, head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path, help="policy file of bitvla, whose shapes are taken")
    parser.add_argument("folder", type=Path, help="where the files go (full size: 7.4 GB)")
    parser.add_argument("--only", nargs="+", choices=[*FORMATS, "BF16"], default=[*FORMATS, "BF16"], metavar="FORMAT")
    arguments = parser.parse_args()
    config = read(arguments.policy).config
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for kind in [kind for kind in FORMATS if kind in arguments.only]:
        path = arguments.folder / f"language-{kind}.gguf"
        write(path, "bitnet", partial(add_language_model, config=config.language, kind=kind))
    if "BF16" in arguments.only:
        write(arguments.folder / "policy-BF16.gguf", "bitvla", partial(add_policy, config=config))


if __name__ == "__main__":
    main()
