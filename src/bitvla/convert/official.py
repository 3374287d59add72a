"""Published BitVLA and BitNet checkpoints, opened for packing: their kinds, names, shapes and conventions.

A LIBERO fine-tune (`hongyuw/ft-bitvla-bitsiglipL-224px-libero_*-bf16`) is a folder with

    model.safetensors, or shards and model.safetensors.index.json; config.json      here or under lora_adapter/
    action_head--N_checkpoint.pt, proprio_projector--N_checkpoint.pt
    dataset_statistics.json, tokenizer.json

A language model (`microsoft/bitnet-b1.58-2B-4T`, packed, or `-bf16`) is a folder with config.json, model.safetensors
and tokenizer.json. Other base models have neither an action head nor, here, a language head: they are recognised,
checked in full, and refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from tokenizers import Tokenizer

import bitvla
from bitvla.bundle import TensorSpec, action_specs, decoder_specs, vision_specs
from bitvla.config import (
    ActionConfig,
    LanguageConfig,
    LanguageModelConfig,
    PolicyConfig,
    Statistics,
    VisionConfig,
    check,
    from_dict,
)
from bitvla.convert import conventions
from bitvla.convert.source import Golden, Source, check_names, read_json, sha256
from bitvla.convert.weights import SIDE_FILES, Weights, backbone_folder, find_weights, side_file
from bitvla.errors import BitvlaError
from bitvla.processing.prompt import Prompt
from bitvla.runtime.policy import parse_tokenizer

Kind = Literal["libero", "vision-language", "full-precision tower", "pretrained", "language"]

EMBEDDING = "language_model.model.embed_tokens.weight"
LANGUAGE_HEAD = "language_model.lm_head.weight"

_BASE_MODELS: dict[Kind, str] = {
    "vision-language": "a vision-language base model (hongyuw/bitvla-bitsiglipL-224px-bf16)",
    "full-precision tower": "a vision-language base model with a full-precision tower "
    "(hongyuw/bitvla-siglipL-224px-bf16)",
    "pretrained": "the pre-trained base model with discrete action tokens (lxsy/bitvla-bf16)",
}
_HUB_FILES = ["*.json", "*.safetensors", "*.pt"]  # also in lora_adapter/
_INSTRUCTION = "pick up the black bowl and place it on the plate"

# What the runtime computes; a config.json that says otherwise belongs to another model. What it does not say is as
# published.
_COMPUTED: dict[tuple[str, ...], Any] = {
    ("projector_hidden_act",): "gelu",
    ("multimodal_projector_bias",): True,
    ("vision_feature_layer",): -1,
    ("vision_feature_select_strategy",): "full",
    ("vision_config", "hidden_act"): "gelu_pytorch_tanh",
    ("text_config", "attention_bias"): False,
    ("text_config", "rope_scaling"): None,
}
_COMPUTED_TEXT: dict[tuple[str, ...], Any] = {
    ("hidden_act",): "relu2",
    ("tie_word_embeddings",): True,
    ("attention_bias",): False,
    ("rope_scaling",): None,
}
_TEXT_FIELDS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "max_position_embeddings": "max_positions",
}  # fmt: skip
_VISION_FIELDS = {
    "image_size": "image_size", "patch_size": "patch_size", "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "layer_norm_eps": "layer_norm_eps",
}  # fmt: skip


def local(source: str) -> Path:
    """The folder of a checkpoint: `source` itself, or what the Hugging Face Hub has under this id."""
    path = Path(source)
    if path.exists() or not bitvla.HUB_ID.fullmatch(source):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise BitvlaError(
            f"{source} is not a folder here; to fetch a checkpoint from the Hugging Face Hub: "
            "pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's errors have no common base that promises a readable text
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BitvlaError(
            f"{source} is neither a folder here nor a checkpoint on the Hugging Face Hub ({reason})"
        ) from None


def recognizes(folder: Path) -> bool:
    """Is this a published checkpoint, not one that our training wrote?"""
    path = backbone_folder(folder) / "config.json"
    return path.is_file() and "model_type" in read_json(path)


# What kind of model they are, and what its tensors must be.


def kind_of(weights: Weights, config: Mapping[str, Any]) -> Kind:
    """Which of the published models this is; BitvlaError for any other."""
    names = weights.places
    if "model.embed_tokens.weight" in names and str(config.get("model_type")).lower() == "bitnet":
        return "language"
    if EMBEDDING not in names or not any(name.startswith("vision_tower.") for name in names):
        raise BitvlaError(
            f"{weights.root} is a checkpoint of another model (model_type '{config.get('model_type')}', tensor "
            f"{min(names, default='none')}); BitVLA and BitNet b1.58 checkpoints can be read"
        )
    if any(side_file(weights.root, name) for name in SIDE_FILES):
        return "libero"
    if names[EMBEDDING].shape[0] == conventions.PRETRAINED_VOCABULARY:
        return "pretrained"
    if (weights.root / "dataset_statistics.json").is_file():
        return "libero"
    return "vision-language" if _tower_is_ternary(config) else "full-precision tower"


def _tower_is_ternary(config: Mapping[str, Any]) -> bool:
    """The official code keeps the tower in full precision unless its config asks for 1-bit weights."""
    vision = _section(config, "vision_config")
    return vision.get("vit_weight_bits", 32) == 1 and vision.get("vit_act_bits", 32) == 8


def _section(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A part of config.json, empty where it is not there."""
    for name in names:
        part = config.get(name)
        config = part if isinstance(part, dict) else {}
    return config


def expected_tensors(kind: Kind, vision: VisionConfig, language: LanguageConfig) -> dict[str, TensorSpec]:
    """The backbone's tensors of a kind of model: what it is read as, and its shape when not packed."""
    decoder = decoder_specs(language)
    if kind == "language":  # its language head is the embedding
        return {name.removeprefix("language_model."): spec for name, spec in decoder.items()}
    tower = vision_specs(vision, language.hidden_size)
    if kind == "full-precision tower":
        tower = {
            name: TensorSpec("matrix", spec.shape) if spec.kind == "ternary" else spec for name, spec in tower.items()
        }
    head = TensorSpec("matrix", (language.vocab_size, language.hidden_size))
    return tower | decoder | {LANGUAGE_HEAD: head}


def check_tensors(weights: Weights, expected: Mapping[str, TensorSpec]) -> None:
    """Names, shapes and dtypes; BitvlaError names the first tensor that does not fit.

    Ternary weights may also be packed, four rows a byte, with a scale beside them.
    """
    packed = {name for name in expected if name in weights.places and weights.places[name].dtype == "U8"}
    check_names(weights.root, weights.places, [*expected, *(f"{name}_scale" for name in packed)])
    for name, spec in expected.items():
        place, shape = weights.places[name], spec.shape
        fits = place.dtype in ("BF16", "F32", "F16")
        if name in packed:
            fits, shape = spec.kind == "ternary" and shape[0] % 4 == 0, (shape[0] // 4, *shape[1:])
        if not fits or place.shape != shape:
            raise BitvlaError(
                f"{place.path}: tensor {place.key} is {place.dtype} {list(place.shape)}, its config.json asks for "
                f"{'U8' if name in packed else 'BF16'} {list(shape)}"
            )


# A LIBERO fine-tune as a policy.


def open_official(folder: Path, views: int | None = None, statistics: str | None = None) -> Source:
    """Open a published checkpoint.

    `views` is the number of cameras it was trained with: 1, 2 or 3, by default what config.json says under
    `num_images_in_input`, or 2. `statistics` is the key in dataset_statistics.json, needed where it has several.
    Both are refused for a language model. Raises BitvlaError for other base models, which no file can hold yet.
    """
    origin = backbone_folder(folder) / "config.json"
    raw, weights = read_json(origin), find_weights(folder)
    kind = kind_of(weights, raw)
    vision, language = _read_sizes(origin, raw, kind)
    _check_vocabulary(weights, kind, language)
    backbone = expected_tensors(kind, vision, language)
    if kind == "language":
        if views or statistics:
            raise BitvlaError(f"{folder} is a language model: it has no views and no statistics; leave them out")
        return _language_source(folder, raw, language, weights, backbone)
    if kind != "libero":
        check_tensors(weights, backbone)
        raise BitvlaError(
            f"{folder} is {_BASE_MODELS[kind]}: it has no action head, so it is not a policy; pack a fine-tune of it"
        )
    text, tokenizer = _read_tokenizer(folder / "tokenizer.json", conventions.TOKEN_IDS)
    key, state, action = _read_statistics(folder / "dataset_statistics.json", statistics)
    config = _policy_config(f"bitvla-{key}", vision, language, state, action, _views(folder, raw, views))
    _check_policy(folder, config, tokenizer)
    check_tensors(weights, backbone | action_specs(config.action, language.hidden_size))
    digests = _digests(folder, [*weights.files, folder / "dataset_statistics.json", folder / "tokenizer.json"])
    return Source(
        config=config,
        tokenizer=text,
        golden=_golden(config),
        provenance={"checkpoint": {"kind": kind, "statistics": key, "files": digests}},
        sha256=hashlib.sha256(msgspec.json.encode(digests)).hexdigest(),
        tensor=weights.read,
        ternary=weights.ternary,
        matrix_dtype="BF16",
    )


def _language_source(
    folder: Path,
    raw: Mapping[str, Any],
    language: LanguageConfig,
    weights: Weights,
    expected: Mapping[str, TensorSpec],
) -> Source:
    """A language model, which has no action head and no golden traces."""
    text, _ = _read_tokenizer(folder / "tokenizer.json", conventions.LANGUAGE_TOKEN_IDS)
    config = LanguageModelConfig(name="bitnet", language=language, chat=conventions.CHAT)
    try:
        check(config)
    except BitvlaError as error:
        raise BitvlaError(f"{folder}: {error}") from None
    check_tensors(weights, expected)
    _check_packing(folder, raw)
    digests = _digests(folder, [*weights.files, folder / "tokenizer.json"])
    return Source(
        config=config,
        tokenizer=text,
        golden=Golden([], []),
        provenance={"checkpoint": {"kind": "language", "files": digests}},
        sha256=hashlib.sha256(msgspec.json.encode(digests)).hexdigest(),
        tensor=lambda name: weights.read(name.removeprefix("language_model.")),
        ternary=lambda name: weights.ternary(name.removeprefix("language_model.")),
        matrix_dtype="BF16",
    )


def _check_packing(folder: Path, raw: Mapping[str, Any]) -> None:
    """Only one of the two ways to pack multiplies by the scale; the older one divides."""
    packing = _section(raw, "quantization_config")
    if packing and packing.get("linear_class") != "autobitlinear":
        raise BitvlaError(
            f"{folder / 'config.json'}: quantization_config.linear_class is {packing.get('linear_class')!r}; only "
            "'autobitlinear' can be read, the one of microsoft/bitnet-b1.58-2B-4T"
        )


def _digests(folder: Path, files: list[Path]) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(files)}


def _read_sizes(origin: Path, raw: Mapping[str, Any], kind: Kind) -> tuple[VisionConfig, LanguageConfig]:
    """The network's sizes in our names; what config.json does not say is as published."""
    for (*sections, field), computed in (_COMPUTED_TEXT if kind == "language" else _COMPUTED).items():
        section = _section(raw, *sections)
        if field in section and section[field] != computed:
            raise BitvlaError(
                f"{origin}: {'.'.join([*sections, field])} is {section[field]!r}; only {computed!r} can be computed"
            )
    if kind == "libero" and not _tower_is_ternary(raw):
        raise BitvlaError(
            f"{origin}: vision_config.vit_weight_bits and vit_act_bits are not 1 and 8, so the vision tower was "
            "trained in full precision; only fine-tunes with a ternary tower can be packed"
        )
    vision = from_dict(VisionConfig, _renamed(_section(raw, "vision_config"), _VISION_FIELDS), str(origin))
    text = raw if kind == "language" else _section(raw, "text_config")
    language = from_dict(LanguageConfig, _renamed(text, _TEXT_FIELDS), str(origin))
    return vision, msgspec.structs.replace(language, bidirectional=kind == "libero")


def _renamed(section: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: section[theirs] for theirs, ours in names.items() if section.get(theirs) is not None}


def _check_vocabulary(weights: Weights, kind: Kind, language: LanguageConfig) -> None:
    place = weights.places["model.embed_tokens.weight" if kind == "language" else EMBEDDING]
    rows, known = place.shape[0], conventions.PRETRAINED_VOCABULARY
    if kind == "libero" and rows != conventions.FINETUNE_VOCABULARY:
        other = f"; {known} are those of the pre-trained base model, lxsy/bitvla-bf16" if rows == known else ""
        raise BitvlaError(
            f"{place.path}: the embedding has {rows} rows, LIBERO fine-tunes have "
            f"{conventions.FINETUNE_VOCABULARY}{other}"
        )
    if rows != language.vocab_size:
        raise BitvlaError(
            f"{place.path}: the embedding has {rows} rows, config.json says vocab_size {language.vocab_size}: they "
            "belong to different models"
        )


def _read_tokenizer(path: Path, token_ids: Mapping[str, int]) -> tuple[str, Tokenizer]:
    """The tokenizer and its text, without the blanks and line breaks of its file."""
    text = msgspec.json.encode(read_json(path)).decode()
    tokenizer = parse_tokenizer(text)
    for token, token_id in token_ids.items():
        found = tokenizer.token_to_id(token)
        if found != token_id:
            state = "lacks the special token" if found is None else f"gives the id {found} to"
            raise BitvlaError(f"{path} {state} {token} (id {token_id}): it is the tokenizer of another model")
    return text, tokenizer


def _read_statistics(path: Path, key: str | None) -> tuple[str, Statistics, Statistics]:
    """The key of the data set, the bounds of its state and of its actions."""
    tables = read_json(path)
    if key is None and len(tables) != 1:
        raise BitvlaError(
            f"{path} has the statistics of {', '.join(tables) or 'nothing'}; choose with --statistics KEY"
        )
    key = key or next(iter(tables))
    if key not in tables:
        raise BitvlaError(f"{path} has no statistics of '{key}', only of {', '.join(tables)}")
    if not key.startswith("libero"):
        raise BitvlaError(
            f"{path} is of '{key}'; cameras, gripper and chunk are known only for fine-tunes on LIBERO (libero_*)"
        )
    state = _bounds(path, key, "proprio", tables[key], conventions.LIBERO_STATE)
    return key, state, _bounds(path, key, "action", tables[key], conventions.LIBERO_ACTION)


def _bounds(path: Path, key: str, part: str, tables: Any, units: Mapping[str, str]) -> Statistics:
    """The 1 % and 99 % quantiles. Without a mask every dimension is normalised."""
    table = tables.get(part) if isinstance(tables, dict) else None
    if not isinstance(table, dict) or not {"q01", "q99"} <= table.keys():
        raise BitvlaError(f"{path} lacks q01 or q99 of {key}.{part}: the policy cannot be run without statistics")
    mask = table.get("mask", [True] * len(units))
    columns = {"names": [*units], "units": [*units.values()], "low": table["q01"], "high": table["q99"], "mask": mask}
    return from_dict(Statistics, columns, f"{path}: {key}.{part}")


def _views(folder: Path, raw: Mapping[str, Any], asked: int | None) -> int:
    trained = raw.get("num_images_in_input")
    if asked is not None and trained is not None and asked != trained:
        raise BitvlaError(f"{folder} was trained with {trained} views, not {asked}; leave out --views")
    views = asked or trained or conventions.LIBERO_VIEWS
    if views not in conventions.CAMERAS:
        raise BitvlaError(f"{folder}: {views!r} views; a BitVLA policy sees 1, 2 or 3")
    return int(views)


def _policy_config(
    name: str, vision: VisionConfig, language: LanguageConfig, state: Statistics, action: Statistics, views: int
) -> PolicyConfig:
    return PolicyConfig(
        name=name,
        vision=vision,
        language=language,
        action=ActionConfig(
            horizon=conventions.LIBERO_HORIZON,
            dim=len(conventions.LIBERO_ACTION),
            state_dim=len(conventions.LIBERO_STATE),
            slots_per_step=len(conventions.LIBERO_ACTION),
            head_hidden_size=language.hidden_size,
        ),
        processing=conventions.libero_processing(state, action, views),
    )


def _check_policy(folder: Path, config: PolicyConfig, tokenizer: Tokenizer) -> None:
    for name in SIDE_FILES:
        if side_file(folder, name) is None:
            raise BitvlaError(f"{folder} lacks {name}--*_checkpoint.pt: the checkpoint is not complete")
    try:
        check(config)
        Prompt(config, tokenizer)
    except BitvlaError as error:
        raise BitvlaError(f"{folder}: {error}") from None


def _golden(config: PolicyConfig) -> Golden:
    """One made-up observation, since published checkpoints have none: gradients, a state amid its bounds."""
    rows, columns = np.mgrid[: conventions.LIBERO_IMAGE_SIZE, : conventions.LIBERO_IMAGE_SIZE]
    images = {
        camera.name: np.stack([rows, columns, (rows + columns) // 2 + 40 * index], axis=-1).astype(np.uint8)
        for index, camera in enumerate(config.processing.cameras)
    }
    bounds = config.processing.state
    state = np.asarray([(low + high) / 2 for low, high in zip(bounds.low, bounds.high, strict=True)], np.float32)
    return Golden([{"images": images, "state": state, "instruction": _INSTRUCTION}], [None])
