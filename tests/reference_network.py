"""The forward pass once more, in plain NumPy from the latent weights of a checkpoint: slow, and independent of the
runtime, of packing and of every kernel. Only the arithmetic of `bitvla.quantization` is shared.

Each layer is a function of its input, so that a test can hand it the runtime's own hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

from bitvla.config import FlowConfig, PolicyConfig, VisionConfig
from bitvla.quantization import ternary_linear

Floats = NDArray[np.float32]


class ReferenceNetwork:
    def __init__(self, config: PolicyConfig, weights: Mapping[str, Floats]) -> None:
        self.config, self.weights = config, weights

    def run(
        self, patches: Floats, ids: NDArray[np.int64], image_id: int, proprio_id: int, answers: slice, state: Floats
    ) -> dict[str, Floats]:
        """Every hidden state by the name the runtime records it under, and the normalised "actions"."""
        config, states = self.config, {}
        told = self.told(ids, image_id, proprio_id)
        states["vision.0"] = x = self.patch_embedding(patches)
        for index in range(config.vision.num_layers):
            states[f"vision.{index + 1}"] = x = self.vision_layer(index, x, told)
        states["connector"] = self.connector(x)
        states["decoder.0"] = x = self.embed(ids, image_id, proprio_id, states["connector"], state)
        for index in range(config.language.num_layers):
            states[f"decoder.{index + 1}"] = x = self.decoder_layer(index, x)
        states["answers"] = self.final_norm(x)[answers]
        states["actions"] = self.head(states["answers"])
        return states

    def patch_embedding(self, patches: Floats) -> Floats:
        prefix = "vision_tower.vision_model.embeddings."
        kernel = self.weights[f"{prefix}patch_embedding.weight"]
        x = patches @ kernel.reshape(len(kernel), -1).T + self.weights[f"{prefix}patch_embedding.bias"]
        return x + np.tile(self.weights[f"{prefix}position_embedding.weight"], (len(self.config.processing.cameras), 1))

    def told(self, ids: NDArray[np.int64], image_id: int, proprio_id: int) -> Floats:
        """What FiLM hears: the mean embedding of all tokens that are text."""
        slots = np.arange(len(ids)) - len(ids) + 1
        is_text = (ids != image_id) & (ids != proprio_id) & ((slots < -self.config.action.num_slots) | (slots == 0))
        return self.weights["language_model.model.embed_tokens.weight"][ids[is_text]].mean(0)

    def vision_layer(self, index: int, x: Floats, told: Floats | None = None) -> Floats:
        vision, film = self.config.vision, None
        if vision.film and told is not None:
            film = 1 + self.linear(f"film.{index}.scale", told), self.linear(f"film.{index}.shift", told)
        prefix = f"vision_tower.vision_model.encoder.layers.{index}."
        return self.encoder_layer(prefix, vision, x, vision.num_patches, film)

    def encoder_layer(
        self,
        prefix: str,
        config: VisionConfig | FlowConfig,
        x: Floats,
        length: int,
        film: tuple[Floats, Floats] | None = None,
    ) -> Floats:
        """A layer of SigLIP over sequences of `length` tokens."""
        h = self.layer_norm(f"{prefix}layer_norm1", x, config.layer_norm_eps)
        project = self.ternary if config.ternary else self.linear
        q, k, v = (project(f"{prefix}self_attn.{name}_proj", h) for name in "qkv")
        views = [np.arange(len(x)) // length == view for view in range(len(x) // length)]
        attended = np.concatenate([attention(q[i], k[i], v[i], config.num_heads, config.num_heads) for i in views])
        x = x + project(f"{prefix}self_attn.out_proj", attended)
        if film is not None:
            x = x * film[0] + film[1]
        h = project(f"{prefix}mlp.fc1", self.layer_norm(f"{prefix}layer_norm2", x, config.layer_norm_eps))
        return x + project(f"{prefix}mlp.fc2", gelu_tanh(h))

    def connector(self, x: Floats) -> Floats:
        return self.linear("multi_modal_projector.linear_2", gelu(self.linear("multi_modal_projector.linear_1", x)))

    def embed(self, ids: NDArray[np.int64], image_id: int, proprio_id: int, features: Floats, state: Floats) -> Floats:
        x = self.weights["language_model.model.embed_tokens.weight"][ids]
        x[ids == image_id] = features
        if self.config.action.bins:
            return x
        x[-1 - self.config.action.num_slots : -1] = 0
        x[ids == proprio_id] = self.linear("proprio_projector.fc2", gelu(self.linear("proprio_projector.fc1", state)))
        return x

    def decoder_layer(self, index: int, x: Floats, positions: NDArray[np.int64] | None = None) -> Floats:
        positions = np.arange(len(x)) if positions is None else positions
        prefix, language = f"language_model.model.layers.{index}.", self.config.language
        heads, kv_heads, eps = language.num_heads, language.num_kv_heads, language.rms_norm_eps
        h = self.rms_norm(f"{prefix}input_layernorm", x, eps)
        q, k, v = (self.ternary(f"{prefix}self_attn.{name}_proj", h) for name in "qkv")
        q, k = (rotate(*part, language.rope_theta, positions) for part in ((q, heads), (k, kv_heads)))
        attended = attention(q, k, v, heads, kv_heads, causal=not language.bidirectional)
        x = x + self.ternary(
            f"{prefix}self_attn.o_proj", self.rms_norm(f"{prefix}self_attn.attn_sub_norm", attended, eps)
        )
        h = self.rms_norm(f"{prefix}post_attention_layernorm", x, eps)
        gated = np.maximum(self.ternary(f"{prefix}mlp.gate_proj", h), 0) ** 2 * self.ternary(f"{prefix}mlp.up_proj", h)
        return x + self.ternary(f"{prefix}mlp.down_proj", self.rms_norm(f"{prefix}mlp.ffn_sub_norm", gated, eps))

    def final_norm(self, x: Floats) -> Floats:
        return self.rms_norm("language_model.model.norm", x, self.config.language.rms_norm_eps)

    def flow(self, flow: FlowConfig, answers: Floats) -> Floats:
        head, horizon, eps = "action_head.", self.config.action.horizon, flow.layer_norm_eps
        states = self.layer_norm(f"{head}condition_norm", answers.reshape(horizon, -1), eps)
        given = self.linear(f"{head}condition", states) + self.weights[f"{head}position_embedding"]
        chunk = self.weights[f"{head}noise"]
        for time in np.arange(flow.steps, dtype=np.float32) / flow.steps:
            angles = time * np.array(flow.frequencies)
            told = self.linear(f"{head}time_in", np.concatenate([np.sin(angles), np.cos(angles)]).astype(np.float32))
            x = given + self.linear(f"{head}action_in", chunk) + told
            for index in range(flow.num_layers):
                x = self.encoder_layer(f"{head}layers.{index}.", flow, x, horizon)
            chunk = chunk + self.linear(f"{head}action_out", self.layer_norm(f"{head}norm", x, eps)) / flow.steps
        return chunk

    def head(self, answers: Floats) -> Floats:
        if self.config.action.flow:
            return self.flow(self.config.action.flow, answers)
        prefix = "action_head.model."
        h = answers.reshape(self.config.action.horizon, -1)
        h = np.maximum(self.linear(f"{prefix}fc1", self.layer_norm(f"{prefix}layer_norm1", h, 1e-5)), 0)
        for index in range(self.config.action.head_blocks):
            block = f"{prefix}mlp_resnet_blocks.{index}.ffn."
            h = h + np.maximum(self.linear(f"{block}1", self.layer_norm(f"{block}0", h, 1e-5)), 0)
        return self.linear(f"{prefix}fc2", self.layer_norm(f"{prefix}layer_norm2", h, 1e-5))

    def token_logits(self, x: Floats, tokens: NDArray[np.int64]) -> Floats:
        """Logits (dim, bins) of an action's tokens after a prompt of embeddings (M, H), without a cache: before each,
        `tokens`, counted from the first that means a value, have been written."""
        first = self.config.language.vocab_size - self.config.action.bins
        written = self.weights["language_model.model.embed_tokens.weight"][first + tokens[:-1]]
        x = np.concatenate([x, written])
        for index in range(self.config.language.num_layers):
            x = self.decoder_layer(index, x)
        return self.final_norm(x)[-len(tokens) :] @ self.weights["language_model.lm_head.weight"].T

    def linear(self, name: str, x: Floats) -> Floats:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def ternary(self, name: str, x: Floats) -> Floats:
        return ternary_linear(x, self.weights[f"{name}.weight"]) + self.weights.get(f"{name}.bias", np.float32(0))

    def layer_norm(self, name: str, x: Floats, eps: float) -> Floats:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(eps))
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def rms_norm(self, name: str, x: Floats, eps: float) -> Floats:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + np.float32(eps)) * self.weights[f"{name}.weight"]


def attention(q: Floats, k: Floats, v: Floats, heads: int, kv_heads: int, causal: bool = False) -> Floats:
    """Softmax attention (M, heads * D); query i of M stands at the position keys - M + i."""
    size, queries, keys = q.shape[1] // heads, len(q), len(k)
    outputs = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        own, other = slice(head * size, (head + 1) * size), slice(shared * size, (shared + 1) * size)
        scores = q[:, own] @ k[:, other].T / np.float32(np.sqrt(size))
        if causal:
            scores[np.arange(keys) > np.arange(keys - queries, keys)[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        outputs.append(weights / weights.sum(-1, keepdims=True) @ v[:, other])
    return np.concatenate(outputs, axis=1)


def rotate(x: Floats, heads: int, theta: float, positions: NDArray[np.int64]) -> Floats:
    """Rotary embedding of (positions, heads * D): pairs (i, i + D / 2) turn by position * theta**(-2 i / D)."""
    size = x.shape[1] // heads
    angles = positions[:, None] * theta ** (-np.arange(0, size, 2) / size)
    cos, sin = np.cos(angles)[:, None].astype(np.float32), np.sin(angles)[:, None].astype(np.float32)
    first, second = np.split(x.reshape(len(x), heads, size), 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)


def gelu(x: Floats) -> Floats:
    return (0.5 * x * (1 + erf(x / np.sqrt(2.0)))).astype(np.float32)


def gelu_tanh(x: Floats) -> Floats:
    return (0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)))).astype(np.float32)
