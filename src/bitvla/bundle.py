"""The policy file: one safetensors file that is a whole policy. Write, map, check.

    8 bytes   length of the header, little endian
    header    JSON: every tensor's dtype, shape and place; `__metadata__` holds the policy's document (config,
              tokenizer, golden instructions, provenance) and a SHA-256 over document, layout and data
    data      packed ternary weights first, each block 64-byte aligned, then float32, bfloat16, int8, images

Weights of large files are used in place from the memory map. `tensor_specs` is the one list of what a policy holds;
packing, loading and inspection all follow it. The file is read with our own bounded parser, since a file may be
damaged; it is written by us, since kernels want aligned blocks and the same policy must give the same bytes on every
machine. Any safetensors reader opens it.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from bitvla.config import (
    ActionConfig,
    FlowConfig,
    LanguageConfig,
    LanguageModelConfig,
    PolicyConfig,
    VisionConfig,
    check,
)
from bitvla.errors import BitvlaError, memory_for
from bitvla.files import write_whole
from bitvla.quantization import Packing, packed_shape

FORMAT = 4
# Format 1 had one packing of ternary weights, and no field for it; until format 2, `_LAST_LAYER` was a matrix; until
# format 3, no tower had FiLM.
_READABLE = (1, 2, 3, 4)
# Files up to this size are read and hashed whenever they are loaded; larger ones are mapped, and hashed by `verify`.
# A mapped file must not be written to while it is in use: that would end the process.
READ_AT_LOAD = 64 << 20

_ALIGNMENT = 64
EMBEDDING = "language_model.model.embed_tokens.weight"
LANGUAGE_HEAD = "language_model.lm_head.weight"
_LAST_LAYER = "action_head.model.fc2.weight"
_MAX_HEADER = 100 << 20  # the limit of the safetensors format itself
_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),
}

MatrixDtype = Literal["F32", "BF16", "I8"]


_Kind = Literal["ternary", "matrix", "bfloat16", "int8", "embedding", "vector"]


class TensorSpec(NamedTuple):
    """What a tensor is and its shape in a training checkpoint.

    ternary: a quantised linear layer. matrix: a linear layer that training keeps in full precision (connector,
    projector, heads, at times the tower), stored by choice as float32, as bfloat16, or as int8 codes with a scale a
    row. bfloat16, int8: one that is stored so whatever was chosen. embedding: of tokens or patches, and the layer that
    writes actions: float32 with float32 matrices, else bfloat16. vector: norms, biases, positions, always float32.
    """

    kind: _Kind
    shape: tuple[int, ...]

    def dtype(self, matrices: MatrixDtype) -> MatrixDtype:
        """As what a tensor that is not ternary lies in a file with such `matrices`."""
        if self.kind in ("bfloat16", "int8"):
            return "BF16" if self.kind == "bfloat16" else "I8"
        if self.kind == "embedding":
            return "F32" if matrices == "F32" else "BF16"
        return matrices if self.kind == "matrix" else "F32"


class Stored(NamedTuple):
    """A tensor as it lies in the file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


C = TypeVar("C", PolicyConfig, LanguageModelConfig)


class Document(msgspec.Struct, Generic[C], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a policy, or a language model, that is not a tensor.

    `packing` is that of the ternary weights. `golden` holds the instruction of each golden trace; language models have
    none.
    """

    format: int
    config: C
    packing: Packing = "2bit"
    matrix_dtype: MatrixDtype
    tokenizer: str
    golden: tuple[str, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Bundle(Generic[C]):
    """A policy or a language model in memory. Tensors by name; bfloat16 is seen as uint16. `sha256` identifies it.

    One that is mapped keeps its file open; `offsets` says where in that each tensor begins. Its document has no
    tokenizer, whose text would take megabytes: `tokenizer` reads it again.
    """

    document: Document[C]
    tensors: Mapping[str, NDArray[Any]]
    sha256: str
    path: Path | None = None
    file: BinaryIO | None = None
    offsets: Mapping[str, int] = field(default_factory=dict)

    @property
    def config(self) -> C:
        return self.document.config

    def tokenizer(self) -> str:
        """The text of its tokenizer."""
        if self.path is None or self.file is None:
            return self.document.tokenizer
        text, *_ = _parse_header(self.path, self.file)
        return msgspec.json.decode(text, type=_Tokenizer).tokenizer

    def check_finite(self) -> None:
        """BitvlaError for a value that is infinite or NaN: quantised, it would become an action like any other.

        The embedding, which is never read as a whole, is left to `rows`.
        """
        for name, tensor in self.tensors.items():
            if name != EMBEDDING:
                check_finite(name, tensor)

    def rows(self, name: str, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of a matrix, float32 (n, columns); read beside the map, which would make far more of it resident.

        BitvlaError for a row that is not there, or not finite.
        """
        table = self.tensors[name]
        last = int(indices.max(initial=0))
        if last >= len(table):
            raise BitvlaError(
                f"{name} has {len(table)} rows, none of them for token {last}: the tokenizer belongs to another model"
            )
        if self.file is None:
            rows = table[indices]
        else:
            size = table.shape[1] * table.itemsize
            parts = [os.pread(self.file.fileno(), size, self.offsets[name] + int(index) * size) for index in indices]
            rows = np.frombuffer(b"".join(parts), dtype=table.dtype).reshape(len(indices), -1)
        check_finite(name, rows)
        return to_float32(rows)


def tensor_specs(config: PolicyConfig | LanguageModelConfig) -> dict[str, TensorSpec]:
    """Every tensor by its name in a training checkpoint, in the order of the forward pass."""
    if isinstance(config, LanguageModelConfig):
        language = config.language
        tower = vision_specs(config.vision, language.hidden_size) if config.vision else {}
        head = {} if config.tied else {LANGUAGE_HEAD: TensorSpec("matrix", (language.vocab_size, language.hidden_size))}
        return tower | decoder_specs(language) | head
    return {
        **vision_specs(config.vision, config.language.hidden_size),
        **decoder_specs(config.language),
        **action_specs(config.action, config.language.hidden_size),
    }


def vision_specs(vision: VisionConfig, hidden: int) -> dict[str, TensorSpec]:
    """The tensors of the vision tower, with its FiLM, and of the connector to a decoder of width `hidden`."""
    width = vision.hidden_size
    tower = "vision_tower.vision_model."
    specs = {
        f"{tower}embeddings.patch_embedding.weight": TensorSpec(
            "embedding", (width, 3, vision.patch_size, vision.patch_size)
        ),
        f"{tower}embeddings.patch_embedding.bias": TensorSpec("vector", (width,)),
        f"{tower}embeddings.position_embedding.weight": TensorSpec("vector", (vision.num_patches, width)),
    }
    specs |= _encoder_specs(vision, f"{tower}encoder.layers.", "ternary" if vision.ternary else "matrix")
    for index in range(vision.num_layers if vision.film else 0):
        specs |= _linear(f"film.{index}.scale", width, hidden) | _linear(f"film.{index}.shift", width, hidden)
    specs |= _linear("multi_modal_projector.linear_1", hidden, width)
    specs |= _linear("multi_modal_projector.linear_2", hidden, hidden)
    return specs


def _encoder_specs(encoder: VisionConfig | FlowConfig, layers: str, kind: _Kind) -> dict[str, TensorSpec]:
    """The tensors of SigLIP's transformer layers, under names that begin with `layers`."""
    width, inner = encoder.hidden_size, encoder.intermediate_size
    specs: dict[str, TensorSpec] = {}
    for layer in (f"{layers}{index}." for index in range(encoder.num_layers)):
        specs |= _norm(f"{layer}layer_norm1", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            specs |= _linear(f"{layer}self_attn.{name}", width, width, kind)
        specs |= _norm(f"{layer}layer_norm2", width)
        specs |= _linear(f"{layer}mlp.fc1", inner, width, kind) | _linear(f"{layer}mlp.fc2", width, inner, kind)
    return specs


def decoder_specs(language: LanguageConfig) -> dict[str, TensorSpec]:
    """The tensors of the decoder with its embedding, without a language head."""
    hidden = language.hidden_size
    key_size, inner = language.num_kv_heads * language.head_dim, language.intermediate_size
    specs = {EMBEDDING: TensorSpec("embedding", (language.vocab_size, hidden))}
    for index in range(language.num_layers):
        layer = f"language_model.model.layers.{index}."
        specs |= {
            f"{layer}input_layernorm.weight": TensorSpec("vector", (hidden,)),
            f"{layer}self_attn.q_proj.weight": TensorSpec("ternary", (hidden, hidden)),
            f"{layer}self_attn.k_proj.weight": TensorSpec("ternary", (key_size, hidden)),
            f"{layer}self_attn.v_proj.weight": TensorSpec("ternary", (key_size, hidden)),
            f"{layer}self_attn.attn_sub_norm.weight": TensorSpec("vector", (hidden,)),
            f"{layer}self_attn.o_proj.weight": TensorSpec("ternary", (hidden, hidden)),
            f"{layer}post_attention_layernorm.weight": TensorSpec("vector", (hidden,)),
            f"{layer}mlp.gate_proj.weight": TensorSpec("ternary", (inner, hidden)),
            f"{layer}mlp.up_proj.weight": TensorSpec("ternary", (inner, hidden)),
            f"{layer}mlp.ffn_sub_norm.weight": TensorSpec("vector", (inner,)),
            f"{layer}mlp.down_proj.weight": TensorSpec("ternary", (hidden, inner)),
        }
    return specs | {"language_model.model.norm.weight": TensorSpec("vector", (hidden,))}


def action_specs(action: ActionConfig, hidden: int) -> dict[str, TensorSpec]:
    """The tensors of the projectors of state and prefix, and of the action head, over a decoder of width `hidden`.

    Where actions are tokens, those are the rows of the language head that belong to them.
    """
    if action.bins:
        return {LANGUAGE_HEAD: TensorSpec("matrix", (action.bins, hidden))}
    slots, width = action.slots_per_step * hidden, action.head_hidden_size
    specs = _linear("proprio_projector.fc1", hidden, action.state_dim)
    specs |= _linear("proprio_projector.fc2", hidden, hidden)
    if action.max_prefix:
        specs |= _linear("prefix_projector", slots, action.dim)
    if action.flow is not None:
        return specs | _flow_specs(action, action.flow, slots)
    specs |= _norm("action_head.model.layer_norm1", slots) | _linear("action_head.model.fc1", width, slots)
    for index in range(action.head_blocks):
        block = f"action_head.model.mlp_resnet_blocks.{index}.ffn."
        specs |= _norm(f"{block}0", width) | _linear(f"{block}1", width, width)
    specs |= _norm("action_head.model.layer_norm2", width)
    # Not a matrix: int8 would save a kilobyte and shift every action by a part of its error (docs/results.md).
    return specs | _linear(_LAST_LAYER.removesuffix(".weight"), action.dim, width, "embedding")


def _flow_specs(action: ActionConfig, flow: FlowConfig, slots: int) -> dict[str, TensorSpec]:
    """The tensors of a flow-matching head, with the noise that every chunk begins as."""
    head, width = "action_head.", flow.hidden_size
    return {
        f"{head}noise": TensorSpec("vector", (action.horizon, action.dim)),
        f"{head}position_embedding": TensorSpec("vector", (action.horizon, width)),
        **_norm(f"{head}condition_norm", slots),
        **_linear(f"{head}condition", width, slots),
        **_linear(f"{head}action_in", width, action.dim),
        **_linear(f"{head}time_in", width, width),
        **_encoder_specs(flow, f"{head}layers.", "matrix" if flow.precision == "full" else flow.precision),
        **_norm(f"{head}norm", width),
        **_linear(f"{head}action_out", action.dim, width, "embedding"),  # as the last layer of the regression head
    }


def _norm(name: str, size: int) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec("vector", (size,)), f"{name}.bias": TensorSpec("vector", (size,))}


def _linear(name: str, rows: int, columns: int, kind: _Kind = "matrix") -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec(kind, (rows, columns)), f"{name}.bias": TensorSpec("vector", (rows,))}


def stored_tensors(document: Document[C]) -> dict[str, Stored]:
    """Every tensor of a policy file in the order of its data: name -> dtype and shape."""
    config: PolicyConfig | LanguageModelConfig = document.config
    groups: tuple[dict[str, Stored], ...] = ({}, {}, {}, {}, {})
    packed, floats, halves, codes, images = groups
    for name, spec in tensor_specs(config).items():
        if spec.kind == "ternary":
            rows, columns = spec.shape
            packed[name] = Stored("U8", packed_shape(rows, columns, document.packing))
            floats[f"{name}_scale"] = Stored("F32", (1,))
        elif spec.dtype(document.matrix_dtype) == "I8" or (
            document.matrix_dtype == "I8" and document.format < 3 and name == _LAST_LAYER
        ):
            codes[name] = Stored("I8", spec.shape)
            floats[f"{name}_scale"] = Stored("F32", spec.shape[:1])
        elif spec.dtype(document.matrix_dtype) == "BF16":
            halves[name] = Stored("BF16", spec.shape)
        else:
            floats[name] = Stored("F32", spec.shape)
    if isinstance(config, PolicyConfig):
        for index in range(len(document.golden)):
            floats |= _golden_floats(index, config.action)
            images |= _golden_images(index, config)
    return {name: stored for group in groups for name, stored in group.items()}


def _golden_floats(index: int, action: ActionConfig) -> dict[str, Stored]:
    chunk = Stored("F32", (action.horizon, action.dim))
    floats = {f"golden.{index}.state": Stored("F32", (action.state_dim,))} if action.state_dim else {}
    floats |= {f"golden.{index}.chunk": chunk}
    # The answer when the first `max_prefix` actions of that chunk are given as decided.
    return floats | ({f"golden.{index}.continued": chunk} if action.max_prefix else {})


def _golden_images(index: int, config: PolicyConfig) -> dict[str, Stored]:
    return {
        f"golden.{index}.image.{camera.name}": Stored("U8", (camera.height, camera.width, 3))
        for camera in config.processing.cameras
    }


def write(path: Path, document: Document[C], tensors: Mapping[str, NDArray[Any]]) -> str:
    """Write a policy file and return its SHA-256. The file appears whole or not at all.

    `tensors` must be exactly those of `stored_tensors(document)`, and the document must have its tokenizer (ValueError
    otherwise). BitvlaError when the disk refuses; an older file at `path` is then still there.
    """
    if not document.tokenizer:
        raise ValueError("the document has no tokenizer: it is that of a mapped file")
    layout = stored_tensors(document)
    if layout.keys() != tensors.keys():
        raise ValueError(f"tensors do not fit the policy: {sorted(layout.keys() ^ tensors.keys())[:4]}")
    arrays: dict[str, NDArray[Any]] = {name: _storable(name, tensors[name], stored) for name, stored in layout.items()}
    entries = _entries(layout)
    text = msgspec.json.encode(document)
    digest = _digest(text, entries, list(arrays.values()))
    header = msgspec.json.encode({"__metadata__": {"bitvla": text.decode(), "sha256": digest}} | entries)
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    write_whole(path, len(header).to_bytes(8, "little"), header, *(a.data for a in arrays.values()))
    return digest


def _storable(name: str, array: NDArray[Any], stored: Stored) -> NDArray[Any]:
    if array.dtype != _DTYPES[stored.dtype] or array.shape != stored.shape:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, the policy file needs {stored}")
    return np.ascontiguousarray(array)


def _entries(layout: Mapping[str, Stored]) -> dict[str, dict[str, Any]]:
    """The tensors' part of the header."""
    entries, start = {}, 0
    for name, stored in layout.items():
        end = start + stored.nbytes
        entries[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": (start, end)}
        start = end
    return entries


def _digest(text: bytes, entries: Mapping[str, Mapping[str, Any]], data: list[Any]) -> str:
    digest = hashlib.sha256(text)
    digest.update(msgspec.json.encode(entries, order="sorted"))
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def read(path: Path, *, digest: bool | None = None) -> Bundle[PolicyConfig]:
    """Load the file of a policy. Header and structure are always checked, the digest by default up to 64 MB.

    Raises BitvlaError, in one line, for a file that is missing, truncated, altered, foreign, or made for another
    version of the format.
    """
    return _read(Path(path), PolicyConfig, digest)


def read_language_model(path: Path, *, digest: bool | None = None) -> Bundle[LanguageModelConfig]:
    """Load the file of a language model; like `read`."""
    return _read(Path(path), LanguageModelConfig, digest)


def is_language_model(path: Path) -> bool:
    """Does this file say that it is a language model? False for one that cannot be read."""
    try:
        data, file = _read_or_map(path)
        text, *_ = _parse_header(path, file or data)
        return "chat" in msgspec.json.decode(text, type=_Outline).config
    except (BitvlaError, msgspec.MsgspecError, UnicodeError, RecursionError):
        return False


def _read(path: Path, kind: type[C], digest: bool | None) -> Bundle[C]:
    data, file = _read_or_map(path)
    text, claimed, entries, start = _parse_header(path, file or data)
    document = _parse_document(path, text, kind, len(entries))
    _check_layout(path, document, entries, len(data) - start)
    if digest or (digest is None and file is None):
        _check_digest(path, claimed, _digest(text, entries, [data[start:]]))
    tensors = {
        name: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        .view(_DTYPES[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in entries.items()
    }
    _check_scales(path, tensors)
    offsets = {name: start + entry["data_offsets"][0] for name, entry in entries.items()}
    if file:
        document = msgspec.structs.replace(document, tokenizer="")
    return Bundle(document, tensors, claimed, path, file, offsets)


def _read_or_map(path: Path) -> tuple[NDArray[np.uint8], BinaryIO | None]:
    """The bytes of a file, aligned as kernels want them; and, where they are mapped, the open file."""
    try:
        if path.is_dir():
            raise BitvlaError(f"{path} is a folder; give the policy file in it (for example {path}/policy.safetensors)")
        if path.stat().st_size < 8:
            raise BitvlaError(f"{path} is not a policy file: it has only {path.stat().st_size} bytes")
        file = path.open("rb", buffering=0)
        size = os.fstat(file.fileno()).st_size
        with memory_for(str(path), size):
            if size > READ_AT_LOAD:  # the array keeps the map alive, and the bundle the file
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8), file
            with file:
                memory = np.empty(size + _ALIGNMENT, dtype=np.uint8)
                start = -memory.ctypes.data % _ALIGNMENT
                data = memory[start : start + size]
                data = data[: file.readinto(data.data)]
                data.flags.writeable = False
                return data, None
    except OSError as error:
        raise BitvlaError(f"cannot read the policy file {path}: {error.strerror or error}") from None


def _parse_header(
    path: Path, source: BinaryIO | NDArray[np.uint8]
) -> tuple[bytes, str, dict[str, dict[str, Any]], int]:
    """The document's text, the digest, the tensors' entries, and where the data starts.

    From the bytes of a file, or from an open one: a map would keep its pages resident.
    """

    def read(start: int, count: int) -> bytes:
        if isinstance(source, np.ndarray):
            return source[start : start + count].tobytes()
        return os.pread(source.fileno(), count, start)

    size = len(source) if isinstance(source, np.ndarray) else os.fstat(source.fileno()).st_size
    length = int.from_bytes(read(0, 8), "little")
    if length > min(_MAX_HEADER, size - 8):
        raise BitvlaError(
            f"{path} is truncated or not a safetensors file: its header would have {length} bytes, the file has {size}"
        )
    try:
        header = msgspec.json.decode(read(8, length), type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.pop("__metadata__", b"{}"), type=dict[str, str])
        entries = {name: msgspec.to_builtins(msgspec.json.decode(raw, type=_Entry)) for name, raw in header.items()}
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BitvlaError(f"{path} is damaged or not a safetensors file: header: {error}") from None
    if not {"bitvla", "sha256"} <= metadata.keys():
        raise BitvlaError(f"{path} is a safetensors file but not a policy; make one with: bitvla pack CHECKPOINT OUT")
    return metadata["bitvla"].encode(errors="replace"), metadata["sha256"], entries, 8 + length


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: Literal["U8", "I8", "F32", "BF16"]
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _check_digest(path: Path, claimed: str, actual: str) -> None:
    if claimed != actual:
        raise BitvlaError(f"{path} is damaged or was altered: its SHA-256 does not fit; fetch or pack it again")


def _parse_document(path: Path, text: bytes, kind: type[C], num_tensors: int) -> Document[C]:
    try:
        outline = msgspec.json.decode(text, type=_Outline)
        if outline.format not in _READABLE:
            raise BitvlaError(
                f"{path} has policy file format {outline.format}, this bitvla reads formats 1 to {FORMAT}; "
                + ("update bitvla" if outline.format > FORMAT else "pack it again")
            )
        _check_kind(path, kind, outline.config)
        document: Document[C] = msgspec.json.decode(text, type=Document[kind])  # type: ignore[valid-type]
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BitvlaError(f"{path} is damaged: policy document: {error}") from None
    config = document.config
    try:
        check(config)
    except BitvlaError as error:
        raise BitvlaError(f"{path}: {error}") from None
    counts = [config.language.num_layers]
    if config.vision:
        counts.append(config.vision.num_layers + config.language.num_layers)
    if isinstance(config, PolicyConfig):
        counts.append(config.action.flow.num_layers if config.action.flow else config.action.head_blocks)
        counts.append(len(document.golden) * len(config.processing.cameras))
    if max(counts) > num_tensors:
        raise BitvlaError(
            f"{path} is damaged: it describes {max(counts)} layers or golden images, with only {num_tensors} tensors"
        )
    if config.precision != "ternary":
        raise BitvlaError(f"{path} describes a {config.precision} precision policy; policy files are ternary")
    return document


class _Outline(msgspec.Struct):
    format: int
    config: dict[str, msgspec.Raw] = {}


class _Tokenizer(msgspec.Struct):
    tokenizer: str


def _check_kind(path: Path, kind: type[Any], config: Mapping[str, Any]) -> None:
    """Only a language model has a chat template, only a policy has actions."""
    if kind is PolicyConfig and "chat" in config:
        raise BitvlaError(f"{path} is a language model, not a policy; use it with: bitvla chat {path}")
    if kind is LanguageModelConfig and "action" in config:
        raise BitvlaError(f"{path} is a policy, which acts and does not chat; bitvla chat needs a language model")


def _check_layout(path: Path, document: Document[C], entries: Mapping[str, Mapping[str, Any]], size: int) -> None:
    """Compare the header with what the policy's configuration asks for; name the first difference."""
    expected = stored_tensors(document)
    for names, problem in ((expected.keys() - entries.keys(), "lacks"), (entries.keys() - expected.keys(), "has")):
        if names:
            what = "tensor" if problem == "lacks" else "unexpected tensor"
            raise BitvlaError(f"{path} {problem} the {what} {min(names)} ({len(names)} in all): it is damaged")
    for name, stored in expected.items():
        entry = entries[name]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if (dtype, shape) != (stored.dtype, stored.shape):
            raise BitvlaError(
                f"{path}: tensor {name} is {dtype} {list(shape)}, the policy needs {stored.dtype} {list(stored.shape)}"
            )
        start, end = entry["data_offsets"]
        if not 0 <= start <= end <= size:
            raise BitvlaError(f"{path} is truncated: tensor {name} ends at byte {end} of {size}")
        if end - start != stored.nbytes or start % _DTYPES[stored.dtype].itemsize:
            raise BitvlaError(f"{path} is damaged: tensor {name} lies at bytes {start} to {end}")
    if sum(stored.nbytes for stored in expected.values()) != size:
        raise BitvlaError(f"{path} is damaged: its data has {size} bytes, its tensors another number")


def _check_scales(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("_scale") and not (tensor.min() > 0 and tensor.max() < np.inf):
            raise BitvlaError(f"{path} is damaged: {name} holds {tensor.min()} to {tensor.max()}")


def check_finite(name: str, tensor: NDArray[Any]) -> None:
    """BitvlaError where a tensor of a policy file holds a value that is infinite or NaN."""
    if tensor.dtype == np.uint16:  # bfloat16: without the sign, from 0x7F80 on
        finite = tensor.max(initial=0) < 0xFF80 and tensor.view(np.int16).max(initial=0) < 0x7F80
    else:
        finite = tensor.dtype.kind != "f" or (tensor.min() > -np.inf and tensor.max() < np.inf)
    if not finite:
        raise BitvlaError(f"{name} holds a value that is not finite: the data is damaged")


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16 (half to even), seen as uint16. Non-finite values must be excluded before."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16).astype(np.uint16)


def to_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """A tensor of a policy file as float32: bfloat16 is widened, float32 returned as it is."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values
