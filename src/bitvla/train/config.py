"""What a training run is: one TOML file, typed. Unknown keys are errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from bitvla.config import (
    ActionConfig,
    Camera,
    FlowConfig,
    ImageProcessing,
    LanguageConfig,
    LanguageModelConfig,
    PolicyConfig,
    ProcessingConfig,
    PromptConfig,
    Record,
    Statistics,
    VisionConfig,
    check,
    load_toml,
)
from bitvla.data.lerobot import Conventions, LeRobotDataset, names_of
from bitvla.errors import BitvlaError

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Augmentation(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Random changes of training images. The crop's area is the policy's `crop_area`; its place is random."""

    random_crop: bool = True
    brightness: Share = 0.2
    contrast: Share = 0.2
    saturation: Share = 0.2


Part = Literal["tower", "connector", "decoder", "head"]
NO_POLICY = (
    "the configuration has no [policy] section: give the checkpoint to go on from (--init, or --teacher to distill), "
    "or describe a new policy there"
)
NO_STATE = Statistics(names=(), units=(), low=(), high=(), mask=())


class NewPolicy(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes and conventions of a policy trained from scratch; its statistics come from the data.

    `cameras` chooses among those of the data; None: all of them.
    """

    name: str
    cameras: tuple[str, ...] | None = None
    vision: VisionConfig
    language: LanguageConfig
    action: ActionConfig
    image: ImageProcessing
    prompt: PromptConfig
    state_units: tuple[str, ...]
    action_units: tuple[str, ...]
    execute_horizon: int


class TrainConfig(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage of training. A policy is either new (`policy`) or comes from a checkpoint (`--init`); so is the
    vision-language model (`model`) of the stages over conversations.

    `batch_size` windows, shared by all processes, are one pass; `gradient_accumulation` passes are one step.
    """

    steps: int
    batch_size: int
    learning_rate: float
    vision_learning_rate: float | None = None  # of the vision tower, where it has another
    precision: Literal["full", "ternary"]
    # Muon orthogonalises the update of every matrix inside a block (Jordan et al., 2024); the rest has AdamW.
    optimizer: Literal["adamw", "muon"] = "adamw"
    policy: NewPolicy | None = None
    model: LanguageModelConfig | None = None
    # Which parts learn. None: of a policy all, in align, instruct and distill of a vision-language model those of the
    # paper. The projectors of state and prefix are with the connector.
    learning_parts: tuple[Part, ...] | None = None
    max_tokens: int = 2048  # of a conversation, images included; what is longer is left out
    seed: int = 7
    warmup_steps: int = 375
    decay: Literal["cosine", "linear"] = "cosine"  # of the learning rate after the warm-up, to zero
    weight_decay: float = 0.01
    weight_decay_steps: int | None = None  # in so many first steps (None: in all), as BitNet b1.58 2B4T was trained
    clip_gradient: float = 1.0  # 0: not at all
    gradient_accumulation: int = 1
    ema_decay: float = 0.999
    mixed_precision: Literal["no", "bf16"] = "bf16"
    compile: bool = False
    checkpoint_activations: bool = False  # less memory, a third more work
    shard: bool = False  # weights, gradients and optimiser state are spread over the processes (FSDP2)
    data: dict[str, Conventions] = msgspec.field(default_factory=dict)  # by a dataset's name: its folder's
    mixture: dict[str, float] = msgspec.field(default_factory=dict)  # pretrain: weight by dataset's folder name
    # Adapters of this rank (LoRA), weighing alpha / rank, are trained in place of tower, connector and decoder: one for
    # each of their linear layers. The parts that act are trained whole. 0: everything is.
    lora_rank: int = 0
    lora_alpha: float = 16.0
    film: bool = False  # adds FiLM to the tower, as nothing at first (False: as the policy has it)
    workers: int = 1  # that prepare batches, a process of training
    alignment_weight: float = 0.1  # gamma of the paper: hidden states of student and teacher (distill)
    # Real-time chunking: up to so many first actions of a window are given as decided (None: as the policy has it), in
    # all windows but this share; the loss is over the others.
    max_prefix: int | None = None
    prefix_dropout: float = 0.5
    # A flow-matching action expert in place of the policy's regression head (None: as the policy has it), and how many
    # noises and times of the flow each window's hidden states serve in a pass.
    flow: FlowConfig | None = None
    flow_samples: int = 4
    # Heads that are thrown away: privileged positions read from the proprio token, places in the image from patches.
    auxiliary_weight: float = 0.0
    keypoint_weight: float = 0.0
    balance_tasks: bool = False  # every task equally often, however long its episodes are
    augmentation: Augmentation = msgspec.field(default_factory=Augmentation)
    log_every: int = 20
    save_every: int = 500
    validation_batches: int = 4
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # beside metrics.jsonl


# How a run is computed, watched and kept, not what it learns: it goes on with others, as on other machines.
FREE_TO_CHANGE = ("workers", "compile", "checkpoint_activations", "shard", "log_every", "save_every",
                  "validation_batches", "trackers")  # fmt: skip


def load(path: Path) -> TrainConfig:
    """Read and check a training configuration; BitvlaError names the file and the key at fault."""
    config = load_toml(TrainConfig, path)
    positive = ("steps", "batch_size", "learning_rate", "log_every", "save_every", "gradient_accumulation", "workers")
    for name in (*positive, "flow_samples", "max_tokens", "vision_learning_rate"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise BitvlaError(f"{path}: {name} must be positive, it is {value}")
    from_zero = ("seed", "warmup_steps", "weight_decay", "weight_decay_steps", "clip_gradient", "validation_batches")
    for name in (*from_zero, "alignment_weight", "auxiliary_weight", "keypoint_weight"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise BitvlaError(f"{path}: {name} must not be negative, it is {value}")
    if config.seed >= 1 << 32:
        raise BitvlaError(f"{path}: seed must be below 2**32, it is {config.seed}")
    if not 0 <= config.ema_decay < 1:
        raise BitvlaError(f"{path}: ema_decay must be from 0 to below 1, it is {config.ema_decay}")
    for name, weight in config.mixture.items():
        if not 0 < weight < math.inf:
            raise BitvlaError(
                f"{path}: the mixture's weight of '{name}' is {weight}; it must be positive, or leave out the dataset"
            )
    if config.shard and (config.optimizer == "muon" or config.auxiliary_weight or config.keypoint_weight):
        raise BitvlaError(f"{path}: shard = true needs optimizer 'adamw', and auxiliary_weight and keypoint_weight 0")
    if config.lora_rank < 0 or not 0 < config.lora_alpha < math.inf:
        raise BitvlaError(
            f"{path}: lora_rank is {config.lora_rank} and lora_alpha {config.lora_alpha}; give a rank from 1, or 0 for "
            "none, and a positive alpha"
        )
    if not 0 <= config.prefix_dropout <= 1:
        raise BitvlaError(f"{path}: prefix_dropout {config.prefix_dropout} is not a share from 0 to 1")
    return config


def extended(policy: PolicyConfig, config: TrainConfig) -> PolicyConfig:
    """`policy` with the prefix, the flow and the FiLM that `config` asks for."""
    changes: dict[str, Any] = {} if config.max_prefix is None else {"max_prefix": config.max_prefix}
    flow = config.flow or (config.policy and config.policy.action.flow)
    if flow:
        changes |= {"flow": flow, "head_hidden_size": 0, "head_blocks": 0}
    action = msgspec.structs.replace(policy.action, **changes)
    vision = msgspec.structs.replace(policy.vision, film=config.film or policy.vision.film)
    return check(msgspec.structs.replace(policy, action=action, vision=vision))


def check_units(new: NewPolicy) -> None:
    """BitvlaError where not every value of state and action has its unit."""
    for key, units, name, size in (
        ("state_units", new.state_units, "state_dim", new.action.state_dim),
        ("action_units", new.action_units, "dim", new.action.dim),
    ):
        if size != len(units):
            raise BitvlaError(f"policy.{key} names {len(units)} units, policy.action.{name} is {size}; name one each")


def policy_config(new: NewPolicy, dataset: LeRobotDataset, precision: Literal["full", "ternary"]) -> PolicyConfig:
    """The configuration of a new policy, with cameras, statistics and control rate taken from its data."""
    names = dataset.cameras if new.cameras is None else new.cameras
    for name in names:
        if name not in dataset.cameras:
            raise BitvlaError(
                f"{dataset.root} has no camera '{name}', only {', '.join(dataset.cameras)}; change policy.cameras, or "
                f'say what each is called there: [data.{dataset.name}] cameras = {{ {name} = "...", ... }}'
            )
    for name, size, vectors in (
        ("state_dim", new.action.state_dim, dataset.state),
        ("dim", new.action.dim, dataset.action),
    ):
        if size and size != vectors.shape[1]:
            raise BitvlaError(
                f"{dataset.name} has vectors of {vectors.shape[1]}, policy.action.{name} is {size}; change it"
            )
    check_units(new)
    config = PolicyConfig(
        name=new.name,
        vision=new.vision,
        language=new.language,
        action=new.action,
        precision=precision,
        processing=ProcessingConfig(
            cameras=tuple(_camera(dataset, name) for name in names),
            image=new.image,
            prompt=new.prompt,
            state=_statistics(dataset, "observation.state", new.state_units) if new.action.state_dim else NO_STATE,
            action=_statistics(dataset, "action", new.action_units),
            control_hz=float(dataset.fps),
            execute_horizon=new.execute_horizon,
        ),
    )
    return check(config)


def for_dataset(config: PolicyConfig, dataset: LeRobotDataset) -> PolicyConfig:
    """`config` on another robot: with the cameras, action statistics and control rate of `dataset`."""
    action = _statistics(dataset, "action", ("",) * dataset.action.shape[1])
    processing = msgspec.structs.replace(
        config.processing,
        cameras=tuple(_camera(dataset, name) for name in dataset.cameras),
        action=action,
        control_hz=float(dataset.fps),
    )
    sizes = msgspec.structs.replace(config.action, dim=len(action.names))
    return check(msgspec.structs.replace(config, action=sizes, processing=processing))


def _camera(dataset: LeRobotDataset, name: str) -> Camera:
    height, width, _ = dataset.shape(name)
    return Camera(name=name, height=height, width=width)


def _statistics(dataset: LeRobotDataset, key: str, units: tuple[str, ...]) -> Statistics:
    stats = dataset.stats[key]
    names = tuple(names_of(dataset.features[key]))
    return Statistics(
        names=names,
        units=units,
        low=tuple(float(value) for value in stats["q01"]),
        high=tuple(float(value) for value in stats["q99"]),
        mask=(True,) * len(names),
    )
