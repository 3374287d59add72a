"""What a stage may start from: which checkpoints, configuration and data fit together, or why they do not.

Nothing here reads weights or data's frames: `bitvla train --plan` refuses what training does, in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from bitvla.bundle import TensorSpec
from bitvla.config import LanguageModelConfig, PolicyConfig, check
from bitvla.data.lerobot import LeRobotDataset
from bitvla.errors import BitvlaError, meant
from bitvla.model.lora import ADAPTED
from bitvla.model.network import Backbone, VisionLanguageModel
from bitvla.train import stages
from bitvla.train.config import NO_POLICY, NewPolicy, TrainConfig, extended

OF_SCENES = ("auxiliary_weight", "keypoint_weight")  # what a policy that acts may learn besides
# What a configuration may ask of a policy, and not of a vision-language model.
OF_POLICIES = ("policy", "data", "mixture", "film", "max_prefix", "flow", "balance_tasks", *OF_SCENES)


class Start(Protocol):
    """A checkpoint as its configuration has it, opened or not."""

    @property
    def folder(self) -> Path: ...

    @property
    def config(self) -> PolicyConfig | LanguageModelConfig: ...

    @property
    def provenance(self) -> dict[str, Any]: ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...


# -- a stage and what it was given ---------------------------------------------------


def check_stage(stage: str, teacher: Path | None) -> None:
    """BitvlaError for a stage that does not exist, cannot do without a teacher, or has none."""
    if stage not in stages.NAMES:
        raise BitvlaError(f"unknown stage '{stage}': use one of {', '.join(stages.NAMES)}")
    if stage == "distill" and teacher is None:
        raise BitvlaError("stage 'distill' needs a full-precision teacher: --teacher CHECKPOINT")
    if stage != "distill" and teacher is not None:
        raise BitvlaError(f"stage '{stage}' follows no teacher; leave out --teacher, or say --init to start from it")


def check_out(out: Path, parents: Iterable[Path]) -> None:
    """BitvlaError for a run that would overwrite what it begins with."""
    if any(out.resolve() == parent.resolve() for parent in parents):
        raise BitvlaError(f"--out {out} holds the checkpoint to start from, which would be overwritten; choose another")


def check_tower(stage: str, init: Path | None, tower: Path | None) -> None:
    """BitvlaError for a tower where nothing begins to see."""
    if tower is not None and (stage != "align" or init is None):
        raise BitvlaError("--tower is for stage 'align', with a language model as --init; leave it out, or give both")


def check_teacher(
    config: PolicyConfig | LanguageModelConfig, teacher: Path, provenance: Mapping[str, Any] | None = None
) -> None:
    """BitvlaError for a checkpoint that no student can follow."""
    if isinstance(config, LanguageModelConfig):
        if config.precision == "ternary" and config.vision and config.vision.ternary:
            raise BitvlaError(f"the tower of the teacher {teacher} is ternary; distillation needs full precision")
        return
    if config.precision != "full":
        raise BitvlaError(f"the teacher {teacher} is {config.precision}; distillation needs full precision")
    trained = (provenance or {}).get("stage")
    if trained in ("localize", "pretrain"):
        raise BitvlaError(f"the teacher {teacher} is of stage '{trained}' and has no action head; finetune it first")


def trains_language(stage: str, teacher: PolicyConfig | LanguageModelConfig | None) -> bool:
    """Does this stage train a vision-language model, on conversations?"""
    return stage in ("align", "instruct") or (stage == "distill" and isinstance(teacher, LanguageModelConfig))


def check_asked(stage: str, config: TrainConfig, of_language: bool) -> None:
    """BitvlaError where a configuration asks for what its stage does not do, as adapters or a policy's parts."""
    for name in OF_POLICIES if of_language else ("model", *OF_SCENES) if stage == "pretrain" else ("model",):
        if getattr(config, name):
            data = "conversations" if of_language else "demonstrations"
            raise BitvlaError(f"stage '{stage}' trains on {data} here and has no use for {name}; leave it out")
    if stage == "localize" and not config.keypoint_weight:
        raise BitvlaError("stage 'localize' learns where things are: it needs keypoint_weight above 0")
    if config.mixture and stage != "pretrain":
        raise BitvlaError(f"stage '{stage}' trains on one dataset; leave out mixture")
    if config.lora_rank and stage == "localize":
        raise BitvlaError("stage 'localize' trains a new tower; leave out lora_rank")
    if config.lora_rank and of_language:
        raise BitvlaError("adapters are of policies; leave out lora_rank, and say in learning_parts what learns")
    if config.lora_rank and config.learning_parts is not None:
        raise BitvlaError("lora_rank and learning_parts both say what learns; leave out one of them")


def check_mixture(stage: str, config: TrainConfig, names: list[str]) -> None:
    """BitvlaError where the datasets of these `names` are not those of the configuration, or too many."""
    for name in config.data:
        if name not in names:
            raise BitvlaError(f"the configuration describes the data '{name}', which is no --data{meant(name, names)}")
    if stage != "pretrain":
        if len(names) > 1:
            raise BitvlaError(f"stage '{stage}' trains on one dataset, not on {', '.join(names)}")
        return
    if len(set(names)) < len(names):
        raise BitvlaError(f"two datasets of a mixture have the same name: {', '.join(sorted(names))}; rename a folder")
    for name in config.mixture:
        if name not in names:
            raise BitvlaError(f"the mixture has a weight for '{name}', which is no --data{meant(name, names)}")
    for name in names:
        if config.mixture and name not in config.mixture:
            raise BitvlaError(f"the mixture has no weight for '{name}'; give one to every --data, or to none")


# -- what it trains ------------------------------------------------------------------


def start_policy(
    stage: str, config: TrainConfig, start: Start | None, describe: Callable[[NewPolicy], PolicyConfig]
) -> PolicyConfig:
    """The policy that a stage trains: that of the checkpoint `start`, or what `describe` makes of a [policy] section.

    The latter perhaps over a base model, or over a policy that acts otherwise.
    """
    stored = start.config if start is not None and isinstance(start.config, PolicyConfig) else None
    if start is not None and stored is not None and bool(stored.action.bins) == (stage == "pretrain"):
        policy = msgspec.structs.replace(stored, precision=config.precision)
        if config.policy is not None:
            _check_policy_section(config.policy, stored, start)
    elif start is not None and stored is not None and stage == "pretrain":
        raise BitvlaError(
            f"{start.folder} regresses its actions; stage 'pretrain' goes on from a pre-trained checkpoint only"
        )
    elif config.policy is None:
        raise BitvlaError(
            NO_POLICY
            if start is None
            else f"{start.folder} is pre-trained and knows no action head; describe the policy in a [policy] section"
        )
    else:
        policy = describe(config.policy)
    if bool(policy.action.bins) != (stage == "pretrain"):
        raise BitvlaError(
            "stage 'pretrain' writes actions as tokens: policy.action needs bins, as in bins = 256"
            if stage == "pretrain"
            else f"stage '{stage}' regresses its actions: leave out policy.action.bins"
        )
    policy = extended(policy, config)
    if start is not None:
        if config.lora_rank:  # to which no tokens are added
            check_same("policy.language", policy.language, start.config.language, start, ("bidirectional",))
        check_backbone(policy, start)
    return policy


def start_model(stage: str, config: TrainConfig, start: Start | None) -> LanguageModelConfig:
    """The vision-language model that a stage trains: that of the checkpoint `start`, or that of a [model] section.

    The latter perhaps with the tower of a policy.
    """
    if start is not None and isinstance(start.config, LanguageModelConfig):
        model = start.config
        if config.model is not None:
            for part in ("vision", "language", "image", "chat"):
                if (wanted := getattr(config.model, part)) is not None:
                    check_same(f"model.{part}", wanted, getattr(model, part), start)
            check_same("model", config.model, model, start, ("name", "precision"))
    elif config.model is not None:
        model = config.model
    else:
        raise BitvlaError(
            "the configuration has no [model] section: give the model to go on from (--init, or --teacher to distill), "
            "or describe a new one there"
        )
    if model.vision is None:
        raise BitvlaError(f"the model '{model.name}' has no vision tower; describe one in [model]")
    if start is not None and isinstance(start.config, PolicyConfig):
        check_same("model.vision", model.vision, start.config.vision, start, ("ternary",))
    vision = msgspec.structs.replace(model.vision, ternary=True) if stage == "distill" else model.vision
    return check(msgspec.structs.replace(model, vision=vision, precision=config.precision))


def check_backbone(policy: PolicyConfig, start: Start) -> None:
    """Tower and decoder must be those of the checkpoint; the decoder may become causal or not, the tower get FiLM.

    Where tokens are actions, the decoder may get more of them.
    """
    stored, tokens = start.config, policy.language.vocab_size
    causal = msgspec.structs.replace(
        policy.language,
        bidirectional=stored.language.bidirectional,
        vocab_size=min(tokens, stored.language.vocab_size) if policy.action.bins else tokens,
    )
    filmed = policy.vision.film and stored.vision is not None and stored.vision.film
    tower = msgspec.structs.replace(policy.vision, film=filmed)
    check_same("policy.vision", tower, stored.vision, start)
    check_same("policy.language", causal, stored.language, start)


def _check_policy_section(new: NewPolicy, stored: PolicyConfig, start: Start) -> None:
    """Where the checkpoint says what the policy is, a [policy] section must not say otherwise."""
    # Nothing said is as the checkpoint has it; a flow is put in by `extended`.
    but = [name for name, said in (("film", new.vision.film), ("max_prefix", new.action.max_prefix)) if not said]
    but += ["flow", "head_hidden_size", "head_blocks"] if new.action.flow else ["flow"]
    processing = stored.processing
    for name, found in {"vision": stored.vision, "language": stored.language, "action": stored.action,
                        "image": processing.image, "prompt": processing.prompt}.items():  # fmt: skip
        check_same(f"policy.{name}", getattr(new, name), found, start, but)
    said = {"execute_horizon": processing.execute_horizon, "state_units": processing.state.units,
            "action_units": processing.action.units}  # fmt: skip
    if new.cameras is not None:
        said["cameras"] = tuple(camera.name for camera in processing.cameras)
    for name, value in said.items():
        _check_equal(f"policy.{name}", getattr(new, name), value, start)


def check_same(section: str, wanted: Any, found: Any, start: Start, but: Collection[str] = ()) -> None:
    """BitvlaError for a field of two records that differs, `but` for these."""
    for field in wanted.__struct_fields__:
        if field not in but:
            _check_equal(f"{section}.{field}", getattr(wanted, field), getattr(found, field), start)


def _check_equal(name: str, wanted: Any, found: Any, start: Start) -> None:
    if wanted != found:
        raise BitvlaError(f"{name} is {wanted}, {start.folder} has {found}; make them equal")


# -- what it needs of data, teacher and weights --------------------------------------


def check_data(policy: PolicyConfig, dataset: LeRobotDataset, start: Start) -> None:
    """BitvlaError for demonstrations of another robot than the `policy` of the checkpoint `start` knows."""
    wanted = [camera.name for camera in policy.processing.cameras]
    if not set(wanted) <= set(dataset.cameras):
        raise BitvlaError(
            f"{start.folder} was trained on the cameras {wanted}, the data has {list(dataset.cameras)}; say in the "
            f"configuration which are which: data.{dataset.name}.cameras"
        )
    for camera in policy.processing.cameras:
        if (size := dataset.shape(camera.name)[:2]) != (camera.height, camera.width):
            raise BitvlaError(
                f"{start.folder} takes pictures of {camera.height} x {camera.width} from the camera '{camera.name}', "
                f"the data has {size[0]} x {size[1]}; record or convert them at that size"
            )
    if not math.isclose(rate := policy.processing.control_hz, dataset.fps, rel_tol=0.01):
        raise BitvlaError(
            f"{start.folder} acts {rate:g} times a second, {dataset.name} has {dataset.fps:g} actions a second; where "
            f"that is not their rate, say so in the configuration: data.{dataset.name}.control_hz = {rate:g}"
        )
    state_dim = 0 if policy.action.bins else dataset.state.shape[1]
    if dataset.action.shape[1] != policy.action.dim or state_dim != policy.action.state_dim:
        raise BitvlaError(
            f"{start.folder} has {policy.action.state_dim} state and {policy.action.dim} action values, the data has "
            f"{dataset.state.shape[1]} and {dataset.action.shape[1]}; give data of the same robot"
        )


def check_follows(student: PolicyConfig | LanguageModelConfig, teacher: Start) -> None:
    """States are compared one to one: of the same layers, over the same tokens of the same observation."""
    followed, of = teacher.config, "the student's "
    check_same(f"{of}vision", student.vision, followed.vision, teacher, ("ternary", "film"))
    if isinstance(student, LanguageModelConfig):
        assert isinstance(followed, LanguageModelConfig)
        check_same(f"{of}image", student.image, followed.image, teacher)
        return
    assert isinstance(followed, PolicyConfig)
    check_same(f"{of}language", student.language, followed.language, teacher)
    but = ["head_hidden_size", "head_blocks", "flow"]
    but += [] if followed.action.max_prefix else ["max_prefix"]  # without it a teacher has no use for decided actions
    check_same(f"{of}action", student.action, followed.action, teacher, but)
    check_same(f"{of}processing", student.processing, followed.processing, teacher, ("execute_horizon",))


def check_frozen(stage: str, network: Backbone, start: Start | None) -> None:
    """BitvlaError where a part of `network` does not learn, nor has before: it would stay random."""
    taught = set() if start is None else _taught(network, start)
    for name, parameter in network.named_parameters():
        name = name.replace(ADAPTED, ".weight")
        if not parameter.requires_grad and name not in taught:
            raise BitvlaError(
                f"in stage '{stage}' {name} does not learn, and "
                f"{'no --init gives it' if start is None else f'{start.folder} has never learnt it'}: it would stay "
                "random; give --init a checkpoint with it, or let its part learn (learning_parts, lora_rank)"
            )


def _taught(network: Backbone, start: Start) -> set[str]:
    """The tensors that `network` takes from a checkpoint and that were trained there."""
    of_policy = isinstance(network, VisionLanguageModel) and isinstance(start.config, PolicyConfig)
    part = "vision_tower." if of_policy or _is_a_tower(start.provenance) else ""
    return {name for name in start.specs if name.startswith(part)}


def _is_a_tower(provenance: Mapping[str, Any]) -> bool:
    """Has no stage trained anything but the vision tower of this checkpoint?"""
    parents = provenance.get("parents", {}).values()
    return provenance.get("stage") == "localize" and all(_is_a_tower(parent["provenance"]) for parent in parents)
