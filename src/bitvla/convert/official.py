"""Published BitVLA and BitNet checkpoints, opened for packing or training: kinds, names, shapes and conventions.

A LIBERO fine-tune (`hongyuw/ft-bitvla-bitsiglipL-224px-libero_*-bf16`) is a folder with

    model.safetensors, or shards and model.safetensors.index.json; config.json      here or under lora_adapter/
    action_head--N_checkpoint.pt, proprio_projector--N_checkpoint.pt
    dataset_statistics.json, tokenizer.json

A language model (`microsoft/bitnet-b1.58-2B-4T`, packed, or `-bf16`) is a folder with config.json, model.safetensors
and tokenizer.json. So is a vision-language base model (`hongyuw/bitvla-bitsiglipL-224px-bf16`, and with a tower in full
precision `hongyuw/bitvla-siglipL-224px-bf16`), and the pre-trained base model (`lxsy/bitvla-bf16`), which acts by
tokens; its config.json may hold statistics under `norm_stats`.

SigLIP (`google/siglip-so400m-patch14-224`) is read for its vision tower alone, with which a language model learns to
see.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

import bitvla
from bitvla.bundle import EMBEDDING, LANGUAGE_HEAD, TensorSpec, action_specs, decoder_specs, vision_specs
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

Kind = Literal["libero", "vision-language", "pretrained", "language"]

STATISTICS_MISSING = "give --statistics a file that is there"
SEES = "has a vision tower already; leave out --tower"

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
_COMPUTED_TOWER: dict[tuple[str, ...], Any] = {
    ("model_type",): "siglip",
    ("vision_config", "hidden_act"): "gelu_pytorch_tanh",
    ("vision_config", "num_channels"): 3,
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
    return "vision-language"


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
    head = TensorSpec("matrix", (language.vocab_size, language.hidden_size))
    return vision_specs(vision, language.hidden_size) | decoder | {LANGUAGE_HEAD: head}


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


# Each kind as what packing needs.


class _Checkpoint(NamedTuple):
    """A published checkpoint: its folder, its config.json as it is and as sizes, its weights."""

    folder: Path
    raw: Mapping[str, Any]
    vision: VisionConfig
    language: LanguageConfig
    weights: Weights


def open_official(
    folder: Path, views: int | None = None, statistics: str | None = None, control_hz: float | None = None
) -> Source:
    """Open a published checkpoint.

    For a LIBERO fine-tune, `views` is the number of cameras it was trained with: 1, 2 or 3, by default what config.json
    says under `num_images_in_input`, or 2; `statistics` is the key in dataset_statistics.json, needed where it has
    several. For the pre-trained base model, `statistics` is the key in `norm_stats` of config.json, or a JSON file of
    the same layout with one data set; `control_hz`, which no file says, is that robot's control rate. What a kind of
    checkpoint knows or has no use for is refused.
    """
    kind, checkpoint = _open(folder)
    if kind in ("language", "vision-language"):
        if views or statistics or control_hz:
            raise BitvlaError(f"{folder} does not act: it has no views, statistics or control rate; leave them out")
        return _language_model(checkpoint) if kind == "language" else _vision_language_model(checkpoint)
    if kind == "pretrained":
        if views not in (None, 1):
            raise BitvlaError(f"{folder} is the pre-trained base model, which sees one image, not {views}")
        return _pretrained(checkpoint, statistics, control_hz)
    if control_hz:
        raise BitvlaError(f"{folder} is a fine-tune on LIBERO, whose control rate is known; leave out --control-hz")
    return _fine_tune(checkpoint, statistics, _views(folder, checkpoint.raw, views))


def open_start(folder: Path, tower: Path | None = None) -> Source:
    """Open a published checkpoint as the start of training.

    A LIBERO fine-tune is its policy. A base model, pre-trained on robots or not, is a vision-language model, and so is
    a language model with the `tower` of a SigLIP checkpoint, but for the connector between them, which is yet to be
    learnt. The tokenizer gets the tokens that a policy needs, of which one stands for a patch.
    """
    kind, checkpoint = _open(folder)
    if kind == "language" and tower is None:
        raise BitvlaError(
            f"{folder} is a language model without a vision tower; align it with one (--tower "
            "google/siglip-so400m-patch14-224), or start from a model that sees"
        )
    if kind != "language" and tower is not None:
        raise BitvlaError(f"{folder} {SEES}")
    packed = next((place.key for place in checkpoint.weights.places.values() if place.dtype == "U8"), None)
    if packed is not None:
        raise BitvlaError(f"{folder} is packed ({packed}); training needs the latent weights, as in its -bf16 variant")
    if kind == "libero":
        return _fine_tune(checkpoint, None, _views(folder, checkpoint.raw, None))
    source = _vision_language_model(checkpoint) if tower is None else _joined(_language_model(checkpoint), tower)
    tokenizer = _with_policy_tokens(source.tokenizer)
    chat = conventions.base_chat(_image_token(folder, checkpoint.raw, parse_tokenizer(tokenizer)))
    config = msgspec.structs.replace(source.config, chat=chat)
    return dataclasses.replace(source, config=config, tokenizer=tokenizer)


def _open(folder: Path) -> tuple[Kind, _Checkpoint]:
    origin = backbone_folder(folder) / "config.json"
    raw, weights = read_json(origin), find_weights(folder)
    kind = kind_of(weights, raw)
    vision, language = _read_sizes(origin, raw, kind)
    _check_vocabulary(weights, kind, language)
    return kind, _Checkpoint(folder, raw, vision, language, weights)


def _fine_tune(checkpoint: _Checkpoint, statistics: str | None, views: int) -> Source:
    """A LIBERO fine-tune as a policy."""
    folder, _, vision, language, weights = checkpoint
    for name in SIDE_FILES:
        if side_file(folder, name) is None:
            raise BitvlaError(f"{folder} lacks {name}--*_checkpoint.pt: the checkpoint is not complete")
    text, tokenizer = _read_tokenizer(folder / "tokenizer.json", conventions.TOKEN_IDS)
    tables = folder / "dataset_statistics.json"
    key, state, action = _read_statistics(tables, statistics)
    config = PolicyConfig(
        name=f"bitvla-{key}",
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
    _check_policy(folder, config, tokenizer)
    check_tensors(
        weights, expected_tensors("libero", vision, language) | action_specs(config.action, language.hidden_size)
    )
    return _source(folder, weights, config, text, {"kind": "libero", "statistics": key}, beside=[tables])


def _pretrained(checkpoint: _Checkpoint, statistics: str | None, control_hz: float | None) -> Source:
    """The pre-trained base model as a policy that writes its actions as tokens."""
    folder, raw, vision, language, weights = checkpoint
    text, tokenizer = _read_tokenizer(folder / "tokenizer.json", conventions.TOKEN_IDS)
    key, action = _read_pretrained_statistics(folder, raw, statistics)
    if control_hz is None:
        raise BitvlaError(
            f"{folder} was pre-trained on robots of many control rates; give the one of '{key}' with --control-hz"
        )
    config = PolicyConfig(
        name=f"bitvla-pretrained-{key}",
        vision=vision,
        language=language,
        action=ActionConfig(
            horizon=1,
            dim=len(action.names),
            state_dim=0,
            slots_per_step=0,
            head_hidden_size=0,
            head_blocks=0,
            bins=conventions.PRETRAINED_BINS,
        ),
        processing=conventions.pretrained_processing(action, vision.image_size, control_hz),
    )
    _check_policy(folder, config, tokenizer)
    check_tensors(weights, expected_tensors("pretrained", vision, language))
    return _source(folder, weights, config, text, {"kind": "pretrained", "statistics": key})


def _language_model(checkpoint: _Checkpoint) -> Source:
    folder, raw, _, language, weights = checkpoint
    text, _ = _read_tokenizer(folder / "tokenizer.json", conventions.LANGUAGE_TOKEN_IDS)
    config = LanguageModelConfig(name="bitnet", language=language, chat=conventions.CHAT)
    _check_config(folder, config)
    check_tensors(weights, expected_tensors("language", VisionConfig(), language))
    _check_packing(folder, raw)
    return _source(folder, weights, config, text, {"kind": "language"}, prefix="language_model.")


def _vision_language_model(checkpoint: _Checkpoint) -> Source:
    folder, raw, vision, language, weights = checkpoint
    text, tokenizer = _read_tokenizer(folder / "tokenizer.json", conventions.LANGUAGE_TOKEN_IDS)
    config = LanguageModelConfig(
        name="bitvla",
        language=language,
        chat=conventions.base_chat(_image_token(folder, raw, tokenizer)),
        tied=False,
        vision=vision,
        image=conventions.SIGLIP,
    )
    _check_config(folder, config)
    check_tensors(weights, expected_tensors("vision-language", vision, language))
    return _source(folder, weights, config, text, {"kind": "vision-language"})


def _joined(language: Source, folder: Path) -> Source:
    """A language model that sees with the vision tower of the SigLIP checkpoint in `folder`.

    It is untied, as the published models that came of this; its language head begins as the embedding. As in LLaVA and
    in them, the tower ends with SigLIP's last layer but one: neither norm nor pooling follow.
    """
    vision, weights = _read_tower(folder)
    config = LanguageModelConfig(
        name="bitvla",
        language=language.config.language,
        chat=conventions.base_chat("<|image_pad|>"),
        tied=False,
        vision=vision,
        image=conventions.SIGLIP,
    )
    _check_config(folder, config)
    digests = _digests(folder, weights.files)
    digest = _digest(digests)
    parents = {
        "language": {"digest": language.sha256, "provenance": language.provenance},
        "tower": {"digest": digest, "provenance": {"checkpoint": {"kind": "siglip", "files": digests}}},
    }

    def tensor(name: str) -> NDArray[Any]:
        if name in weights.places:
            return weights.read(name)
        return language.tensor(EMBEDDING if name == LANGUAGE_HEAD else name)

    return dataclasses.replace(
        language,
        config=config,
        provenance={"parents": parents},
        sha256=_digest({"language": language.sha256, "tower": digest}),
        tensor=tensor,
        lacks="multi_modal_projector.",
    )


def _read_tower(folder: Path) -> tuple[VisionConfig, Weights]:
    """SigLIP's vision tower without its last layer, and its tensors under our names."""
    from transformers import SiglipVisionConfig

    origin = folder / "config.json"
    raw = read_json(origin, "--tower takes a SigLIP checkpoint, as google/siglip-so400m-patch14-224")
    _check_computed(origin, raw, _COMPUTED_TOWER)
    # What its config.json does not say is as in SigLIP, not as in BitVLA.
    section = SiglipVisionConfig().to_dict() | _section(raw, "vision_config")
    whole = from_dict(VisionConfig, _renamed(section, _VISION_FIELDS) | {"ternary": False}, str(origin))
    parts, found = ("vision_model.embeddings.", "vision_model.encoder."), find_weights(folder)
    places = {f"vision_tower.{name}": place for name, place in found.places.items() if name.startswith(parts)}
    check_tensors(Weights(folder, places), {n: s for n, s in vision_specs(whole, 0).items() if n.startswith("vision_")})
    return msgspec.structs.replace(whole, num_layers=whole.num_layers - 1), Weights(folder, places)


def _with_policy_tokens(tokenizer: str) -> str:
    """The text of a tokenizer that names reserved tokens of Llama 3 as the official `convert_ckpt.py` does."""
    content = msgspec.json.decode(tokenizer)
    known = {token["content"] for token in content["added_tokens"]}
    names = {token_id: token for token, token_id in conventions.TOKEN_IDS.items() if token not in known}
    for token in content["added_tokens"]:
        token["content"] = names.get(token["id"], token["content"])
    return msgspec.json.encode(content).decode()


def _image_token(folder: Path, raw: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """What stands for a patch in the text; its embedding is never used. The official code renames it for actions."""
    token = "<|image_pad|>"
    if tokenizer.token_to_id(token) is None:
        special = tokenizer.get_added_tokens_decoder().get(raw.get("image_token_index", -1))
        if special is None:
            raise BitvlaError(
                f"{folder / 'tokenizer.json'} has neither {token} nor a special token with the id image_token_index "
                f"({raw.get('image_token_index')}) of config.json: it is the tokenizer of another model"
            )
        token = special.content
    return token


def _source(
    folder: Path,
    weights: Weights,
    config: PolicyConfig | LanguageModelConfig,
    tokenizer: str,
    facts: Mapping[str, str],
    *,
    beside: Iterable[Path] = (),
    prefix: str = "",
) -> Source:
    """`prefix` is what the names of the checkpoint's tensors lack; `beside` are more files that it was made from."""
    digests = _digests(folder, [*weights.files, *beside, folder / "tokenizer.json"])

    def tensor(name: str) -> NDArray[Any]:
        values = weights.read(name.removeprefix(prefix))
        if name == LANGUAGE_HEAD and isinstance(config, PolicyConfig):  # of which only action tokens are read
            return values[-config.action.bins :].copy()
        return values

    return Source(
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        golden=_golden(config) if isinstance(config, PolicyConfig) else Golden([], []),
        provenance={"checkpoint": {**facts, "files": digests}},
        sha256=_digest(digests),
        tensor=tensor,
        ternary=lambda name: weights.ternary(name.removeprefix(prefix)),
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


def _digest(digests: Mapping[str, str]) -> str:
    """The one digest of several."""
    return hashlib.sha256(msgspec.json.encode(digests)).hexdigest()


def _check_computed(origin: Path, raw: Mapping[str, Any], known: Mapping[tuple[str, ...], Any]) -> None:
    for (*sections, field), computed in known.items():
        section = _section(raw, *sections)
        if field in section and section[field] != computed:
            raise BitvlaError(
                f"{origin}: {'.'.join([*sections, field])} is {section[field]!r}; only {computed!r} can be computed"
            )


def _read_sizes(origin: Path, raw: Mapping[str, Any], kind: Kind) -> tuple[VisionConfig, LanguageConfig]:
    """The network's sizes in our names; what config.json does not say is as published."""
    _check_computed(origin, raw, _COMPUTED_TEXT if kind == "language" else _COMPUTED)
    if kind == "libero" and not _tower_is_ternary(raw):
        raise BitvlaError(
            f"{origin}: vision_config.vit_weight_bits and vit_act_bits are not 1 and 8, so the vision tower was "
            "trained in full precision; only fine-tunes with a ternary tower can be packed"
        )
    seen = _renamed(_section(raw, "vision_config"), _VISION_FIELDS) | {"ternary": _tower_is_ternary(raw)}
    vision = from_dict(VisionConfig, seen, str(origin))
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
    key = _chosen(path, tables, key)
    if not key.startswith("libero"):
        raise BitvlaError(
            f"{path} is of '{key}'; cameras, gripper and chunk are known only for fine-tunes on LIBERO (libero_*)"
        )
    state = _bounds(path, key, "proprio", tables[key], conventions.LIBERO_STATE)
    return key, state, _bounds(path, key, "action", tables[key], conventions.LIBERO_ACTION)


def _read_pretrained_statistics(folder: Path, raw: Mapping[str, Any], given: str | None) -> tuple[str, Statistics]:
    """The key of the data set and the bounds of its actions, from the file `given` or the key `given` of config.json.

    Names and units are those of the data set, which the tables do not tell.
    """
    origin, key = folder / "config.json", given
    tables = _section(raw, "norm_stats")
    if given is not None and given.endswith(".json"):
        origin, key = Path(given), None
        tables = read_json(origin, STATISTICS_MISSING)
        if len(tables) != 1:
            raise BitvlaError(
                f"{origin} has the statistics of {', '.join(tables) or 'nothing'}; leave one data set in it"
            )
    elif not tables:
        raise BitvlaError(
            f"{folder} has no statistics to bring its actions into a robot's units: give --statistics FILE"
        )
    key = _chosen(origin, tables, key)
    table = _section(tables, key, "action").get("q01")
    count = len(table) if isinstance(table, list) else 0
    return key, _bounds(origin, key, "action", tables[key], {f"action_{index}": "?" for index in range(count)})


def _chosen(path: Path, tables: Mapping[str, Any], key: str | None) -> str:
    """The key of a data set in a table of statistics: the one asked for, or the only one."""
    if key is None and len(tables) != 1:
        raise BitvlaError(
            f"{path} has the statistics of {', '.join(tables) or 'nothing'}; choose with --statistics KEY"
        )
    key = key or next(iter(tables))
    if key not in tables:
        raise BitvlaError(f"{path} has no statistics of '{key}', only of {', '.join(tables)}")
    return key


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


def _check_config(folder: Path, config: PolicyConfig | LanguageModelConfig) -> None:
    try:
        check(config)
    except BitvlaError as error:
        raise BitvlaError(f"{folder}: {error}") from None


def _check_policy(folder: Path, config: PolicyConfig, tokenizer: Tokenizer) -> None:
    _check_config(folder, config)
    try:
        Prompt(config, tokenizer)
    except BitvlaError as error:
        raise BitvlaError(f"{folder}: {error}") from None


def _golden(config: PolicyConfig) -> Golden:
    """One made-up observation, since published checkpoints have none: gradients, a state amid its bounds."""
    images = {}
    for index, camera in enumerate(config.processing.cameras):
        rows, columns = np.mgrid[: camera.height, : camera.width]
        images[camera.name] = np.stack([rows, columns, (rows + columns) // 2 + 40 * index], axis=-1).astype(np.uint8)
    observation: dict[str, Any] = {"images": images, "instruction": _INSTRUCTION}
    bounds = config.processing.state
    if bounds.names:
        middle = [(low + high) / 2 for low, high in zip(bounds.low, bounds.high, strict=True)]
        observation["state"] = np.asarray(middle, np.float32)
    return Golden([observation], [None])
