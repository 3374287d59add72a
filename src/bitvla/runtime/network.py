"""The BitVLA network on the native kernels, without PyTorch. Its twin for training is `bitvla.model.network`.

Every ternary layer takes activations that the step before it has already quantised: norms and activation functions
write int8 codes directly, and layers with the same input share them. Whatever goes token by token takes the tokens of
several observations together; only attention keeps them apart, so that each comes out as if it were alone, bit for bit.
Buffers are made once for the longest batch and used again, so a call in steady state allocates nothing large. M rows
(tokens), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import bitvla._native as native
from bitvla.bundle import LANGUAGE_HEAD, Bundle
from bitvla.config import ActionConfig, FlowConfig, LanguageConfig, PolicyConfig, VisionConfig
from bitvla.errors import BitvlaError, memory_for
from bitvla.processing.prompt import Prompt
from bitvla.processing.vectors import token_values
from bitvla.quantization import Packing, code_columns
from bitvla.runtime.pruning import most_different

Floats = NDArray[np.float32]
Record = Callable[[str, NDArray[Any]], None]  # sees hidden states by name

# Tokens that pass the feed-forward part of a layer together: its two wide buffers are the largest of all. Unpacking the
# weights anew for every block costs less than 2 %.
FEED_FORWARD_BLOCK = 192
TILE = 16  # width of the kernels' vectors
HEAD_EPSILON = 1e-5  # of the action head's norms: PyTorch's default, which BitVLA uses


class Ternary(NamedTuple):
    """A packed linear layer from `columns` to `rows` values."""

    packed: NDArray[np.uint8]
    packing: Packing
    rows: int
    columns: int
    scale: float
    bias: Floats | None


class Norm(NamedTuple):
    """A LayerNorm."""

    weight: Floats
    bias: Floats


class Linear(NamedTuple):
    """A full-precision linear layer: weights (rows, columns) float32, bfloat16, or int8 with a scale for each row."""

    weight: NDArray[Any]
    bias: Floats | None
    scales: Floats | None

    def apply(self, x: Floats, out: Floats, *, accumulate: bool = False) -> None:
        """out (M, rows) = x (M, columns) @ weight.T + bias, or added to `out`"""
        native.linear(x, self.weight, self.bias, out, accumulate=accumulate, row_scales=self.scales)


class Quantized(NamedTuple):
    """Activations: codes int8 (M, code_columns(K)); a scale float32 (M,) and a sum of codes int32 (M,) a token."""

    codes: NDArray[np.int8]
    scales: Floats
    sums: NDArray[np.int32]

    def rows(self, rows: slice) -> Quantized:
        return Quantized(self.codes[rows], self.scales[rows], self.sums[rows])


class EncoderLayer(NamedTuple):
    """A layer of SigLIP. Its projections are all ternary, or all in full precision."""

    layer_norm1: Norm
    q_proj: Ternary | Linear
    k_proj: Ternary | Linear
    v_proj: Ternary | Linear
    out_proj: Ternary | Linear
    layer_norm2: Norm
    fc1: Ternary | Linear
    fc2: Ternary | Linear


class DecoderLayer(NamedTuple):
    input_layernorm: Floats
    q_proj: Ternary
    k_proj: Ternary
    v_proj: Ternary
    attn_sub_norm: Floats
    o_proj: Ternary
    post_attention_layernorm: Floats
    gate_proj: Ternary
    up_proj: Ternary
    ffn_sub_norm: Floats
    down_proj: Ternary


class Plan(NamedTuple):
    """Where everything stands in the token sequence of one instruction."""

    length: int
    text_positions: NDArray[np.int64]
    text: Floats  # the embeddings of the tokens at `text_positions`
    image_positions: NDArray[np.int64]
    proprio_positions: NDArray[np.int64]
    slots: slice  # the action slots, which start as zeros
    answers: slice  # the positions whose final states the action head reads
    fixed: int  # so many first tokens are the same for every instruction and every image
    film: Floats  # what the instruction makes of the vision tower; see `VisionTower.film_of`
    rotary_positions: NDArray[np.int64] | None = None  # where tokens were left out: where each one stood before

    def keeping(self, stays: NDArray[np.bool_]) -> Plan:
        """The plan of those tokens (length,) alone that stay; slots and answers do."""
        place, left_out = np.cumsum(stays) - 1, int(np.count_nonzero(~stays))

        def moved(positions: NDArray[np.int64]) -> NDArray[np.int64]:
            return place[positions[stays[positions]]]

        return self._replace(
            length=self.length - left_out,
            text_positions=moved(self.text_positions),
            text=self.text[stays[self.text_positions]],
            image_positions=moved(self.image_positions),
            proprio_positions=moved(self.proprio_positions),
            slots=slice(self.slots.start - left_out, self.slots.stop - left_out),
            answers=slice(self.answers.start - left_out, self.answers.stop - left_out),
            fixed=int(np.count_nonzero(stays[: self.fixed])),
            rotary_positions=np.flatnonzero(stays),
        )


class Workspace:
    """Named scratch buffers, each as large as its largest use so far; a name given twice is the same memory."""

    def __init__(self) -> None:
        self._flat: dict[str, NDArray[Any]] = {}
        self._views: dict[tuple[str, int, int], NDArray[Any]] = {}

    def floats(self, name: str, rows: int, columns: int) -> Floats:
        return self._view(name, rows, columns, np.float32)

    def quantized(self, rows: int, columns: int) -> Quantized:
        return Quantized(
            self._view("codes", rows, code_columns(columns), np.int8),
            self._view("scales", rows, 1, np.float32)[:, 0],
            self._view("sums", rows, 1, np.int32)[:, 0],
        )

    def _view(self, name: str, rows: int, columns: int, dtype: Any) -> NDArray[Any]:
        view = self._views.get((name, rows, columns))
        if view is None:
            flat = self._flat.get(name)
            if flat is None or flat.size < rows * columns:
                size = rows * columns * np.dtype(dtype).itemsize
                with memory_for(f"the buffer '{name}'", size):
                    flat = self._flat[name] = np.zeros(rows * columns, dtype)
                self._views = {key: old for key, old in self._views.items() if key[0] != name}
            view = self._views[name, rows, columns] = flat[: rows * columns].reshape(rows, columns)
        return view

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self._flat.values())


class Cache:
    """The keys and values that a causal decoder has computed for `length` of at most `capacity` tokens."""

    def __init__(self, language: LanguageConfig, capacity: int) -> None:
        layers, heads, head_dim = language.num_layers, language.num_kv_heads, language.head_dim
        with memory_for(f"the keys and values of {capacity} tokens", 8 * layers * capacity * heads * head_dim):
            # As attention reads them: packing all of them again for every token took longer than attention itself.
            self.keys = np.zeros((layers, heads * _tiles(capacity), head_dim * TILE), np.float32)
            self.values = np.zeros((layers, heads * capacity, _tiles(head_dim) * TILE), np.float32)
        self.capacity, self.length = capacity, 0
        self._language = language

    def grown(self, capacity: int) -> Cache:
        """A copy with room for `capacity` tokens, or this one where it has that already."""
        if capacity <= self.capacity:
            return self
        grown = Cache(self._language, capacity)
        for mine, copy, used in zip(self.by_head(), grown.by_head(), (_tiles(self.length), self.length), strict=True):
            copy[:, :, :used] = mine[:, :, :used]
        grown.length = self.length
        return grown

    def by_head(self) -> tuple[Floats, Floats]:
        """Views: keys (layers, heads, tiles of TILE, TILE * head_dim), values (layers, heads, capacity, head_dim)."""
        layers, heads = self._language.num_layers, self._language.num_kv_heads
        keys, values = self.keys, self.values
        return keys.reshape(layers, heads, -1, keys.shape[-1]), values.reshape(layers, heads, -1, values.shape[-1])


class Span(NamedTuple):
    """A sequence in a batch: `length` tokens, whose final states at `answers` are wanted.

    With a cache the tokens follow those in it, and join them. `positions` (length,) are theirs in the rotary embedding,
    where they do not simply follow each other.
    """

    length: int
    answers: slice
    cache: Cache | None = None
    positions: NDArray[np.int64] | None = None


class Decoder:
    """The BitNet decoder of policies and of language models: hidden states in, hidden states out."""

    def __init__(self, language: LanguageConfig, bundle: Bundle[Any], workspace: Workspace) -> None:
        self.language, self.workspace = language, workspace
        tensors = bundle.tensors
        ternary = partial(_stored_ternary, bundle)
        hidden, key_size = language.hidden_size, language.num_kv_heads * language.head_dim
        inner = language.intermediate_size
        self.embedding_rows = partial(bundle.rows, "language_model.model.embed_tokens.weight")
        self.layers = [
            DecoderLayer(
                input_layernorm=tensors[f"{layer}input_layernorm.weight"],
                q_proj=ternary(f"{layer}self_attn.q_proj", hidden, hidden),
                k_proj=ternary(f"{layer}self_attn.k_proj", key_size, hidden),
                v_proj=ternary(f"{layer}self_attn.v_proj", key_size, hidden),
                attn_sub_norm=tensors[f"{layer}self_attn.attn_sub_norm.weight"],
                o_proj=ternary(f"{layer}self_attn.o_proj", hidden, hidden),
                post_attention_layernorm=tensors[f"{layer}post_attention_layernorm.weight"],
                gate_proj=ternary(f"{layer}mlp.gate_proj", inner, hidden),
                up_proj=ternary(f"{layer}mlp.up_proj", inner, hidden),
                ffn_sub_norm=tensors[f"{layer}mlp.ffn_sub_norm.weight"],
                down_proj=ternary(f"{layer}mlp.down_proj", hidden, inner),
            )
            for layer in (f"language_model.model.layers.{index}." for index in range(language.num_layers))
        ]
        self.norm: Floats = tensors["language_model.model.norm.weight"]
        self.cos, self.sin = rotary_table(language.max_positions, language.head_dim, language.rope_theta)

    def run(self, x: Floats, spans: Sequence[Span], record: Record | None = None) -> Floats:
        """Embeddings (M, H) of all spans, one after the other, which are used up -> final hidden states (answers, H) of
        those that are answers."""
        language, eps = self.language, self.language.rms_norm_eps
        q = self.workspace.floats("q", len(x), language.hidden_size)
        k, v = (self.workspace.floats(name, len(x), language.num_kv_heads * language.head_dim) for name in ("k", "v"))
        narrow = self.workspace.quantized(len(x), language.hidden_size)

        if record:
            record("decoder.0", x.copy())
        asked = [slice(0, span.length) for span in spans]
        for index, layer in enumerate(self.layers):
            native.rms_norm_quantize(x, layer.input_layernorm, eps, *narrow)
            _ternary(narrow, layer.k_proj, k)
            _ternary(narrow, layer.v_proj, v)
            if layer is self.layers[-1]:  # from here on only the answers are needed
                asked = [span.answers for span in spans]
                x, *codes = (_answers_first(part, spans) for part in (x, *narrow))
                q, narrow = q[: len(x)], Quantized(*codes)
            _ternary(narrow, layer.q_proj, q)
            self._attend(index, q, k, v, spans, asked)
            native.rms_norm_quantize(q, layer.attn_sub_norm, eps, *narrow)
            _ternary(narrow, layer.o_proj, x, accumulate=True)
            for block in range(0, len(x), FEED_FORWARD_BLOCK):
                self._feed_forward(x[block : block + FEED_FORWARD_BLOCK], layer)
            if record:
                record(f"decoder.{index + 1}", x.copy())
        for span in spans:
            if span.cache:
                span.cache.length += span.length
        out = self.workspace.floats("answers", len(x), language.hidden_size)
        native.rms_norm(x, self.norm, eps, out)
        if record:
            record("answers", out.copy())
        return out

    def _attend(
        self, layer: int, q: Floats, k: Floats, v: Floats, spans: Sequence[Span], asked: Sequence[slice]
    ) -> None:
        """Attention of each span to itself and what its cache holds; q, of the tokens `asked`, become the answers."""
        language, query, key = self.language, 0, 0
        for span, rows in zip(spans, asked, strict=True):
            queries = q[query : query + rows.stop - rows.start]
            keys, values = k[key : key + span.length], v[key : key + span.length]
            packed: int | None = None
            start = span.cache.length if span.cache else 0
            at = slice(start, start + span.length) if span.positions is None else span.positions
            cos, sin = self.cos[at], self.sin[at]
            native.rope(keys, cos, sin, 0, language.num_kv_heads)
            native.rope(queries, cos, sin, rows.start, language.num_heads)
            # A causal query is the last that its keys serve.
            seen = start + (span.length if language.bidirectional else rows.stop)
            if span.cache:
                past = span.cache.keys[layer], span.cache.values[layer]
                native.append(keys, values, start, language.num_kv_heads, *past)
                keys, values, packed = *past, seen
            else:
                keys, values = keys[:seen], values[:seen]
            native.attention(  # in place: every block of queries is copied before its answers are written
                queries, keys, values, language.num_heads, language.num_kv_heads, language.head_dim**-0.5,
                not language.bidirectional, queries, packed=packed,
            )  # fmt: skip
            query, key = query + len(queries), key + span.length

    def _feed_forward(self, x: Floats, layer: DecoderLayer) -> None:
        """Add the feed-forward part of a decoder layer to a block of tokens (M, H)."""
        language, tokens = self.language, len(x)
        eps, inner = language.rms_norm_eps, language.intermediate_size
        gate, up = (self.workspace.floats(name, tokens, inner) for name in ("gate", "up"))
        narrow = self.workspace.quantized(tokens, language.hidden_size)
        native.rms_norm_quantize(x, layer.post_attention_layernorm, eps, *narrow)
        _ternary(narrow, layer.gate_proj, gate)
        _ternary(narrow, layer.up_proj, up)
        wide = self.workspace.quantized(tokens, inner)  # over the narrow codes, which are used up
        native.relu2_gate_norm_quantize(gate, up, layer.ffn_sub_norm, eps, *wide)
        _ternary(wide, layer.down_proj, x, accumulate=True)


class Encoder:
    """Transformer layers of SigLIP, ternary or in full precision, whose tensors' names begin with `name`."""

    def __init__(self, config: VisionConfig | FlowConfig, name: str, bundle: Bundle[Any], workspace: Workspace) -> None:
        self.config, self.workspace = config, workspace
        tensors = bundle.tensors
        norm = partial(_stored_norm, tensors)
        width, inner = config.hidden_size, config.intermediate_size

        def projection(name: str, rows: int, columns: int) -> Ternary | Linear:
            return _stored_ternary(bundle, name, rows, columns) if config.ternary else stored_linear(tensors, name)

        self.layers = [
            EncoderLayer(
                layer_norm1=norm(f"{layer}layer_norm1"),
                q_proj=projection(f"{layer}self_attn.q_proj", width, width),
                k_proj=projection(f"{layer}self_attn.k_proj", width, width),
                v_proj=projection(f"{layer}self_attn.v_proj", width, width),
                out_proj=projection(f"{layer}self_attn.out_proj", width, width),
                layer_norm2=norm(f"{layer}layer_norm2"),
                fc1=projection(f"{layer}mlp.fc1", inner, width),
                fc2=projection(f"{layer}mlp.fc2", width, inner),
            )
            for layer in (f"{name}{index}." for index in range(config.num_layers))
        ]

    def run(
        self, x: Floats, sequences: Sequence[slice], record: Record | None = None, films: Sequence[Floats] = ()
    ) -> None:
        """Pass hidden states (M, H) through all layers, in place. Tokens see those of their own sequence.

        `films` are what FiLM multiplies by and adds in each layer (layers, 2, 1, H), each for an equal share of tokens.
        """
        heads, size = self.config.num_heads, self.config.hidden_size
        scale = (size // heads) ** -0.5
        q, k, v = (self.workspace.floats(name, len(x), size) for name in ("q", "k", "v"))
        for index, layer in enumerate(self.layers):
            normed = self._normed(x, layer.layer_norm1)
            for projection, out in ((layer.q_proj, q), (layer.k_proj, k), (layer.v_proj, v)):
                _project(normed, projection, out)
            for own in sequences:
                native.attention(q[own], k[own], v[own], heads, heads, scale, False, q[own])
            _project(self._quantized(q), layer.out_proj, x, accumulate=True)
            for share, film in enumerate(films):
                seen = x[share * len(x) // len(films) : (share + 1) * len(x) // len(films)]
                seen *= film[index, 0]
                seen += film[index, 1]
            for start in range(0, len(x), FEED_FORWARD_BLOCK):
                self._feed_forward(x[start : start + FEED_FORWARD_BLOCK], layer)
            if record:
                record(f"vision.{index + 1}", x.copy())

    def _feed_forward(self, x: Floats, layer: EncoderLayer) -> None:
        """Add the feed-forward part of a layer to a block of tokens (M, H)."""
        up = self.workspace.floats("up", len(x), self.config.intermediate_size)
        _project(self._normed(x, layer.layer_norm2), layer.fc1, up)
        _project(self._gelu(up), layer.fc2, x, accumulate=True)

    # What a projection takes: int8 codes, always in the same buffer, or in full precision the values themselves.

    def _normed(self, x: Floats, norm: Norm) -> Quantized | Floats:
        eps = self.config.layer_norm_eps
        if self.config.ternary:
            codes = self.workspace.quantized(*x.shape)
            native.layer_norm_quantize(x, norm.weight, norm.bias, eps, *codes)
            return codes
        normed = self.workspace.floats("normed", *x.shape)
        native.layer_norm(x, norm.weight, norm.bias, eps, normed)
        return normed

    def _quantized(self, x: Floats) -> Quantized | Floats:
        if not self.config.ternary:
            return x
        codes = self.workspace.quantized(*x.shape)
        native.quantize(x, *codes)
        return codes

    def _gelu(self, x: Floats) -> Quantized | Floats:
        if self.config.ternary:
            codes = self.workspace.quantized(*x.shape)
            native.gelu_quantize(x, True, *codes)
            return codes
        native.gelu(x, True, x)
        return x


class VisionTower(Encoder):
    """SigLIP and the connector: patches in, image tokens of the decoder out."""

    def __init__(self, vision: VisionConfig, bundle: Bundle[Any], workspace: Workspace) -> None:
        tensors, tower = bundle.tensors, "vision_tower.vision_model."
        super().__init__(vision, f"{tower}encoder.layers.", bundle, workspace)
        self.patch_embedding = stored_linear(tensors, f"{tower}embeddings.patch_embedding")
        self.position_embedding: Floats = tensors[f"{tower}embeddings.position_embedding.weight"]
        self.film = [
            tuple(stored_linear(tensors, f"film.{index}.{name}") for name in ("scale", "shift"))
            for index in range(vision.num_layers if vision.film else 0)
        ]
        self.connector = [stored_linear(tensors, f"multi_modal_projector.linear_{index}") for index in (1, 2)]

    def film_of(self, text: Floats) -> Floats:
        """The embeddings of an instruction's text (T, language H) -> what FiLM multiplies by and adds in each layer
        (layers, 2, 1, H); without FiLM in no layer."""
        film = np.empty((len(self.film), 2, 1, self.config.hidden_size), np.float32)
        told = text.mean(axis=0, keepdims=True)
        for projections, values in zip(self.film, film, strict=True):
            for projection, out in zip(projections, values, strict=True):
                projection.apply(told, out)
        film[:, 0] += 1
        return film

    def see(self, patches: Floats, record: Record | None = None, films: Sequence[Floats] = ()) -> Floats:
        """Patches of all images (images * P, 3 * patch**2) -> image tokens (images * P, language H).

        `films`, where the tower has FiLM: for each observation that of its instruction; all have as many images.
        """
        size, tokens = len(self.position_embedding), len(patches)
        x = self.workspace.floats("x", tokens, self.config.hidden_size)
        views = [slice(start, start + size) for start in range(0, tokens, size)]
        self.patch_embedding.apply(patches, x)
        for view in views:
            x[view] += self.position_embedding
        if record:
            record("vision.0", x.copy())
        self.run(x, views, record, films if self.film else ())
        # A buffer that is free until the first decoder layer.
        features = _gelu_mlp(x, self.connector, self.workspace, "up")
        if record:
            record("connector", features.copy())
        return features


class ActionHead:
    """The regression head: from the states of the action slots to a chunk of actions."""

    def __init__(self, action: ActionConfig, bundle: Bundle[Any], workspace: Workspace) -> None:
        self.action, self.workspace = action, workspace
        linear, norm = partial(stored_linear, bundle.tensors), partial(_stored_norm, bundle.tensors)
        head = "action_head.model."
        self.norms = [norm(f"{head}layer_norm{index}") for index in (1, 2)]
        self.layers = [linear(f"{head}fc{index}") for index in (1, 2)]
        self.blocks = [
            (norm(f"{head}mlp_resnet_blocks.{index}.ffn.0"), linear(f"{head}mlp_resnet_blocks.{index}.ffn.1"))
            for index in range(action.head_blocks)
        ]

    def act(self, answers: Floats) -> Floats:
        """Final hidden states (N * slots, H) -> normalised actions (N, horizon, dim), a new array."""
        action, width = self.action, self.action.head_hidden_size
        x = answers.reshape(-1, action.slots_per_step * answers.shape[1])
        steps = len(x)
        first = self.workspace.floats("head.first", *x.shape)
        h, normed, change = (
            self.workspace.floats(name, steps, width) for name in ("head.h", "head.normed", "head.change")
        )
        native.layer_norm(x, *self.norms[0], HEAD_EPSILON, first)
        self.layers[0].apply(first, h)
        native.relu(h, h)
        for norm, layer in self.blocks:
            native.layer_norm(h, *norm, HEAD_EPSILON, normed)
            layer.apply(normed, change)
            native.relu(change, change)
            h += change
        native.layer_norm(h, *self.norms[1], HEAD_EPSILON, normed)
        actions = np.empty((steps, action.dim), dtype=np.float32)
        self.layers[1].apply(normed, actions)
        return actions.reshape(-1, action.horizon, action.dim)


class FlowHead(Encoder):
    """The flow-matching head: noise, in steps of Euler's method, to a chunk of actions."""

    def __init__(self, action: ActionConfig, flow: FlowConfig, bundle: Bundle[Any], workspace: Workspace) -> None:
        tensors, head = bundle.tensors, "action_head."
        super().__init__(flow, f"{head}layers.", bundle, workspace)
        self.action, self.flow = action, flow
        linear, norm = partial(stored_linear, tensors), partial(_stored_norm, tensors)
        self.noise: Floats = tensors[f"{head}noise"]
        self.position_embedding: Floats = tensors[f"{head}position_embedding"]
        self.condition_norm, self.norm = norm(f"{head}condition_norm"), norm(f"{head}norm")
        self.condition, self.action_in = linear(f"{head}condition"), linear(f"{head}action_in")
        self.time_in, self.action_out = linear(f"{head}time_in"), linear(f"{head}action_out")
        # The times of all steps and of actions that are decided. Sines as of `rotary_table`: in float64, rounded once.
        times = np.array([*(step / flow.steps for step in range(flow.steps)), 1], np.float32)
        angles = times[:, None].astype(np.float64) * flow.frequencies
        self.waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)

    def act(self, answers: Floats, prefixes: Sequence[Floats] | None = None) -> Floats:
        """Final hidden states (N * slots, H) -> normalised actions (N, horizon, dim), a new array.

        The chunk of an observation begins with its prefix.
        """
        action, width, eps = self.action, self.flow.hidden_size, self.flow.layer_norm_eps
        states = answers.reshape(-1, action.slots_per_step * answers.shape[1])
        rows = len(states)
        first = self.workspace.floats("head.first", *states.shape)
        given, x, normed = (
            self.workspace.floats(name, rows, width) for name in ("head.given", "head.h", "head.normed")
        )
        times = self.workspace.floats("head.times", *self.waves.shape)
        velocity = self.workspace.floats("head.velocity", rows, action.dim)
        native.layer_norm(states, *self.condition_norm, eps, first)
        self.condition.apply(first, given)
        given += np.tile(self.position_embedding, (rows // action.horizon, 1))
        self.time_in.apply(self.waves, times)

        chunks = np.tile(self.noise, (rows // action.horizon, 1))
        decided = np.zeros((rows, 1), np.bool_)
        sequences = [slice(start, start + action.horizon) for start in range(0, rows, action.horizon)]
        for sequence, prefix in zip(sequences, prefixes or (), strict=False):
            chunks[sequence][: len(prefix)] = prefix
            decided[sequence][: len(prefix)] = True
        for step in range(self.flow.steps):
            np.add(given, np.where(decided, times[-1], times[step]), out=x)
            self.action_in.apply(chunks, x, accumulate=True)
            self.run(x, sequences)
            native.layer_norm(x, *self.norm, eps, normed)
            self.action_out.apply(normed, velocity)
            chunks += np.where(decided, 0, velocity / np.float32(self.flow.steps))
        return chunks.reshape(-1, action.horizon, action.dim)


class ActionTokens:
    """Writes an action as tokens, a dimension after the other: each is the likeliest of those that mean a value."""

    def __init__(self, action: ActionConfig, bundle: Bundle[Any], decoder: Decoder) -> None:
        self.action, self.decoder = action, decoder
        self.rows = stored_linear(bundle.tensors, LANGUAGE_HEAD.removesuffix(".weight"))
        self._caches: list[Cache] = []

    def unread(self, prompts: Sequence[Plan]) -> tuple[list[Plan], list[Cache]]:
        """What of each prompt is to be read, and the cache of what stands before it, with room for an action too.

        No token of a causal decoder sees what follows, so a cache keeps what every prompt of this policy begins with.
        """
        self._caches += [Cache(self.decoder.language, 0) for _ in prompts[len(self._caches) :]]
        rest = []
        for index, prompt in enumerate(prompts):
            cache = self._caches[index]
            cache.length = min(cache.length, prompt.fixed)
            self._caches[index] = cache.grown(prompt.length + self.action.dim)
            rest.append(prompt.keeping(np.arange(prompt.length) >= cache.length))
        return rest, self._caches[: len(prompts)]

    def act(self, states: Floats, record: Record | None = None) -> Floats:
        """States (N, H) that the first token of each prompt follows -> normalised actions (N, 1, dim), a new array."""
        action, count = self.action, len(states)
        first_id = self.decoder.language.vocab_size - action.bins
        logits = self.decoder.workspace.floats("logits", count, action.bins)
        tokens = np.empty((count, action.dim), np.int64)
        spans = [Span(1, slice(0, 1), cache) for cache in self._caches[:count]]
        for index in range(action.dim):
            if index:
                states = self.decoder.run(self.decoder.embedding_rows(first_id + tokens[:, index - 1]), spans)
            self.rows.apply(states, logits)
            np.argmax(logits, axis=1, out=tokens[:, index])
            if record:
                record(f"logits.{index}", logits.copy())
        return token_values(tokens, action.bins)[:, None]


class Network:
    """From patches, plans and normalised states of N observations to normalised actions.

    `prune` is the share of each image's tokens that the decoder does without. `record`, when set, sees hidden states.
    """

    def __init__(self, bundle: Bundle[PolicyConfig], prune: float = 0.0) -> None:
        config = bundle.config
        if not 0 <= prune < 1:
            raise BitvlaError(f"prune is {prune}; give the share of image tokens to leave out, from 0 to below 1")
        if prune and config.action.bins:
            raise BitvlaError("prune is for policies with an action head; this one writes its actions as tokens")
        self.config = config
        self.pruned = int(prune * config.vision.num_patches)  # tokens of each image
        self.workspace = Workspace()
        self.record: Record | None = None
        self.vision = VisionTower(config.vision, bundle, self.workspace)
        self.decoder = Decoder(config.language, bundle, self.workspace)
        self.head: ActionHead | FlowHead | ActionTokens
        self.proprio_projector = None
        if config.action.bins:
            self.head = ActionTokens(config.action, bundle, self.decoder)
        else:
            flow = config.action.flow
            self.head = (
                FlowHead(config.action, flow, bundle, self.workspace)
                if flow
                else ActionHead(config.action, bundle, self.workspace)
            )
            self.proprio_projector = [stored_linear(bundle.tensors, f"proprio_projector.fc{index}") for index in (1, 2)]
        self.prefix_projector = stored_linear(bundle.tensors, "prefix_projector") if config.action.max_prefix else None

    @property
    def parts(self) -> list[Encoder | Decoder | Linear]:
        """One of each thing that uses kernels of its own."""
        head: list[Encoder | Linear]
        if isinstance(self.head, FlowHead):
            head = [self.head, self.head.condition]
        else:
            head = [self.head.rows if isinstance(self.head, ActionTokens) else self.head.layers[0]]
        return [self.vision, self.decoder, *head, *(scale for scale, _ in self.vision.film[:1])]

    def plan(self, prompt: Prompt, instruction: str) -> Plan:
        """The plan for `instruction`; BitvlaError where the instruction is unusable or the sequence too long."""
        ids = prompt.ids(instruction)
        length, most, action = len(ids), self.config.language.max_positions, self.config.action
        needed = length + (action.dim if action.bins else 0)
        if needed > most:
            raise BitvlaError(f"the sequence has {needed} tokens, the policy was built for {most}; shorten it")
        slots, images = prompt.slots(length), np.flatnonzero(ids == prompt.image_id)
        is_text = (ids != prompt.image_id) & (ids != prompt.proprio_id)
        is_text[slots] = False
        positions = np.flatnonzero(is_text)
        text = self.decoder.embedding_rows(ids[positions])
        return Plan(
            length=length,
            text_positions=positions,
            text=text,
            image_positions=images,
            proprio_positions=np.flatnonzero(ids == prompt.proprio_id),
            slots=slots,
            answers=prompt.slot_states(length),
            fixed=int(images[0]) if prompt.begins_alike else 0,
            film=self.vision.film_of(text),
        )

    def see(self, patches: Floats, plans: Sequence[Plan]) -> Floats:
        """Patches of all cameras (N * cameras * P, 3 * patch**2) -> image tokens (N * cameras * P, language H)."""
        return self.vision.see(patches, self.record, [plan.film for plan in plans])

    def think(
        self, plans: Sequence[Plan], features: Floats, states: Floats, prefixes: Sequence[Floats] | None = None
    ) -> Floats:
        """Image tokens, normalised states (N, state_dim), and for each observation the normalised actions (n, dim) that
        are decided already -> final hidden states at the answers (N * slots, H)."""
        images: Sequence[Floats] = list(features.reshape(len(plans), -1, features.shape[1]))
        caches: Sequence[Cache | None] = [None] * len(plans)
        if isinstance(self.head, ActionTokens):
            plans, caches = self.head.unread(plans)
        elif self.pruned:
            plans, images = zip(*map(self._prune, plans, images), strict=True)
        x = self._embed(plans, images, states, prefixes)
        spans = [
            Span(plan.length, plan.answers, cache, plan.rotary_positions)
            for plan, cache in zip(plans, caches, strict=True)
        ]
        return self.decoder.run(x, spans, self.record)

    def act(self, answers: Floats, prefixes: Sequence[Floats] | None = None) -> Floats:
        """What `think` gave, and the prefixes it was given -> normalised actions (N, horizon, dim), a new array."""
        if isinstance(self.head, ActionTokens):
            return self.head.act(answers, self.record)
        if isinstance(self.head, FlowHead):
            return self.head.act(answers, prefixes)
        return self.head.act(answers)

    def _prune(self, plan: Plan, features: Floats) -> tuple[Plan, Floats]:
        """The plan without the image tokens that resemble others of their image; the features of those that stay."""
        patches = self.config.vision.num_patches
        images = features.reshape(-1, patches, features.shape[1])
        kept = np.concatenate([most_different(image, patches - self.pruned) for image in images])
        kept |= plan.image_positions >= plan.answers.start  # a prompt may end with its images
        stays = np.ones(plan.length, np.bool_)
        stays[plan.image_positions] = kept
        return plan.keeping(stays), features[kept]

    def _embed(
        self, plans: Sequence[Plan], images: Sequence[Floats], states: Floats, prefixes: Sequence[Floats] | None
    ) -> Floats:
        x = self.workspace.floats("x", sum(plan.length for plan in plans), self.config.language.hidden_size)
        if self.proprio_projector:
            states = _gelu_mlp(states, self.proprio_projector, self.workspace, "proprio")
        start = 0
        for index, plan in enumerate(plans):
            tokens = x[start : start + plan.length]
            tokens[plan.text_positions] = plan.text
            tokens[plan.image_positions] = images[index]
            if self.proprio_projector:
                tokens[plan.proprio_positions] = states[index]
            slots = tokens[plan.slots]
            slots[:] = 0
            if self.prefix_projector and prefixes is not None and len(prefixes[index]):
                # Decided actions stand in the slots of their steps.
                steps = slots.reshape(self.config.action.horizon, -1)
                self.prefix_projector.apply(prefixes[index], steps[: len(prefixes[index])])
            start += plan.length
        return x


def stored_linear(tensors: Mapping[str, NDArray[Any]], name: str) -> Linear:
    """A full-precision layer of a policy file, with its bias where it has one."""
    weight = tensors[f"{name}.weight"]
    rows = weight.reshape(len(weight), -1)
    return Linear(rows, tensors.get(f"{name}.bias"), tensors.get(f"{name}.weight_scale"))


def _stored_norm(tensors: Mapping[str, NDArray[Any]], name: str) -> Norm:
    return Norm(tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def _stored_ternary(bundle: Bundle[Any], name: str, rows: int, columns: int) -> Ternary:
    tensors, packing = bundle.tensors, bundle.document.packing
    scale = float(tensors[f"{name}.weight_scale"][0])
    return Ternary(tensors[f"{name}.weight"], packing, rows, columns, scale, tensors.get(f"{name}.bias"))


def _answers_first(rows: NDArray[Any], spans: Sequence[Span]) -> NDArray[Any]:
    """Move the rows of all answers to the front, in place -> those rows."""
    end = start = 0
    for span in spans:
        count = span.answers.stop - span.answers.start
        first = start + span.answers.start
        rows[end : end + count] = rows[first : first + count]
        end, start = end + count, start + span.length
    return rows[:end]


def _gelu_mlp(x: Floats, layers: list[Linear], workspace: Workspace, name: str) -> Floats:
    """Two linear layers with an exact GELU between them, written to the buffer `name`."""
    rows, size = len(x), len(layers[0].weight)
    between, out = workspace.floats("gate", rows, size), workspace.floats(name, rows, size)
    layers[0].apply(x, between)
    native.gelu(between, False, between)
    layers[1].apply(between, out)
    return out


def _project(x: Quantized | Floats, layer: Ternary | Linear, out: Floats, *, accumulate: bool = False) -> None:
    if isinstance(x, Quantized) and isinstance(layer, Ternary):
        _ternary(x, layer, out, accumulate=accumulate)
    elif isinstance(layer, Linear) and not isinstance(x, Quantized):
        layer.apply(x, out, accumulate=accumulate)


def _ternary(x: Quantized, layer: Ternary, out: Floats, *, accumulate: bool = False) -> None:
    native.ternary_linear(
        *x, layer.packed, layer.rows, layer.columns, layer.scale, layer.bias, out,
        accumulate=accumulate, packing=layer.packing,
    )  # fmt: skip


def _tiles(count: int) -> int:
    return -(-count // TILE)


def rotary_table(positions: int, head_dim: int, theta: float) -> tuple[Floats, Floats]:
    """Cosines and sines (positions, head_dim / 2). Angles are float32 as in training; the functions are taken in
    float64 and rounded once, because float32 ones differ between processors."""
    powers = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.power(theta, powers.astype(np.float64)).astype(np.float32)
    angles = (np.arange(positions, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
