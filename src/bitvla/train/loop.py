"""The one training loop: steps, learning rate, average weights, progress, checkpoints, resume."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import math
import os
import platform
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor
from torch._functorch import config as functorch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

import bitvla
from bitvla.config import LanguageModelConfig, PolicyConfig, to_dict
from bitvla.convert.source import Source
from bitvla.convert.training import Adapters, open_start
from bitvla.data.lerobot import AS_STORED, LeRobotDataset, name_of
from bitvla.data.llava import LlavaDataset
from bitvla.errors import BitvlaError, meant
from bitvla.model.checkpoint import golden_tensors, load_network, save_checkpoint
from bitvla.model.lora import add_adapters, trained_state
from bitvla.model.network import Backbone, BitVLA, checkpoint_activations, layers
from bitvla.model.policy import TorchPolicy
from bitvla.processing.prompt import Prompt, train_tokenizer
from bitvla.train import stages
from bitvla.train.batches import Mixture, TokenWindow, Window, Windows, batches, workers_alive
from bitvla.train.config import (
    FREE_TO_CHANGE,
    NO_POLICY,
    NewPolicy,
    TrainConfig,
    extended,
    for_dataset,
    load,
    policy_config,
)

STATE_FILE = "training_state.pt"
GOLDEN_OBSERVATIONS = 2


def run(
    stage: str,
    config_path: Path,
    data: str | Path | Sequence[str | Path],
    out: Path,
    *,
    init: Path | None = None,
    tower: Path | None = None,
    teacher: Path | None = None,
    sentences: list[str] | None = None,
    cache_bytes: int | None = None,
) -> dict[str, Any]:
    """Train a policy and return a summary (steps, losses, checkpoint folder).

    Args:
        stage: one of `stages.NAMES`; "distill" needs `teacher`.
        config_path: TOML file of a `TrainConfig`.
        data: a LeRobotDataset v3, as a folder, an address that fsspec knows, or an id on the Hub; for "pretrain" one
            or several; for "align", "instruct" and the distillation of a vision-language model conversations (see
            `bitvla.data.llava`).
        out: folder of the run. If it holds an unfinished run, that goes on: what changes its learning must be the same.
        init: checkpoint whose weights are the start, of training or published (its folder or its Hub id); by default
            random (finetune) or the teacher's (distill).
        tower: SigLIP checkpoint with whose vision tower a published language model, `init` of "align", begins to see.
        teacher: full-precision checkpoint that a distilled student follows, of training or published.
        sentences: corpus of the tokenizer of a new policy; by default the instructions of the dataset.
        cache_bytes: disk that kept pictures may take, in all; by default what they need.

    Raises:
        BitvlaError: unusable configuration, data or checkpoint; a loss that is not finite.
    """
    check_stage(stage, teacher)
    check_tower(stage, init, tower)
    config = load(config_path)
    start = init or (teacher if stage == "distill" else None)
    sources = [data] if isinstance(data, str | Path) else list(data)
    names = [name_of(source) for source in sources]
    _check_mixture(stage, config, names)
    opened = {path: open_start(path, tower) for path in (start, teacher) if path is not None}
    if teacher is not None:
        check_teacher(opened[teacher].config, teacher, opened[teacher].provenance)
    of_language = trains_language(stage, None if teacher is None else opened[teacher].config)
    check_adapters(stage, config, of_language)
    if config.lora_rank and start is None:
        raise BitvlaError(f"lora_rank is {config.lora_rank}: adapters need a checkpoint to adapt; give one with --init")
    trainer: Trainer
    if of_language:
        from bitvla.train.language import LanguageTrainer  # which is a Trainer

        conversations = LlavaDataset(sources[0], cache_bytes)
        trainer = LanguageTrainer(stage, config, conversations, Path(out), start, teacher, opened)
    else:
        share = None if cache_bytes is None else cache_bytes // len(sources)
        datasets = [
            LeRobotDataset(source, config.data.get(name, AS_STORED), share)
            for source, name in zip(sources, names, strict=True)
        ]
        trainer = Trainer(stage, config, datasets, Path(out), start, teacher, opened, sentences)
    return trainer.train()


def check_stage(stage: str, teacher: Path | None) -> None:
    """BitvlaError for a stage that does not exist, cannot do without a teacher, or has none."""
    if stage not in stages.NAMES:
        raise BitvlaError(f"unknown stage '{stage}': use one of {', '.join(stages.NAMES)}")
    if stage == "distill" and teacher is None:
        raise BitvlaError("stage 'distill' needs a full-precision teacher: --teacher CHECKPOINT")
    if stage != "distill" and teacher is not None:
        raise BitvlaError(f"stage '{stage}' follows no teacher; leave out --teacher, or say --init to start from it")


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


def check_adapters(stage: str, config: TrainConfig, of_language: bool) -> None:
    """BitvlaError where a configuration asks for adapters and its stage trains none."""
    if config.lora_rank and stage == "localize":
        raise BitvlaError("stage 'localize' trains a new tower; leave out lora_rank")
    if config.lora_rank and of_language:
        raise BitvlaError("adapters are of policies; leave out lora_rank, and say in learning_parts what learns")
    if config.lora_rank and config.learning_parts is not None:
        raise BitvlaError("lora_rank and learning_parts both say what learns; leave out one of them")


def _check_mixture(stage: str, config: TrainConfig, names: list[str]) -> None:
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


class Trainer:
    """One run of a stage over demonstrations; `bitvla.train.language` has the one over conversations."""

    def __init__(
        self,
        stage: str,
        config: TrainConfig,
        datasets: list[LeRobotDataset],
        out: Path,
        start: Path | None,
        teacher: Path | None,
        opened: Mapping[Path, Source],
        sentences: list[str] | None,
    ) -> None:
        self.stage, self.config, self.out, self.datasets = stage, config, out, datasets
        self.accelerator = _accelerator(config, out)
        self.console = Console(stderr=True, quiet=not self.accelerator.is_main_process)
        set_seed(config.seed)
        source = None if start is None else opened[start]
        self.network, self.prompt, self.tokenizer = self._policy(source, sentences)
        if config.lora_rank:
            add_adapters(self.network, config.lora_rank, config.lora_alpha)
        positions = keypoints = 0  # that a simulator knows
        if datasets:
            positions = 0 if datasets[0].environment_state is None else datasets[0].environment_state.shape[1]
            keypoints = 0 if datasets[0].keypoints is None else datasets[0].keypoints.shape[2]
        self.auxiliary = stages.AuxiliaryHead(self.network.config, positions, keypoints)
        # Without gradients where nothing is asked of them, as several processes demand.
        acts = stage in ("finetune", "distill")
        self.auxiliary.linear.requires_grad_(bool(positions and config.auxiliary_weight and acts))
        self.auxiliary.points.requires_grad_(bool(keypoints and config.keypoint_weight and stage != "pretrain"))
        # What is saved: whole, and not on the device; brought up to date with the averages when it is needed.
        self.averaged = copy.deepcopy(self.network).requires_grad_(False)
        self.provenance = self._provenance({"init": source, "teacher": None if teacher is None else opened[teacher]})
        if config.lora_rank and start is not None and source is not None:
            base = str(start.resolve()) if start.exists() else str(start)
            self.provenance["adapters"] = to_dict(
                Adapters(base=base, sha256=source.sha256, rank=config.lora_rank, alpha=config.lora_alpha)
            )
        state = self._read_state()
        if state is not None:
            self.network.load_state_dict(self.network.state_dict() | state["network"])
            self.auxiliary.load_state_dict(state["auxiliary"])
            self.averaged.load_state_dict(self.averaged.state_dict() | state["averaged"])
        self.step = 0 if state is None else int(state["step"])
        self._place(self._objective(None if teacher is None else opened[teacher]), state)
        self._last_log: tuple[int, float] | None = None

    def _place(self, objective: stages.Objective, state: dict[str, Any] | None) -> None:
        """Bring everything to its device, or its shards to their processes; optimisers over what is there then."""
        config, device = self.config, self.accelerator.device
        part = stages.trained_part(self.stage, self.network)
        self.objective = objective
        trained = _Trained(part, self.auxiliary, objective, config.compile).to(device)
        self.network.to(device)
        if config.checkpoint_activations:
            checkpoint_activations(part)
        if self._sharded:
            shard(trained)
        whole = stages.trained_part(self.stage, self.averaged).parameters()
        moving = [(p, average) for p, average in zip(part.parameters(), whole, strict=True) if p.requires_grad]
        self.parameters, self.kept_averages = [p for p, _ in moving], [average for _, average in moving]
        self.averages = [_placed_like(p, average.detach()) for p, average in moving]
        self.optimizers = optimizers(self.network, self.auxiliary, config)
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, config))
            for optimizer in self.optimizers
        ]
        for i, (optimizer, schedule) in enumerate(zip(self.optimizers, self.schedules, strict=True)):
            if state is not None:
                optimizer.load_state_dict(_optimizer_state(optimizer, state["optimizers"][i]))
                schedule.load_state_dict(state["schedules"][i])
        # FSDP2 takes care of its gradients itself; without it Accelerate wraps what several processes train.
        self.trained = trained if self._sharded else self.accelerator.prepare_model(trained)
        self.optimizers = [self.accelerator.prepare_optimizer(optimizer) for optimizer in self.optimizers]

    @property
    def dataset(self) -> LeRobotDataset:
        """The first one, whose robot the policy is of."""
        return self.datasets[0]

    @property
    def _sharded(self) -> bool:
        return self.config.shard and self.accelerator.num_processes > 1

    def train(self) -> dict[str, Any]:
        config, passes = self.config, self.config.gradient_accumulation
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BitvlaError(f"--out {self.out} cannot be a folder: {error.strerror}; choose another") from None
        split = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        with self.accelerator.local_main_process_first():  # which decodes the videos once
            self.windows = self._windows("train", **split)
            self.windows.prepare(self.step * passes)
        self._announce(self.windows)
        steps = range(self.step * passes, config.steps * passes)
        losses: dict[str, float] = {}
        latest: list[stages.Losses] = []
        with _interruptible() as interrupted, workers_alive(), self._progress() as progress:
            bar = progress.add_task(self.stage, total=config.steps, completed=self.step, losses="")
            for number, window in zip(steps, batches(self.windows, steps, config.workers), strict=True):
                self.number = number
                latest = [*latest, self._step(window)][-passes:]
                if not self.accelerator.sync_gradients:
                    continue
                if self.step % config.log_every == 0 or self.step == config.steps:
                    losses = self._log(latest, progress, bar)
                progress.update(bar, completed=self.step)
                if self.step % config.save_every == 0 and self.step < config.steps:
                    self._save(progress.console)
                if self._any(bool(interrupted)):
                    self._save(progress.console)
                    raise KeyboardInterrupt(f"stopped at step {self.step}; run the same command again to go on")
        self._save(self.console)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return {"stage": self.stage, "steps": self.step, "checkpoint": str(self.out), "losses": losses}

    def _step(self, window: Any) -> stages.Losses:
        """One pass; the last of a step moves the weights."""
        with self.accelerator.accumulate(self.trained):
            with self.accelerator.autocast():
                losses: stages.Losses = self.trained(_to(window, self.accelerator.device))
            self._check_finite("loss", losses["loss"], passes=1)
            self.accelerator.backward(losses["loss"])
            if self.accelerator.sync_gradients:
                limit = self.config.clip_gradient or math.inf
                norm = self.accelerator.clip_grad_norm_(self.trained.parameters(), limit)
                self._check_finite("gradient", norm, passes=self.config.gradient_accumulation)
            for optimizer in self.optimizers:
                if self.step == self.config.weight_decay_steps:
                    for group in optimizer.param_groups:
                        group["weight_decay"] = 0.0
                optimizer.step()
                optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            for schedule in self.schedules:
                schedule.step()
            self._average()
            self.step += 1
        return {name: value.detach() for name, value in losses.items()}

    def _check_finite(self, what: str, value: Tensor, passes: int) -> None:
        """Before it moves the weights: what is saved stays good. It is of the last so many `passes`."""
        number = float(_whole(value.detach()))
        if not math.isfinite(number):
            places = dict.fromkeys(self.windows.where(i) for i in range(self.number + 1 - passes, self.number + 1))
            kept = (self.out / STATE_FILE).exists()
            raise BitvlaError(
                f"the {what} became {number} at step {self.step}, on {'; '.join(places)}; "
                f"{f'the last good checkpoint is in {self.out}' if kept else 'nothing was saved before'}. "
                "Lower learning_rate or look at these data"
            )

    @torch.no_grad()
    def _average(self) -> None:
        """Exponential moving average that follows closely at first: a short run is not averaged with its start."""
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step)) if self.step else 0
        torch._foreach_lerp_(self.averages, [parameter.detach() for parameter in self.parameters], 1 - decay)

    def _any(self, here: bool) -> bool:
        """Is it so on any process? All stop at the same step, or those that go on would wait for the others."""
        flag = torch.tensor(float(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum"))

    # -- what is trained -----------------------------------------------------------------

    def _policy(self, start: Source | None, sentences: list[str] | None) -> tuple[Any, Any, Tokenizer]:
        """Network, prompt and tokenizer."""
        config = start_config(self.stage, self.config, start, self.dataset)
        if start is not None:
            _check_fits(config, self.dataset, start.folder)
            tokenizer = Tokenizer.from_str(start.tokenizer)
            network, prompt = load_network(start, config)
        else:
            corpus = sentences or [text for dataset in self.datasets for text in dataset.task_strings]
            tokenizer = new_tokenizer(config, corpus)
            prompt = Prompt(config, tokenizer)
            network = BitVLA(config, prompt.image_id, prompt.proprio_id)
        stages.freeze(self.stage, self.config, network)
        check_frozen(self.stage, network, start)
        return network, prompt, tokenizer

    def _objective(self, teacher: Source | None) -> stages.Objective:
        if self.stage == "localize" and not (self.config.keypoint_weight and self.dataset.keypoints is not None):
            raise BitvlaError(
                f"stage 'localize' needs keypoint_weight above 0 and observation.keypoints in {self.dataset.root}"
            )
        frozen: Any = None
        if self.stage == "distill" and teacher is not None:
            self._check_follows(teacher)
            frozen = load_network(teacher)[0].requires_grad_(False).eval().to(self.accelerator.device)
            if self._sharded:
                shard(frozen)
            if self.config.compile:
                frozen = torch.compile(frozen)
        return stages.objective(self.stage, self.config, self.auxiliary, frozen)

    def _check_follows(self, teacher: Source) -> None:
        """States are compared one to one: of the same layers, over the same tokens of the same observation."""
        student, followed, of = self.network.config, teacher.config, "the student's "
        assert isinstance(followed, PolicyConfig)
        check_same(f"{of}vision", student.vision, followed.vision, teacher, ("ternary", "film"))
        check_same(f"{of}language", student.language, followed.language, teacher)
        check_same(f"{of}action", student.action, followed.action, teacher,
                   ("head_hidden_size", "head_blocks", "max_prefix", "flow"))  # fmt: skip
        check_same(f"{of}processing", student.processing, followed.processing, teacher, ("execute_horizon",))
        if self.tokenizer.to_str() != Tokenizer.from_str(teacher.tokenizer).to_str():
            raise BitvlaError(f"the student has another tokenizer than its teacher {teacher.folder}; leave out --init")

    def _validation_objective(self) -> stages.Objective:
        return self.objective if self.stage != "distill" else stages.finetune(self.config, self.auxiliary)

    def _windows(self, split: str, **shard: int) -> Any:
        """The batches of a split: a dataset with `num_frames`, `prepare(step)` and `where(step)`."""
        config = self.network.config
        configs = [config, *(for_dataset(config, dataset) for dataset in self.datasets[1:])]
        parts = [
            Windows(
                dataset,
                own,
                Prompt(own, self.tokenizer),
                batch_size=self.config.batch_size,
                seed=self.config.seed,
                augmentation=self.config.augmentation if split == "train" else None,
                prefix_dropout=self.config.prefix_dropout if split == "train" else 1.0,
                flow_samples=self.config.flow_samples if split == "train" else 0,
                split=split,
                balance_tasks=self.config.balance_tasks,
                **shard,
            )
            for dataset, own in zip(self.datasets, configs, strict=True)
        ]
        if self.stage != "pretrain":
            return parts[0]
        share = {"batch_size": self.config.batch_size, "seed": self.config.seed, **shard}
        return Mixture(parts, self.config.mixture, config, **share)

    # -- keeping -------------------------------------------------------------------------

    def _provenance(self, parents: dict[str, Source | None]) -> dict[str, Any]:
        settings = msgspec.json.encode(self.config)
        return {
            "stage": self.stage,
            "config": to_dict(self.config),
            "config_digest": hashlib.sha256(settings).hexdigest(),
            "data": self._data(),
            "parents": {
                name: {"digest": source.sha256, "provenance": source.provenance}
                for name, source in parents.items()
                if source is not None
            },
            "versions": {
                "bitvla": bitvla.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def _data(self) -> list[dict[str, Any]]:
        """What the data are, for the record."""
        return [
            {
                # The exact statistics of every frame change when any value does, and are cheap to read.
                "digest": hashlib.sha256(dataset.stored_statistics()).hexdigest(),
                "episodes": dataset.num_episodes,
                "frames": dataset.num_frames,
                # Which decides the order of the frames.
                **({} if dataset.pictures.limit is None else {"cache_bytes": dataset.pictures.limit}),
            }
            for dataset in self.datasets
        ]

    def _identity(self) -> str:
        """What a run is: stage, settings, data and parents."""
        known = {key: value for key, value in self.provenance.items() if key not in ("versions", "adapters")}
        return json.dumps(known, sort_keys=True)

    def _read_state(self) -> dict[str, Any] | None:
        path = self.out / STATE_FILE
        if not path.is_file():
            return None
        try:
            # To memory, wherever it was: each process brings its own part to its own device.
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            before = _learning(state["identity"])
        except Exception as error:
            raise BitvlaError(f"{path} cannot be read ({error}); delete it to start this run again") from None
        if changes := list(_changes(before, _learning(self._identity()))):
            raise BitvlaError(
                f"{self.out} holds a run with another configuration, data or start: {'; '.join(changes)}; change it "
                "back, choose another --out or delete it"
            )
        return state

    def _state(self) -> dict[str, Any]:
        """What a run goes on from, in whole tensors: the number of processes may change. Every process must ask."""
        with torch.no_grad():
            for kept, value in zip(self.kept_averages, self.averages, strict=True):
                kept.copy_(_whole(value))
        parts = {
            "network": trained_state(self.network),
            "auxiliary": self.auxiliary.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
        }
        gathered: dict[str, Any] = tree_map(_whole, parts)
        return {**gathered, "averaged": trained_state(self.averaged), "step": self.step, "identity": self._identity()}

    def _save(self, console: Console) -> None:
        """Write the averaged weights as a policy, then the state of the run."""
        state = self._state()
        if not self.accelerator.is_main_process:
            return
        validation = self._validate()
        shown = _show(validation) or "left out (few episodes, or validation_batches = 0)"
        console.print(f"step {self.step}: validation {shown}")
        self._record({f"validation_{k}": v for k, v in validation.items()})
        provenance = {**self.provenance, "steps": self.step, "validation": validation}
        golden, temporary = self._golden(), self.out / (STATE_FILE + ".tmp")
        try:
            save_checkpoint(self.out, self.averaged.cpu(), self.tokenizer, golden, provenance)
            torch.save(state, temporary)
        except (RuntimeError, SafetensorError) as error:  # as PyTorch and safetensors tell of a full disk
            temporary.unlink(missing_ok=True)
            raise BitvlaError(
                f"the checkpoint of step {self.step} cannot be written to {self.out} ({' '.join(str(error).split())}); "
                "free some space and run the same command again"
            ) from None
        os.replace(temporary, self.out / STATE_FILE)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Mean losses of the averaged weights over episodes that are never trained on."""
        windows = self._windows("validation")
        if windows.num_frames == 0 or self.config.validation_batches == 0:
            return {}
        device = self.accelerator.device
        averaged = stages.trained_part(self.stage, self.averaged.eval().to(device))
        plain = self._validation_objective()
        with self.accelerator.autocast():
            rows = [plain(averaged, _to(windows[i], device)) for i in range(self.config.validation_batches)]
        return {name: sum(row[name].item() for row in rows) / len(rows) for name in rows[0]}

    def _golden(self) -> tuple[dict[str, torch.Tensor], list[str]] | None:
        """A few raw observations of the data with the answers of the averaged weights."""
        dataset, policy = self.dataset, TorchPolicy(self.averaged, self.prompt)
        cameras = [camera.name for camera in policy.config.processing.cameras]
        state = {"state": dataset.state} if policy.config.action.state_dim else {}
        first_frames = [begin for begin, _ in dataset.episode_ranges]
        chosen = first_frames[:: max(1, len(first_frames) // GOLDEN_OBSERVATIONS)][:GOLDEN_OBSERVATIONS]
        observations = [
            {
                "images": {camera: dataset.images(camera)[frame] for camera in cameras},
                **{name: values[frame] for name, values in state.items()},
                "instruction": dataset.task_strings[dataset.episode_index[frame]],
            }
            for frame in chosen
        ]
        answers = [policy.act(observation) for observation in observations]
        return golden_tensors(observations, answers)

    # -- telling -------------------------------------------------------------------------

    def _announce(self, windows: Any) -> None:
        config, processes = self.config, self.accelerator.num_processes
        effective = config.batch_size * config.gradient_accumulation
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        trained = sum(parameter.numel() for parameter in self.parameters)
        episodes = sum(dataset.num_episodes for dataset in self.datasets)
        # Not frames: where tasks are balanced, those of short ones count several times in an epoch.
        amount = f"windows an epoch, of {episodes} episodes" if episodes else "conversations"
        self.console.print(
            f"{self.stage} of '{self.network.config.name}' ({config.precision} precision, {parameters / 1e6:.2f} M "
            f"parameters, {trained / 1e6:.2f} M trained): {windows.num_frames} {amount}, {config.steps} steps of "
            f"{effective} windows ({config.gradient_accumulation} x {processes} process(es) x "
            f"{config.batch_size // processes}; {config.steps * effective / windows.num_frames:.1f} epochs) on "
            f"{self.accelerator.device}"
        )
        if self.step:
            self.console.print(f"going on at step {self.step}")

    def _progress(self) -> Progress:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TimeRemainingColumn(), TextColumn("{task.fields[losses]}")]
        return Progress(*columns, console=self.console, disable=not self.console.is_terminal)  # see `_log`

    def _log(self, latest: list[stages.Losses], progress: Progress, bar: Any) -> dict[str, float]:
        """The mean losses of a step, over its passes and all processes."""
        means = {name: torch.stack([losses[name] for losses in latest]).mean() for name in latest[0]}
        losses = {name: self.accelerator.reduce(value, reduction="mean").item() for name, value in means.items()}
        now = time.monotonic()
        previous_step, previous_time = self._last_log or (self.step, now)
        speed = (self.step - previous_step) / max(now - previous_time, 1e-9)
        self._last_log = (self.step, now)
        progress.update(bar, losses=f"{_show(losses)}  {speed:.2f} steps/s")
        rate = float(self.schedules[0].get_last_lr()[0])
        self._record({"learning_rate": rate, "steps_per_second": speed, **losses})
        if progress.disable:
            left = (self.config.steps - self.step) / speed / 60 if speed else 0.0
            pace = f"  {speed:.2f} steps/s  {left:.0f} min left" if speed else ""
            self.console.print(f"step {self.step}/{self.config.steps}  {_show(losses)}{pace}")
        return losses

    def _record(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
            self.accelerator.log(values, step=self.step)


def new_tokenizer(config: PolicyConfig, corpus: Iterable[str]) -> Tokenizer:
    """The tokenizer of a new policy, made for the sentences that it will be told."""
    template = config.processing.prompt
    specials = [template.pad_token, "<|slot|>", template.image_token, template.proprio_token, template.stop_token]
    specials += [token for token in ("<|begin_of_text|>", "<|eot_id|>") if token in template.template]
    return train_tokenizer(sorted(set(corpus)), config.language.vocab_size - config.action.bins, specials)


class _Trained(torch.nn.Module):
    """Everything that has gradients, called with a window: what is wrapped when there are several processes."""

    def __init__(
        self, network: torch.nn.Module, auxiliary: stages.AuxiliaryHead, objective: stages.Objective, compiles: bool
    ) -> None:
        super().__init__()
        self.network, self.auxiliary = network, auxiliary
        # As without compiling, the backward pass is outside of autocast: what adapters add has gradients in float32.
        functorch.backward_pass_autocast = "off"
        run: stages.Network = torch.compile(network) if compiles else network
        self._losses = lambda window: objective(run, window)

    def forward(self, window: Window | TokenWindow) -> stages.Losses:
        return self._losses(window)


def optimizers(network: Backbone, auxiliary: torch.nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Matrices decay; norms, biases and embeddings of position do not. The vision tower may learn at its own rate."""
    inside = {id(p) for name, p in network.named_parameters() if ".layers." in name and p.ndim == 2}
    places = {id(p) for name, p in network.named_parameters() if "position_embedding" in name}
    vision = {id(p) for p in network.vision_tower.parameters()}
    groups: dict[tuple[bool, bool, bool], list[Tensor]] = {}
    for p in [*network.parameters(), *auxiliary.parameters()]:
        if not p.requires_grad:
            continue
        key = (config.optimizer == "muon" and id(p) in inside, id(p) in vision, p.ndim >= 2 and id(p) not in places)
        groups.setdefault(key, []).append(p)
    rates = {True: config.vision_learning_rate or config.learning_rate, False: config.learning_rate}
    by_kind: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for (orthogonal, seeing, decays), parameters in sorted(groups.items(), key=lambda item: item[0]):
        decay = config.weight_decay if decays else 0.0
        by_kind[orthogonal].append({"params": parameters, "lr": rates[seeing], "weight_decay": decay})
    adamw = torch.optim.AdamW(by_kind[False])
    # Updates as large as AdamW's, so that one learning rate serves both.
    return [adamw, torch.optim.Muon(by_kind[True], adjust_lr_fn="match_rms_adamw")] if by_kind[True] else [adamw]


def shard(network: torch.nn.Module) -> None:
    """Spread the parameters over all processes (FSDP2): one layer at a time is whole, and what is outside of layers."""
    for layer in layers(network):
        fully_shard(layer)
    fully_shard(network, ignored_params={parameter for parameter in network.parameters() if not parameter.numel()})


def _placed_like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` on the device of `parameter`, in shards if that is."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _whole(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state of whole tensors for an optimiser whose parameters may be in shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {
            name: _placed_like(parameters[number], value) if value.shape == parameters[number].shape else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def _learning(identity: str) -> dict[str, Any]:
    """What must be equal for a run to go on, by name."""
    known = json.loads(identity)
    config = {name: value for name, value in known["config"].items() if name not in FREE_TO_CHANGE}
    # A window is given by its place in the run and weighs as any other, however many of a step are in one pass.
    windows = config.pop("batch_size") * config.pop("gradient_accumulation")
    return {
        **config,
        "batch_size x gradient_accumulation": windows,
        "stage": known["stage"],
        **{f"dataset {number}": one for number, one in enumerate(known["data"], start=1)},
        **{f"{name} checkpoint": parent["digest"] for name, parent in known["parents"].items()},
    }


def _changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two records, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            yield from _changes(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name} was {before}, is {now}"


def _learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a half cosine (paper, Table V) or a line (Table IV) to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    done = min(1.0, done)
    return 1 - done if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def _to(window: Any, device: torch.device) -> Any:
    return type(window)(*(part.to(device) if isinstance(part, Tensor) else _to(part, device) for part in window))


def _accelerator(config: TrainConfig, out: Path) -> Accelerator:
    for tracker in config.trackers:
        package = {"tensorboard": "tensorboardX"}.get(tracker, tracker)
        if importlib.util.find_spec(package) is None and importlib.util.find_spec(tracker) is None:
            raise BitvlaError(f"trackers: '{tracker}' is not installed; pip install {package}, or leave it out")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        log_with=list(config.trackers) or None,
        # All wait for the one that decodes videos or saves, which may take longer than ten minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        project_dir=out,
    )
    if config.batch_size % accelerator.num_processes:
        raise BitvlaError(
            f"batch_size {config.batch_size} cannot be shared by {accelerator.num_processes} processes; make it a "
            "multiple of that"
        )
    if config.trackers:
        accelerator.init_trackers("bitvla", init_kwargs={"wandb": {"name": out.name}})
    return accelerator


def start_config(stage: str, config: TrainConfig, start: Source | None, dataset: LeRobotDataset) -> PolicyConfig:
    """The policy that a stage trains: the one of the checkpoint `start`, or a new one, as over a base model."""
    stored = start.config if start is not None and isinstance(start.config, PolicyConfig) else None
    if start is not None and stored is not None and bool(stored.action.bins) == (stage == "pretrain"):
        policy = msgspec.structs.replace(stored, precision=config.precision)
        if config.policy is not None:
            _check_section(config.policy, stored, start)
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
        policy = policy_config(config.policy, dataset, config.precision)
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
        _check_backbone(policy, start)
    return policy


def _check_backbone(policy: PolicyConfig, start: Source) -> None:
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


def _check_section(new: NewPolicy, stored: PolicyConfig, start: Source) -> None:
    """Where the checkpoint says what the policy is, a [policy] section must not say otherwise."""
    # Nothing said is as the checkpoint has it; a flow is put in by `extended`.
    but = [name for name, said in (("film", new.vision.film), ("max_prefix", new.action.max_prefix)) if not said]
    but += ["flow", "head_hidden_size", "head_blocks"] if new.action.flow else ["flow"]
    for name, found in {"vision": stored.vision, "language": stored.language, "action": stored.action,
                        "image": stored.processing.image, "prompt": stored.processing.prompt}.items():  # fmt: skip
        check_same(f"policy.{name}", getattr(new, name), found, start, but)


def check_same(section: str, wanted: Any, found: Any, start: Source, but: Collection[str] = ()) -> None:
    """BitvlaError for a field of two records that differs, `but` for these."""
    for field in wanted.__struct_fields__:
        if field not in but and getattr(wanted, field) != getattr(found, field):
            raise BitvlaError(
                f"{section}.{field} is {getattr(wanted, field)}, {start.folder} has {getattr(found, field)}; make them "
                "equal"
            )


def check_frozen(stage: str, network: Backbone, start: Source | None, part: str = "") -> None:
    """What does not learn must be in the checkpoint, of which the `part` is taken that names begin with."""
    stored = {} if start is None else start.specs
    for name, parameter in network.named_parameters():
        if not (parameter.requires_grad or (name in stored and name.startswith(part))):
            raise BitvlaError(
                f"in stage '{stage}' {name} does not learn, and "
                f"{'no --init gives it' if start is None else f'{start.folder} does not have it'}: it would stay "
                "random; give --init a checkpoint with it, or name its part in learning_parts"
            )


def _check_fits(config: Any, dataset: LeRobotDataset, start: Path) -> None:
    wanted = [camera.name for camera in config.processing.cameras]
    if not set(wanted) <= set(dataset.cameras):
        raise BitvlaError(
            f"{start} was trained on the cameras {wanted}, the data has {list(dataset.cameras)}; say in the "
            f"configuration which are which: data.{dataset.name}.cameras"
        )
    for camera in config.processing.cameras:
        if (size := dataset.shape(camera.name)[:2]) != (camera.height, camera.width):
            raise BitvlaError(
                f"{start} takes pictures of {camera.height} x {camera.width} from the camera '{camera.name}', the data "
                f"has {size[0]} x {size[1]}; record or convert them at that size"
            )
    if not math.isclose(rate := config.processing.control_hz, dataset.fps, rel_tol=0.01):
        raise BitvlaError(
            f"{start} acts {rate:g} times a second, {dataset.name} has {dataset.fps:g} actions a second; where that is "
            f"not their rate, say so in the configuration: data.{dataset.name}.control_hz = {rate:g}"
        )
    state_dim = 0 if config.action.bins else dataset.state.shape[1]
    if dataset.action.shape[1] != config.action.dim or state_dim != config.action.state_dim:
        raise BitvlaError(
            f"{start} has {config.action.state_dim} state and {config.action.dim} action values, the data has "
            f"{dataset.state.shape[1]} and {dataset.action.shape[1]}; give data of the same robot"
        )


def _show(losses: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in losses.items())


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda signum, _: received.append(signum))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
