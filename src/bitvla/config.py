"""What a policy is: the sizes of its network and the conventions of its robot. Typed, frozen, stored in the file.

Every size of the BitVLA topology is here, so that the published 3-billion-parameter model and a nano model are two
values of `PolicyConfig`. Nothing about a robot (cameras, statistics, rates, units) is known anywhere else.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import msgspec

from bitvla.errors import BitvlaError, meant

T = TypeVar("T")
Precision = Literal["full", "bfloat16", "int8", "ternary"]  # of the layers of a flow-matching expert
MAX_HEAD_SIZE = 256  # values of an attention head that the kernels take (csrc/kernels/kernels.h)
_LARGEST = (1 << 24) - 1  # any size; a number beyond is damage
# Columns of a ternary matrix that the kernels take; rows of the rotary table, which is computed at load.
_MOST = {"hidden_size": 1 << 18, "intermediate_size": 1 << 18, "max_positions": 1 << 20}
Model = TypeVar("Model", bound="PolicyConfig | LanguageModelConfig")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A typed, immutable record; an unknown or ill-typed field is an error that names it."""


class VisionConfig(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A SigLIP vision transformer. `ternary`: its linear layers are; otherwise they stay in full precision.

    `film`: what the policy is told scales and shifts the features in every layer (OpenVLA-OFT+, arXiv 2502.19645).
    """

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 26
    num_heads: int = 16
    layer_norm_eps: float = 1e-6
    ternary: bool = True
    film: bool = False

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class LanguageConfig(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A BitNet decoder. `bidirectional`: every token sees every token (OFT); otherwise causal, as what is written
    token by token must be: text, and actions as tokens."""

    vocab_size: int = 128264
    hidden_size: int = 2560
    intermediate_size: int = 6912
    num_layers: int = 30
    num_heads: int = 20
    num_kv_heads: int = 5
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    max_positions: int = 4096
    bidirectional: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class FlowConfig(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A flow-matching action expert (pi0, arXiv 2410.24164): a transformer over the steps of the chunk that turns noise
    into actions, in `steps` steps of Euler's method.

    `precision` of its layers in a ternary policy: trained and stored ternary, or trained in full precision and stored
    as all full-precision matrices are, or in bfloat16 or int8 whatever those are.
    """

    hidden_size: int = 256
    intermediate_size: int = 1024
    num_layers: int = 4
    num_heads: int = 4
    layer_norm_eps: float = 1e-6
    steps: int = 10
    precision: Precision = "full"

    @property
    def ternary(self) -> bool:
        return self.precision == "ternary"

    @property
    def frequencies(self) -> list[float]:
        """Of the sines and cosines that tell the time of the flow, 0 to 1: periods from 0.004 to 4, as in pi0."""
        pairs = self.hidden_size // 2
        return [2 * math.pi / (0.004 * 1000 ** (pair / max(1, pairs - 1))) for pair in range(pairs)]


class ActionConfig(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Action slots and the head over them: regressed (L1), or with `flow` a flow-matching expert.

    `slots_per_step` decoder positions make up the input of the head for one step of the chunk: BitVLA uses one a
    dimension (56 slots for 8 x 7); a nano model may use fewer.

    `max_prefix`: the most first actions of a chunk that may be given as decided, for the rest to continue
    (real-time chunking); 0: the policy was not trained for any.

    With `flow` the sizes of the regression head are 0.

    With `bins` there is neither slot, head nor state, and their sizes are 0: the decoder writes one action, a token a
    dimension. The last `bins` tokens of the vocabulary are the values from high to low (OpenVLA).
    """

    horizon: int = 8
    dim: int = 7
    state_dim: int = 8
    slots_per_step: int = 7
    head_hidden_size: int = 2560
    head_blocks: int = 2
    max_prefix: int = 0
    bins: int = 0
    flow: FlowConfig | None = None

    @property
    def num_slots(self) -> int:
        return self.horizon * self.slots_per_step


class ImageProcessing(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From a camera's uint8 image to the network's pixels, in this order.

    rotate by 180 degrees -> JPEG round trip -> resize to `image_size` -> central crop of `crop_area`, resized back
    with bilinear interpolation -> (x / 255 - mean) / std. With `resize="none"` the crop is cut from the raw image.
    The processor of SigLIP, which base models use, is "bicubic" with all of the area.

    `rounding` says how pixels become whole numbers again. "pillow": Pillow's integer arithmetic. "tensorflow": float
    arithmetic, rounded to nearest after the resize; after the crop, x * 255.5 / 255 is cut off, which is up to one
    level darker. The official BitVLA uses the latter.
    """

    rotate180: bool = False
    jpeg_quality: int | None = None
    resize: Literal["none", "lanczos", "bicubic"] = "none"
    crop_area: float = 0.9
    rounding: Literal["pillow", "tensorflow"] = "pillow"
    mean: float = 0.5
    std: float = 0.5


class Camera(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named camera and the size of the images it must deliver, in pixels."""

    name: str
    height: int
    width: int


class PromptConfig(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an instruction becomes tokens. `{images}` expands to one image token a patch and camera."""

    template: str
    image_token: str = "<|image_pad|>"
    proprio_token: str = "<proprio_pad>"
    stop_token: str = "<|end_of_text|>"
    pad_token: str = "<|pad|>"
    lower_case: bool = True
    max_instruction_tokens: int = 64


class Statistics(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds that map a vector to [-1, 1], usually the 1 % and 99 % quantiles of the training data.

    Where `mask` is False the value passes through unchanged.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]


class ProcessingConfig(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The conventions of the robot the policy was trained for."""

    cameras: tuple[Camera, ...]
    image: ImageProcessing
    prompt: PromptConfig
    state: Statistics
    action: Statistics
    control_hz: float
    execute_horizon: int
    gripper: Literal["as_is", "libero"] = "as_is"


class PolicyConfig(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole policy. `precision` says what its linear layers compute with."""

    name: str
    vision: VisionConfig
    language: LanguageConfig
    action: ActionConfig
    processing: ProcessingConfig
    precision: Literal["full", "ternary"] = "ternary"


class ChatConfig(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a conversation becomes tokens: `begin` once, then `turn` for each thing the user says.

    A stop token ends an answer; the first one is put where an answer was cut short. What is said with images becomes
    `turn_with_images`; there `{images}` expands to an `image_token` a patch for each, with a space between two images.
    """

    begin: str
    turn: str
    stop_tokens: tuple[str, ...]
    turn_with_images: str = ""
    image_token: str = ""


class LanguageModelConfig(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A BitNet language model. Its head is its embedding, or with `tied` False a matrix of its own.

    With a vision tower it answers questions about images; `image` says how they become pixels. `precision` is that of
    its linear layers in training: "ternary" without those of a tower whose `ternary` is False.
    """

    name: str
    language: LanguageConfig
    chat: ChatConfig
    tied: bool = True
    vision: VisionConfig | None = None
    image: ImageProcessing | None = None
    precision: Literal["full", "ternary"] = "ternary"


def check(config: Model) -> Model:
    """Return `config`, or raise BitvlaError naming the first value that cannot be right."""
    kind = "policy" if isinstance(config, PolicyConfig) else "language model"
    _check_sizes(kind, config)
    if isinstance(config, LanguageModelConfig):
        _check_rules(kind, [
            *_language_rules(config.language),
            (not config.language.bidirectional, "language.bidirectional is true; only a causal decoder writes text"),
            (config.chat.turn.count("{prompt}") == 1, "chat.turn must hold {prompt} once"),
            (len(config.chat.stop_tokens) > 0, "chat.stop_tokens is empty: no answer would end"),
            *_sight_rules(config),
        ])  # fmt: skip
        return config
    vision, language, action, processing = config.vision, config.language, config.action, config.processing
    by_tokens = action.bins > 0
    rules = [
        (1 <= processing.execute_horizon <= action.horizon, f"processing.execute_horizon "
         f"{processing.execute_horizon} is not within 1 and action.horizon {action.horizon}"),
        (action.max_prefix < action.horizon, f"action.max_prefix {action.max_prefix} leaves nothing of action.horizon "
         f"{action.horizon} to decide"),
        (language.max_positions > action.num_slots + vision.num_patches * len(processing.cameras) + 2,
         f"language.max_positions {language.max_positions} has no room for images, slots and an instruction"),
        (processing.control_hz > 0, f"processing.control_hz {processing.control_hz} is not positive"),
        (len(processing.cameras) > 0, "processing.cameras is empty: a policy needs at least one camera"),
        (len({camera.name for camera in processing.cameras}) == len(processing.cameras),
         "processing.cameras names one camera twice"),
        (all(processing.prompt.template.count(part) == 1 for part in ("{images}", "{instruction}")),
         "processing.prompt.template must hold {images} and {instruction} once each"),
        (processing.prompt.template.count(processing.prompt.proprio_token) == (not by_tokens),
         f"processing.prompt.template must hold {processing.prompt.proprio_token} once where the policy takes a "
         "state, and otherwise not"),
        (not by_tokens or (not language.bidirectional and action.horizon == 1),
         f"action.bins is {action.bins}; actions as tokens need a causal decoder and a horizon of 1"),
        (not by_tokens or 1 < action.bins < language.vocab_size,
         f"action.bins is {action.bins}; it must be at least 2, and less than language.vocab_size"),
        (processing.prompt.image_token not in processing.prompt.template,
         f"processing.prompt.template holds {processing.prompt.image_token}; {{images}} stands for all of them"),
    ]  # fmt: skip
    rules += _image_rules("processing.image", processing.image)
    _check_rules(kind, _language_rules(language) + _vision_rules(vision) + _flow_rules(action) + rules)
    for name, statistics, size in (
        ("state", processing.state, action.state_dim),
        ("action", processing.action, action.dim),
    ):
        _check_statistics(name, statistics, size)
    return config


def _language_rules(language: LanguageConfig) -> list[tuple[bool, str]]:
    return [
        (language.hidden_size % (2 * language.num_heads) == 0, f"language.hidden_size {language.hidden_size} does not "
         f"give an even head size for language.num_heads {language.num_heads}"),
        _head_rule("language", language.hidden_size, language.num_heads),
        (language.num_heads % language.num_kv_heads == 0, f"language.num_heads {language.num_heads} is not a multiple "
         f"of language.num_kv_heads {language.num_kv_heads}"),
        (language.rope_theta > 0 and language.rms_norm_eps > 0,
         "language.rope_theta and language.rms_norm_eps must be positive"),
    ]  # fmt: skip


def _vision_rules(vision: VisionConfig) -> list[tuple[bool, str]]:
    return [
        (vision.image_size % vision.patch_size == 0, f"vision.image_size {vision.image_size} is not a multiple of "
         f"vision.patch_size {vision.patch_size}"),
        (vision.hidden_size % vision.num_heads == 0, f"vision.hidden_size {vision.hidden_size} is not a multiple of "
         f"vision.num_heads {vision.num_heads}"),
        _head_rule("vision", vision.hidden_size, vision.num_heads),
        (vision.layer_norm_eps > 0, f"vision.layer_norm_eps {vision.layer_norm_eps} is not positive"),
    ]  # fmt: skip


def _image_rules(section: str, image: ImageProcessing) -> list[tuple[bool, str]]:
    return [
        (0 < image.crop_area <= 1, f"{section}.crop_area {image.crop_area} is not in (0, 1]"),
        (0 < image.std < math.inf and math.isfinite(image.mean),
         f"{section}.mean {image.mean} and std {image.std} must be finite, the latter positive"),
        (image.jpeg_quality is None or 1 <= image.jpeg_quality <= 100,
         f"{section}.jpeg_quality {image.jpeg_quality} is not within 1 and 100"),
    ]  # fmt: skip


def _flow_rules(action: ActionConfig) -> list[tuple[bool, str]]:
    flow = action.flow
    if flow is None:
        return []
    return [
        (not action.bins, "action.flow and action.bins are two kinds of actions; leave out one of them"),
        (flow.hidden_size % 2 == 0 and flow.hidden_size % flow.num_heads == 0, f"action.flow.hidden_size "
         f"{flow.hidden_size} is not even, or not a multiple of action.flow.num_heads {flow.num_heads}"),
        _head_rule("action.flow", flow.hidden_size, flow.num_heads),
        (flow.steps <= 1000, f"action.flow.steps is {flow.steps}; more than 1000 are a mistake"),
        (flow.layer_norm_eps > 0, f"action.flow.layer_norm_eps {flow.layer_norm_eps} is not positive"),
    ]  # fmt: skip


def _head_rule(section: str, hidden_size: int, num_heads: int) -> tuple[bool, str]:
    return (hidden_size <= num_heads * MAX_HEAD_SIZE, f"{section}.hidden_size {hidden_size} gives each of "
            f"{section}.num_heads {num_heads} more than {MAX_HEAD_SIZE} values")  # fmt: skip


def _sight_rules(config: LanguageModelConfig) -> list[tuple[bool, str]]:
    """What a language model needs to see images; nothing for one that sees none."""
    chat, image = config.chat, config.image
    if config.vision is None or image is None:
        return [(config.vision is None and image is None, "vision and image belong together; one of them is missing")]
    return [
        *_vision_rules(config.vision),
        (not config.vision.film, "vision.film is true; only the tower of a policy knows what is said"),
        (all(chat.turn_with_images.count(part) == 1 for part in ("{images}", "{prompt}")),
         "chat.turn_with_images must hold {images} and {prompt} once each"),
        (len(chat.image_token) > 0, "chat.image_token is empty: nothing would stand for images"),
        *_image_rules("image", image),
    ]  # fmt: skip


def _check_rules(kind: str, rules: Iterable[tuple[bool, str]]) -> None:
    for holds, message in rules:
        if not holds:
            raise BitvlaError(f"{kind} configuration: {message}")


def _check_sizes(kind: str, config: PolicyConfig | LanguageModelConfig) -> None:
    sections: dict[str, Record] = {"language": config.language}
    if config.vision is not None:
        sections["vision"] = config.vision
    # Sizes of what a policy may do without.
    optional = {"head_blocks", "bins", "max_prefix"}
    absent: set[str] = set()
    why = "actions are tokens"
    if isinstance(config, PolicyConfig):
        if config.action.bins:
            absent = {"state_dim", "slots_per_step", "head_hidden_size", "head_blocks"}
        elif config.action.flow is not None:
            absent, why = {"head_hidden_size", "head_blocks"}, "action.flow takes the place of this head"
            sections["action.flow"] = config.action.flow
        sections["action"] = config.action
        sections |= {f"camera '{camera.name}'": camera for camera in config.processing.cameras}
    for section, value in sections.items():
        for field in value.__struct_fields__:
            size = getattr(value, field)
            least, most = 0 if field in optional | absent else 1, 0 if field in absent else _MOST.get(field, _LARGEST)
            if type(size) is int and not least <= size <= most:
                allowed = f"0, as {why}" if field in absent else f"a size from {least} to {most}"
                raise BitvlaError(f"{kind} configuration: {section}.{field} is {size}; it must be {allowed}")


def _check_statistics(name: str, statistics: Statistics, size: int) -> None:
    fields = (statistics.names, statistics.units, statistics.low, statistics.high, statistics.mask)
    if any(len(field) != size for field in fields):
        raise BitvlaError(
            f"{name} statistics hold {[len(field) for field in fields]} values, the policy needs {size} of each; "
            "compute them from the training data again"
        )
    for label, low, high, used in zip(statistics.names, statistics.low, statistics.high, statistics.mask, strict=True):
        # NaN fails every comparison, so the condition is written to hold only for good values.
        if used and not (-1e6 < low < high < 1e6 and high - low > 1e-6):
            raise BitvlaError(
                f"{name} statistics of '{label}' are missing or constant (low {low}, high {high}); "
                "normalising with them would give wrong actions. Compute them from data in which it moves"
            )


def from_dict(kind: type[T], value: Any, origin: str) -> T:
    """Build a config of type `kind` from plain data; BitvlaError names `origin` and the field at fault."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise BitvlaError(f"{origin}: {error}{_field_meant(kind, str(error))}") from None


def _field_meant(kind: Any, message: str) -> str:
    """Which field of `kind`, or of the record inside it that `message` names, an unknown one was meant to be."""
    found = re.fullmatch(r"Object contains unknown field `(.+?)`(?: - at `(.+)`)?", message)
    if found is None:
        return ""
    record = kind
    for name in re.findall(r"\.(\w+)", found[2] or ""):
        record = _record_of(get_type_hints(record)[name])
    return meant(found[1], record.__struct_fields__)


def _record_of(hint: Any) -> Any:
    """The record in a type: itself, or the one in its union or tuple."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint
    return next(filter(None, map(_record_of, get_args(hint))), None)


def load_toml(kind: type[T], path: Path) -> T:
    """Read a config of type `kind` from a TOML file."""
    return from_dict(kind, read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds; BitvlaError where it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise BitvlaError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BitvlaError(f"{path} is not valid TOML: {error}") from None


def to_dict(config: msgspec.Struct) -> dict[str, Any]:
    """Plain data (dicts, lists, numbers, strings) of a config: the inverse of `from_dict`."""
    return msgspec.to_builtins(config)
