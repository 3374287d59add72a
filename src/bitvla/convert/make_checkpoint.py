"""Checkpoints of random weights, in exactly the published layouts: to try everything without the real weights.

Shapes, names, dtypes, files and token ids are those of `hongyuw/ft-bitvla-bitsiglipL-224px-libero_spatial-bf16`, with
the statistics of its training data; of the base models it comes from; of `microsoft/bitnet-b1.58-2B-4T`, packed or in
bfloat16; or of `google/siglip-so400m-patch14-224`. What such a policy does, and what such a language model writes, is
nonsense. Written shard by shard, so that memory stays small, and from a seed, so that it is the same everywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from bitvla.bundle import TensorSpec, action_specs, to_bfloat16, to_float32
from bitvla.config import ActionConfig, LanguageConfig, VisionConfig
from bitvla.convert import conventions
from bitvla.convert.official import STATISTICS_MISSING, expected_tensors
from bitvla.convert.source import Progress, read_json
from bitvla.convert.weights import SIDE_FILES, pack_rows
from bitvla.errors import BitvlaError
from bitvla.quantization import ternarize

Kind = Literal[
    "libero", "vision-language", "vision-language-bf16-tower", "pretrained", "language", "language-bf16", "siglip"
]

SHARD_BYTES = 1 << 30
STEP = 10000  # in the names of the side files; what the published ones were trained for

# LIBERO-Spatial without pauses (`libero_spatial_no_noops`): 432 demonstrations, 52,970 steps.
LIBERO_SPATIAL = {
    "action": {
        "q01": [-0.7454732114076613, -0.6616071462631226, -0.9375, -0.1071428582072258, -0.20678570866584778,
                -0.1842857152223587, 0.0],
        "q99": [0.9375, 0.8758928775787354, 0.9321428537368774, 0.1039285734295845, 0.17678570747375488,
                0.14571428298950195, 1.0],
        "mask": [True, True, True, True, True, True, False],
    },
    "proprio": {
        "q01": [-0.2727657300233841, -0.23721413239836692, 0.9160063165426254, 2.77949666261673, -1.3187511622905732,
                -0.41989982962608335, 0.001503719249740243, -0.03989770736545324],
        "q99": [0.13529365032911292, 0.3629165390133857, 1.2862326657772063, 3.2829698753356933, 0.9332760351896285,
                0.6325724506378171, 0.039933966137468815, -0.001671919699292631],
    },
    "num_transitions": 52970,
    "num_trajectories": 432,
}  # fmt: skip

# Words of the prompt and of LIBERO's instructions, with the ids that Llama 3 gives them. "Ġ" is a space.
WORDS = {
    "'s": 596, "Human": 35075, "System": 2374, "User": 1502, "Assistant": 72803,
    "What": 3923, "ĠA": 362, "ĠThe": 578, "Ġa": 264, "Ġaction": 1957, "Ġalphabet": 28890, "Ġan": 459, "Ġand": 323,
    "Ġanswers": 11503, "Ġartificial": 21075, "Ġassistant": 18328, "Ġback": 1203, "Ġbasket": 14351, "Ġbetween": 1990,
    "Ġblack": 3776, "Ġbook": 2363, "Ġboth": 2225, "Ġbottle": 16893, "Ġbottom": 5740, "Ġbowl": 19763, "Ġbox": 3830,
    "Ġbutter": 14432, "Ġcabinet": 22685, "Ġcenter": 4219, "Ġchat": 6369, "Ġcheese": 17604, "Ġchocolate": 18414,
    "Ġclose": 3345, "Ġcompartment": 44598, "Ġcookie": 12829, "Ġcream": 12932, "Ġcurious": 22999, "Ġdetailed": 11944,
    "Ġdrawer": 27580, "Ġdressing": 32623, "Ġfrom": 505, "Ġfront": 4156, "Ġgives": 6835, "Ġhelpful": 11190,
    "Ġhuman": 3823, "Ġin": 304, "Ġinside": 4871, "Ġintelligence": 11478, "Ġit": 433, "Ġjuice": 23661, "Ġleft": 2163,
    "Ġmicrowave": 42374, "Ġmiddle": 6278, "Ġmilk": 14403, "Ġmug": 52589, "Ġnext": 1828, "Ġof": 315, "Ġon": 389,
    "Ġopen": 1825, "Ġorange": 19087, "Ġpick": 3820, "Ġplace": 2035, "Ġplate": 12235, "Ġpolite": 48887, "Ġpot": 3419,
    "Ġpots": 51131, "Ġpudding": 82527, "Ġpush": 4585, "Ġput": 2231, "Ġquestions": 4860, "Ġrack": 30759, "Ġright": 1314,
    "Ġrobot": 12585, "Ġsalad": 33566, "Ġsauce": 19737, "Ġshould": 1288, "Ġsoup": 19724, "Ġstove": 45115,
    "Ġtable": 2007, "Ġtake": 1935, "Ġthe": 279, "Ġto": 311, "Ġtomato": 42120, "Ġtop": 1948, "Ġturn": 2543, "Ġup": 709,
    "Ġwhite": 4251, "Ġwine": 13378, "Ġwooden": 23162, "Ġyellow": 14071,
}  # fmt: skip

# How Llama 3 cuts text into words.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_checkpoint(
    out: Path,
    *,
    kind: Kind = "libero",
    reduced: bool = False,
    layers: int | None = None,
    views: int | None = None,
    seed: int = 0,
    statistics: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint of random weights into the folder `out` and return a summary.

    `kind` is a LIBERO fine-tune; a vision-language base model, whose tower is ternary or not; the pre-trained base
    model, which acts by tokens; a language model whose weights are packed ("language") or latent ("language-bf16"); or
    a SigLIP, with one layer more than the tower that training makes of it. Full size is 6.4, 6.3, 6.3, 6.3, 1.2, 4.8 or
    3.5 GB; `reduced` keeps images, vocabulary and layout, and makes everything else small; `layers` leaves that many
    layers in the tower and in the decoder. `views` is the number of cameras a fine-tune claims to have been trained
    with, `statistics` a dataset_statistics.json for what acts, instead of LIBERO-Spatial's. BitvlaError where `out` is
    not empty; it appears whole or not at all.
    """
    out = Path(out)
    if not out.name:
        raise BitvlaError(f"{out} cannot be made anew; name a folder for the checkpoint, as in {out / 'checkpoint'}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BitvlaError(f"{out} is not an empty folder; choose another place for the checkpoint")
    unused = _unused(kind, views, statistics)
    if unused:
        raise BitvlaError(f"--kind {kind} has no use for {unused}: leave it out, or choose another kind")
    views = conventions.LIBERO_VIEWS if views is None else views
    if views not in conventions.CAMERAS:
        raise BitvlaError(f"{views} views; a BitVLA policy sees 1, 2 or 3")
    tables = {"libero_spatial_no_noops": LIBERO_SPATIAL}
    if statistics is not None:
        tables = read_json(statistics, STATISTICS_MISSING)
    vision, language = _reduced() if reduced else (VisionConfig(), LanguageConfig())
    if layers is not None:
        vision = msgspec.structs.replace(vision, num_layers=layers)
        language = msgspec.structs.replace(language, num_layers=layers)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        if kind == "libero":
            files = _descriptions(vision, language, {"num_images_in_input": views}) | {
                "dataset_statistics.json": tables
            }
            _write_fine_tune(temporary, vision, language, seed, progress)
        elif kind in ("language", "language-bf16"):
            language = msgspec.structs.replace(language, vocab_size=conventions.LANGUAGE_VOCABULARY)
            files = _language_descriptions(language, packed=kind == "language")
            specs = expected_tensors("language", vision, language)
            _write_model(temporary, specs, seed, progress, packed=kind == "language")
        elif kind == "siglip":
            files = {"config.json": _write_siglip(temporary, vision, seed, progress)}
        else:
            files = _write_base_model(temporary, kind, vision, language, tables, seed, progress)
        for name, content in files.items():
            _write_json(temporary / name, content)
        os.replace(temporary, out)
    except (OSError, SafetensorError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
        reason = str(error).splitlines()[0]
        raise BitvlaError(f"cannot write {out}: {reason}; free some space or choose another place") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sizes = [path.stat().st_size for path in out.iterdir()]
    return {"path": str(out), "bytes": sum(sizes), "files": len(sizes), "kind": kind, "seed": seed}


def _unused(kind: Kind, views: int | None, statistics: Path | None) -> str | None:
    """Cameras are counted of a fine-tune alone; what does not act normalises nothing."""
    if views is not None and kind != "libero":
        return f"--views {views}"
    return f"--statistics {statistics}" if statistics is not None and kind not in ("libero", "pretrained") else None


def _reduced() -> tuple[VisionConfig, LanguageConfig]:
    """Small in every size that does not show in the prompt; heads and widths differ so that a mix-up cannot pass."""
    vision = VisionConfig(hidden_size=48, intermediate_size=104, num_layers=2, num_heads=4)
    language = LanguageConfig(hidden_size=80, intermediate_size=176, num_layers=2, num_heads=4, num_kv_heads=2)
    return vision, language


# Weights.


def _random(name: str, spec: TensorSpec, seed: int) -> NDArray[np.uint16]:
    """Normal values as bfloat16, seen as uint16, scaled so that signals neither vanish nor explode.

    Each value is one of 65,536 drawn before: as good for the purpose, and several times faster.
    """
    table = _normal_table()
    if spec.kind == "vector":
        is_gain = name.endswith("weight") and "position" not in name
        table = table * np.float32(0.1) + np.float32(is_gain)
    else:
        table = table / np.sqrt(np.prod(spec.shape[1:], dtype=np.float32))
    picks = np.random.default_rng([seed, zlib.crc32(name.encode())]).integers(0, 1 << 16, spec.shape, np.uint16)
    return to_bfloat16(table)[picks]


@lru_cache(maxsize=1)
def _normal_table() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32)


def _write_fine_tune(
    out: Path, vision: VisionConfig, language: LanguageConfig, seed: int, progress: Progress | None
) -> None:
    """The backbone in safetensors files, the rest in PyTorch files beside it."""
    import torch

    backbone = expected_tensors("libero", vision, language)
    beside = action_specs(ActionConfig(head_hidden_size=language.hidden_size), language.hidden_size)
    total, done = len(backbone) + len(beside), count(1)

    def random(name: str, spec: TensorSpec) -> Any:
        values = torch.from_numpy(_random(name, spec, seed)).view(torch.bfloat16)
        if progress:
            progress(next(done), total, name)
        return values

    for name, prefix in SIDE_FILES.items():
        # As training leaves them: the head in bfloat16, the projector in float32, names of distributed runs.
        dtype = torch.bfloat16 if name == "action_head" else torch.float32
        specs = {tensor: spec for tensor, spec in beside.items() if tensor.startswith(prefix)}
        state = {f"module.{key.removeprefix(prefix)}": random(key, spec).to(dtype) for key, spec in specs.items()}
        torch.save(state, out / f"{name}--{STEP}_checkpoint.pt")
    _write_backbone(out, backbone, lambda name: {name: random(name, backbone[name])})


def _write_base_model(
    out: Path,
    kind: Kind,
    vision: VisionConfig,
    language: LanguageConfig,
    tables: Mapping[str, Any],
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Its weights are written, the files that describe them returned."""
    more: dict[str, Any]
    if kind == "pretrained":
        language = msgspec.structs.replace(language, vocab_size=conventions.PRETRAINED_VOCABULARY)
        more = {"norm_stats": tables}
    else:
        vision = msgspec.structs.replace(vision, ternary=kind == "vision-language")
        more = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    _write_model(out, expected_tensors("vision-language", vision, language), seed, progress)
    return _descriptions(vision, language, more)


def _write_siglip(out: Path, vision: VisionConfig, seed: int, progress: Progress | None) -> dict[str, Any]:
    """Images and texts, in float32: the tensors are those of transformers' model. Its config.json is returned."""
    import torch
    from transformers import SiglipConfig, SiglipModel

    sizes = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers + 1,
        "num_attention_heads": vision.num_heads,
    }
    patches = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    config: dict[str, Any] = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "torch_dtype": "float32",
        "text_config": {"model_type": "siglip_text_model"} | sizes,
        "vision_config": {"model_type": "siglip_vision_model"} | sizes | patches,
    }
    text = config["text_config"] | {"bos_token_id": None, "eos_token_id": None}  # whose defaults are of other words
    with torch.device("meta"):  # names and shapes alone
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=config["vision_config"]))
    specs = {
        name: TensorSpec("vector" if value.ndim == 1 or "position" in name else "matrix", tuple(value.shape))
        for name, value in model.state_dict().items()
    }
    _write_model(out, specs, seed, progress, dtype=torch.float32)
    return config


def _write_model(
    out: Path,
    specs: Mapping[str, TensorSpec],
    seed: int,
    progress: Progress | None,
    *,
    packed: bool = False,
    dtype: Any = None,
) -> None:
    """In bfloat16 but for what is packed, or as `dtype`."""
    import torch

    done = count(1)

    def random(name: str) -> dict[str, Any]:
        values = _random(name, specs[name], seed)
        if progress:
            progress(next(done), len(specs), name)
        if not packed or specs[name].kind != "ternary":
            return {name: torch.from_numpy(values).view(torch.bfloat16).to(dtype or torch.bfloat16)}
        codes, scale = ternarize(to_float32(values))
        return {name: torch.from_numpy(pack_rows(codes)), f"{name}_scale": torch.tensor([scale]).bfloat16()}

    _write_backbone(out, specs, random)


def _write_backbone(out: Path, specs: Mapping[str, TensorSpec], tensors: Callable[[str], dict[str, Any]]) -> None:
    """Safetensors files of about a gigabyte, with their index; `tensors` makes those of one weight."""
    from safetensors.torch import save_file

    shards, size = _shards(specs), 0
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {key: tensor for name in names for key, tensor in tensors(name).items()}
        save_file(shard, out / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
        size += sum(tensor.nbytes for tensor in shard.values())
    _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})


def _shards(specs: Mapping[str, TensorSpec]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, spec in specs.items():
        if shards[-1] and _bytes(spec) > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= _bytes(spec)
    return shards


def _bytes(spec: TensorSpec) -> int:
    return 2 * int(np.prod(spec.shape))


# Descriptions.


def _descriptions(vision: VisionConfig, language: LanguageConfig, more: dict[str, Any]) -> dict[str, Any]:
    """The JSON files beside the weights; `more` is what is special about the config.json of a kind."""
    tokens, bits = (
        _special_tokens(language.vocab_size - conventions.FIRST_ACTION_ID),
        (1, 8) if vision.ternary else (32, 32),
    )
    special = {
        "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>",
        "additional_special_tokens": tokens[10:],
    }  # fmt: skip
    return _tokenizer_files(special, tokens) | {
        "config.json": {
            "architectures": ["BitVLAForActionPrediction"],
            "model_type": "bitvla",
            "n_action_bins": language.vocab_size - conventions.FIRST_ACTION_ID,
            "image_token_index": conventions.TOKEN_IDS["<|image_pad|>"],
            "image_seq_length": vision.num_patches,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": language.vocab_size,
            "text_config": {"model_type": "BitNet"} | _text_config(language),
            "vision_config": {
                "model_type": "siglip_vision_model",
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "hidden_size": vision.hidden_size,
                "intermediate_size": vision.intermediate_size,
                "num_hidden_layers": vision.num_layers,
                "num_attention_heads": vision.num_heads,
                "layer_norm_eps": vision.layer_norm_eps,
                "hidden_act": "gelu_pytorch_tanh",
                "vision_use_head": False,
                "vit_weight_bits": bits[0],
                "vit_act_bits": bits[1],
            },
        }
        | more,
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor",
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": vision.image_size, "width": vision.image_size},
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<|image_pad|>",
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": 0,
            "vision_feature_select_strategy": "full",
        },
    }


def _language_descriptions(language: LanguageConfig, *, packed: bool) -> dict[str, Any]:
    config = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_act": "relu2",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    } | _text_config(language)
    if packed:
        config["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        }
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return {"config.json": config} | _tokenizer_files(special, _llama_tokens())


def _text_config(language: LanguageConfig) -> dict[str, Any]:
    return {
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.intermediate_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "max_position_embeddings": language.max_positions,
        "rms_norm_eps": language.rms_norm_eps,
        "rope_theta": language.rope_theta,
    }


def _tokenizer_files(special: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    return {
        "special_tokens_map.json": special,
        "tokenizer_config.json": special | {"tokenizer_class": "PreTrainedTokenizerFast"},
        "tokenizer.json": _tokenizer(tokens),
    }


def _tokenizer(special_tokens: list[str]) -> dict[str, Any]:
    """A tokenizer with Llama 3's way of cutting text and its ids for bytes and for `WORDS`.

    Words it does not know become bytes; the other entries are fillers that no text reaches.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    known = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))} | WORDS
    taken = set(known.values())
    first_special = conventions.TOKEN_IDS["<|begin_of_text|>"]
    fillers = {f"<unused {index}>": index for index in range(first_special) if index not in taken}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    begin = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": first_special + offset, "content": token} | flags for offset, token in enumerate(special_tokens)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "<|begin_of_text|>": {
                    "id": "<|begin_of_text|>",
                    "ids": [first_special],
                    "tokens": ["<|begin_of_text|>"],
                }
            },
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is in the vocabulary is one token
            "vocab": dict(sorted((known | fillers).items(), key=lambda entry: entry[1])),
            "merges": [],
        },
    }


def _special_tokens(actions: int) -> list[str]:
    """The tokens from <|begin_of_text|> on, in the order of their ids."""
    llama = [
        "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|reserved_special_token_1|>",
        "<|reserved_special_token_2|>", "<|reserved_special_token_3|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|reserved_special_token_4|>", "<|eot_id|>",
    ]  # fmt: skip
    return [*llama, "<|image_pad|>", "<proprio_pad>", *(f"<action_{index}>" for index in range(actions))]


def _llama_tokens() -> list[str]:
    """The 256 special tokens of Llama 3, in the order of their ids."""
    tokens = [f"<|reserved_special_token_{index}|>" for index in range(251)]
    named = ["<|start_header_id|>", "<|end_header_id|>", tokens[4], "<|eot_id|>"]
    return ["<|begin_of_text|>", "<|end_of_text|>", *tokens[:4], *named, *tokens[5:]]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
