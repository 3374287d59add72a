"""One call of a policy's network in int8 by PyTorch: what a good engineer gets from a general library.

    python benchmarks/peers_torch.py policy.safetensors --threads 2

Random weights in the policy's shapes, int8 weights and activations (`torch._int_mm`, products that share their input
joined), attention by `scaled_dot_product_attention`, everything else in float32, each kind of layer compiled by
`torch.compile`. Biases, rotary embedding and preprocessing are left out, in its favour. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm, scaled_dot_product_attention

from bitvla.bundle import read
from bitvla.config import LanguageConfig, PolicyConfig, VisionConfig


def weight(rows: int, columns: int) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8).T


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K) in float32, weight (K, N) in int8 -> (M, N); one scale a token."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    codes = (x / scale).round().clamp(-128, 127).to(torch.int8)
    return torch._int_mm(codes, weight) * (scale * 0.02)


def attention(joined: Tensor, views: int, heads: int, kv_heads: int, dim: int) -> Tensor:
    """Queries, keys and values side by side (views * L, (heads + 2 kv_heads) dim) -> (views * L, heads * dim)."""
    split = joined.view(views, -1, heads + 2 * kv_heads, dim).transpose(1, 2)
    q, k, v = split.split([heads, kv_heads, kv_heads], dim=1)
    out = scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads)
    return out.transpose(1, 2).reshape(len(joined), -1)


@torch.compile(dynamic=False)
def vision_layer(x: Tensor, qkv: Tensor, out: Tensor, fc1: Tensor, fc2: Tensor, views: int, heads: int) -> Tensor:
    width = x.shape[-1]
    seen = attention(linear(layer_norm(x, [width]), qkv), views, heads, heads, width // heads)
    x = x + linear(seen, out)
    return x + linear(gelu(linear(layer_norm(x, [width]), fc1), approximate="tanh"), fc2)


@torch.compile(dynamic=False)
def decoder_layer(
    x: Tensor, qkv: Tensor, out: Tensor, gate_up: Tensor, down: Tensor, heads: int, kv_heads: int, dim: int
) -> Tensor:
    seen = attention(linear(rms_norm(x, x.shape[-1:]), qkv), 1, heads, kv_heads, dim)
    x = x + linear(rms_norm(seen, seen.shape[-1:]), out)
    gate, up = linear(rms_norm(x, x.shape[-1:]), gate_up).chunk(2, dim=-1)
    inner = gate.relu().square() * up
    return x + linear(rms_norm(inner, inner.shape[-1:]), down)


class Network:
    """Vision tower, connector, decoder and action head of a policy."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        vision, language, action = config.vision, config.language, config.action
        width, hidden, head = vision.hidden_size, language.hidden_size, action.head_hidden_size
        self.vision = [self._vision_weights(vision) for _ in range(vision.num_layers)]
        self.connector = weight(hidden, width), weight(hidden, hidden)
        self.decoder = [self._decoder_weights(language) for _ in range(language.num_layers)]
        blocks = [weight(head, head) for _ in range(action.head_blocks)]
        self.head = [weight(head, action.slots_per_step * hidden), *blocks, weight(action.dim, head)]

    @staticmethod
    def _vision_weights(vision: VisionConfig) -> tuple[Tensor, ...]:
        width, inner = vision.hidden_size, vision.intermediate_size
        return weight(3 * width, width), weight(width, width), weight(inner, width), weight(width, inner)

    @staticmethod
    def _decoder_weights(language: LanguageConfig) -> tuple[Tensor, ...]:
        hidden, inner, keys = (
            language.hidden_size,
            language.intermediate_size,
            language.num_kv_heads * language.head_dim,
        )
        return (
            weight(hidden + 2 * keys, hidden),
            weight(hidden, hidden),
            weight(2 * inner, hidden),
            weight(hidden, inner),
        )

    def run(self, patches: Tensor, text: Tensor) -> Tensor:
        """Patch embeddings (views * P, width) and those of all other tokens (T, H) -> the chunk."""
        config, views = self.config, len(self.config.processing.cameras)
        language, action = config.language, config.action
        x = patches
        for weights in self.vision:
            x = vision_layer(x, *weights, views, config.vision.num_heads)
        images = linear(gelu(linear(x, self.connector[0])), self.connector[1])
        x = torch.cat([images, text])
        for weights in self.decoder:
            x = decoder_layer(x, *weights, language.num_heads, language.num_kv_heads, language.head_dim)
        x = x[-action.num_slots :].reshape(action.horizon, -1)
        for matrix in self.head:
            x = linear(x, matrix).relu()
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path, help="policy file of bitvla, whose shapes are taken")
    parser.add_argument("--length", type=int, default=630, help="tokens of the decoder, those of images included")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = read(arguments.policy).config
    seen = config.vision.num_patches * len(config.processing.cameras)
    with torch.inference_mode():
        network = Network(config)
        patches = torch.randn(seen, config.vision.hidden_size)
        text = torch.randn(arguments.length - seen, config.language.hidden_size)
        network.run(patches, text)  # compiles
        start = time.perf_counter()
        network.run(patches, text)
        print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
