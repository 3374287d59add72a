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
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

import bitvla
from bitvla.config import PolicyConfig, to_dict
from bitvla.data.lerobot import LeRobotDataset
from bitvla.errors import BitvlaError, meant
from bitvla.model.checkpoint import digest, golden_tensors, load_config, load_network, load_tokenizer, save_policy
from bitvla.model.network import BitVLA, checkpoint_activations, layers
from bitvla.model.policy import TorchPolicy
from bitvla.processing.prompt import Prompt, train_tokenizer
from bitvla.train import stages
from bitvla.train.batches import Mixture, TokenWindow, Window, Windows, batches
from bitvla.train.config import TrainConfig, for_dataset, load, policy_config, with_head

STATE_FILE = "training_state.pt"
GOLDEN_OBSERVATIONS = 2


def run(
    stage: str,
    config_path: Path,
    data: Path | Sequence[Path],
    out: Path,
    *,
    init: Path | None = None,
    teacher: Path | None = None,
    sentences: list[str] | None = None,
) -> dict[str, Any]:
    """Train a policy and return a summary (steps, losses, checkpoint folder).

    Args:
        stage: one of `stages.NAMES`; "distill" needs `teacher`.
        config_path: TOML file of a `TrainConfig`.
        data: root of a LeRobotDataset v3; for "pretrain" one or several.
        out: folder of the run. If it holds an unfinished run of the same settings, that run goes on.
        init: checkpoint whose weights are the start; by default random (finetune) or the teacher's (distill).
        teacher: full-precision checkpoint that a distilled student follows.
        sentences: corpus of the tokenizer of a new policy; by default the instructions of the dataset.

    Raises:
        BitvlaError: unusable configuration, data or checkpoint; a loss that is not finite.
    """
    check_stage(stage, teacher)
    config = load(config_path)
    roots = [Path(data)] if isinstance(data, str | Path) else [Path(root) for root in data]
    _check_mixture(stage, config, roots)
    start = init or (teacher if stage == "distill" else None)
    trainer = _Trainer(stage, config, [LeRobotDataset(root) for root in roots], Path(out), start, teacher, sentences)
    with _interruptible() as interrupted:
        return trainer.train(interrupted)


def check_stage(stage: str, teacher: Path | None) -> None:
    """BitvlaError for a stage that does not exist, or cannot do without a teacher or with this one."""
    if stage not in stages.NAMES:
        raise BitvlaError(f"unknown stage '{stage}': use one of {', '.join(stages.NAMES)}")
    if stage != "distill":
        return
    if teacher is None:
        raise BitvlaError("stage 'distill' needs a full-precision teacher: --teacher CHECKPOINT")
    config = load_config(teacher)
    if config.precision != "full":
        raise BitvlaError(f"the teacher {teacher} is {config.precision}; distillation needs full precision")
    trained = (_provenance_of(teacher) or {}).get("stage")
    if trained in ("localize", "pretrain"):
        raise BitvlaError(f"the teacher {teacher} is of stage '{trained}' and has no action head; finetune it first")


def _check_mixture(stage: str, config: TrainConfig, roots: list[Path]) -> None:
    names = [root.name for root in roots]
    if stage != "pretrain":
        if len(roots) > 1:
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


class _Trainer:
    def __init__(
        self,
        stage: str,
        config: TrainConfig,
        datasets: list[LeRobotDataset],
        out: Path,
        start: Path | None,
        teacher: Path | None,
        sentences: list[str] | None,
    ) -> None:
        dataset = datasets[0]
        self.stage, self.config, self.out, self.datasets, self.dataset = stage, config, out, datasets, dataset
        self.accelerator = _accelerator(config, out)
        self.console = Console(stderr=True, quiet=not self.accelerator.is_main_process)
        set_seed(config.seed)
        self.network, self.prompt, self.tokenizer = self._policy(start, sentences)
        policy = self.network.config
        positions = 0 if dataset.environment_state is None else dataset.environment_state.shape[1]
        keypoints = 0 if dataset.keypoints is None else dataset.keypoints.shape[2]
        self.auxiliary = stages.AuxiliaryHead(policy, positions, keypoints)
        # Without gradients where nothing is asked of them, as several processes demand.
        self.auxiliary.linear.requires_grad_(bool(positions and config.auxiliary_weight and stage != "pretrain"))
        self.auxiliary.points.requires_grad_(bool(keypoints and config.keypoint_weight and stage != "pretrain"))
        stages.freeze(stage, self.network, config)
        # What is saved: whole, and not on the device; brought up to date with the averages when it is needed.
        self.averaged = copy.deepcopy(self.network).requires_grad_(False)
        self.provenance = self._provenance(start, teacher)
        state = self._read_state()
        if state is not None:
            self.network.load_state_dict(state["network"])
            self.auxiliary.load_state_dict(state["auxiliary"])
            self.averaged.load_state_dict(state["averaged"])
        self.step = 0 if state is None else int(state["step"])
        self._place(self._objective(teacher), state)
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
        self.averages = [_placed_like(p, value.detach()) for p, value in zip(part.parameters(), whole, strict=True)]
        self.parameters = list(part.parameters())
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
    def _sharded(self) -> bool:
        return self.config.shard and self.accelerator.num_processes > 1

    def train(self, interrupted: list[int]) -> dict[str, Any]:
        config, passes = self.config, self.config.gradient_accumulation
        split = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        with self.accelerator.main_process_first():  # which decodes the videos once
            self.windows = self._windows("train", **split)
        self._announce(self.windows)
        steps = range(self.step * passes, config.steps * passes)
        losses: dict[str, float] = {}
        latest: list[stages.Losses] = []
        with self._progress() as progress:
            bar = progress.add_task(self.stage, total=config.steps, completed=self.step, losses="")
            for number, window in zip(steps, batches(self.windows, steps), strict=True):
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
            if not torch.isfinite(losses["loss"]):
                raise BitvlaError(
                    f"the loss became {losses['loss'].item()} at step {self.step}, on "
                    f"{self.windows.where(self.number)}; the last good checkpoint is in {self.out}. Lower "
                    "learning_rate or look at these data"
                )
            self.accelerator.backward(losses["loss"])
            if self.accelerator.sync_gradients and self.config.clip_gradient:
                self.accelerator.clip_grad_norm_(self.trained.parameters(), self.config.clip_gradient)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            for schedule in self.schedules:
                schedule.step()
            self._average()
            self.step += 1
        return {name: value.detach() for name, value in losses.items()}

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

    def _policy(self, start: Path | None, sentences: list[str] | None) -> tuple[BitVLA, Prompt, Tokenizer]:
        config = start_config(self.stage, self.config, start, self.dataset)
        if start is not None:
            _check_fits(config, self.dataset, start)
            network, prompt = load_network(start, config)
            return network, prompt, load_tokenizer(start)
        template = config.processing.prompt
        specials = [template.pad_token, "<|slot|>", template.image_token, template.proprio_token, template.stop_token]
        specials += [token for token in ("<|begin_of_text|>", "<|eot_id|>") if token in template.template]
        corpus = sorted(set(sentences or [text for dataset in self.datasets for text in dataset.task_strings]))
        tokenizer = train_tokenizer(corpus, config.language.vocab_size - config.action.bins, specials)
        prompt = Prompt(config, tokenizer)
        return BitVLA(config, prompt.image_id, prompt.proprio_id), prompt, tokenizer

    def _objective(self, teacher: Path | None) -> stages.Objective:
        if self.stage == "localize" and not (self.config.keypoint_weight and self.dataset.keypoints is not None):
            raise BitvlaError(
                f"stage 'localize' needs keypoint_weight above 0 and observation.keypoints in {self.dataset.root}"
            )
        frozen: Any = None
        if self.stage == "distill" and teacher is not None:
            frozen = load_network(teacher)[0].requires_grad_(False).eval().to(self.accelerator.device)
            if self._sharded:
                shard(frozen)
            if self.config.compile:
                frozen = torch.compile(frozen)
        return stages.objective(self.stage, self.config, self.auxiliary, frozen)

    def _windows(self, split: str, **shard: int) -> Windows | Mixture:
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

    def _provenance(self, start: Path | None, teacher: Path | None) -> dict[str, Any]:
        settings = msgspec.json.encode(self.config)
        parents = {"init": start, "teacher": teacher}
        return {
            "stage": self.stage,
            "config": to_dict(self.config),
            "config_digest": hashlib.sha256(settings).hexdigest(),
            "data": [
                {
                    # The exact statistics of every frame change when any value does, and are cheap to read.
                    "digest": digest(dataset.root / "meta" / "stats.json"),
                    "episodes": dataset.num_episodes,
                    "frames": dataset.num_frames,
                }
                for dataset in self.datasets
            ],
            "parents": {
                name: {"digest": digest(path / "model.safetensors"), "provenance": _provenance_of(path)}
                for name, path in parents.items()
                if path is not None
            },
            "versions": {
                "bitvla": bitvla.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def _identity(self) -> str:
        """What must be equal for a run to go on: stage, settings, data and parents."""
        return json.dumps({k: v for k, v in self.provenance.items() if k != "versions"}, sort_keys=True)

    def _read_state(self) -> dict[str, Any] | None:
        path = self.out / STATE_FILE
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
        except Exception as error:
            raise BitvlaError(f"{path} cannot be read ({error}); delete it to start this run again") from None
        if state["identity"] != self._identity():
            raise BitvlaError(
                f"{self.out} holds a run with another configuration, data or start; choose another --out or delete it"
            )
        return state

    def _state(self) -> dict[str, Any]:
        """What a run goes on from, in whole tensors: the number of processes may change. Every process must ask."""
        part = stages.trained_part(self.stage, self.averaged)
        with torch.no_grad():
            for parameter, value in zip(part.parameters(), self.averages, strict=True):
                parameter.copy_(_whole(value))
        parts = {
            "network": self.network.state_dict(),
            "auxiliary": self.auxiliary.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
        }
        gathered: dict[str, Any] = tree_map(_whole, parts)
        return {**gathered, "averaged": self.averaged.state_dict(), "step": self.step, "identity": self._identity()}

    def _save(self, console: Console) -> None:
        """Write the averaged weights as a policy, then the state of the run."""
        state = self._state()
        if not self.accelerator.is_main_process:
            return
        validation = self._validate()
        console.print(f"step {self.step}: validation " + _show(validation))
        self._record({f"validation_{k}": v for k, v in validation.items()})
        provenance = {**self.provenance, "steps": self.step, "validation": validation}
        save_policy(self.out, self.averaged, self.tokenizer, self._golden(), provenance)
        temporary = self.out / (STATE_FILE + ".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.out / STATE_FILE)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Mean losses of the averaged weights over episodes that are never trained on."""
        windows = self._windows("validation")
        if windows.num_frames == 0 or self.config.validation_batches == 0:
            return {}
        device = self.accelerator.device
        averaged = stages.trained_part(self.stage, self.averaged.eval().to(device))
        plain = self.objective if self.stage != "distill" else stages.finetune(self.config, self.auxiliary)
        with self.accelerator.autocast():
            rows = [plain(averaged, _to(windows[i], device)) for i in range(self.config.validation_batches)]
        return {name: sum(row[name].item() for row in rows) / len(rows) for name in rows[0]}

    def _golden(self) -> tuple[dict[str, torch.Tensor], list[str]]:
        """A few raw observations of the data with the answers of the averaged weights."""
        dataset, policy = self.dataset, TorchPolicy(self.averaged.cpu(), self.prompt)
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

    def _announce(self, windows: Windows | Mixture) -> None:
        config, processes = self.config, self.accelerator.num_processes
        effective = config.batch_size * config.gradient_accumulation
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        episodes = sum(dataset.num_episodes for dataset in self.datasets)
        self.console.print(
            f"{self.stage} of '{self.network.config.name}' ({config.precision} precision, {parameters / 1e6:.2f} M "
            f"parameters): {windows.num_frames} frames of {episodes} episodes, {config.steps} steps of {effective} "
            f"windows ({config.gradient_accumulation} x {processes} process(es) x {config.batch_size // processes}; "
            f"{config.steps * effective / windows.num_frames:.1f} epochs) on {self.accelerator.device}"
        )
        if self.step:
            self.console.print(f"going on at step {self.step}")

    def _progress(self) -> Progress:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[losses]}"), console=self.console)

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
        if not sys.stderr.isatty():
            left = (self.config.steps - self.step) / speed / 60 if speed else math.nan
            self.console.print(
                f"step {self.step}/{self.config.steps}  {_show(losses)}  {speed:.2f} steps/s  {left:.0f} min left"
            )
        return losses

    def _record(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
            self.accelerator.log(values, step=self.step)


class _Trained(torch.nn.Module):
    """Everything that has gradients, called with a window: what is wrapped when there are several processes."""

    def __init__(
        self, network: torch.nn.Module, auxiliary: stages.AuxiliaryHead, objective: stages.Objective, compiles: bool
    ) -> None:
        super().__init__()
        self.network, self.auxiliary = network, auxiliary
        run: stages.Network = torch.compile(network) if compiles else network
        self._losses = lambda window: objective(run, window)

    def forward(self, window: Window | TokenWindow) -> stages.Losses:
        return self._losses(window)


def optimizers(network: BitVLA, auxiliary: torch.nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Matrices decay; norms, biases and embeddings of position do not. The vision tower may learn at its own rate."""
    inside = {id(p) for name, p in network.named_parameters() if ".layers." in name and p.ndim == 2}
    vision = {id(p) for p in network.vision_tower.parameters()}
    groups: dict[tuple[bool, bool, bool], list[Tensor]] = {}
    for p in [*network.parameters(), *auxiliary.parameters()]:
        key = (config.optimizer == "muon" and id(p) in inside, id(p) in vision, p.ndim >= 2)
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


def _learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a half cosine to zero (paper, Table V)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


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


def start_config(stage: str, config: TrainConfig, start: Path | None, dataset: LeRobotDataset) -> PolicyConfig:
    """The policy that a stage trains: the one of the checkpoint `start`, or a new one."""
    stored = None if start is None else load_config(start)
    if stored is not None and bool(stored.action.bins) == (stage == "pretrain"):
        policy = msgspec.structs.replace(stored, precision=config.precision)
    elif stored is not None and stage == "pretrain":
        raise BitvlaError(f"{start} regresses its actions; stage 'pretrain' goes on from a pre-trained checkpoint only")
    elif config.policy is None:
        raise BitvlaError(
            "the configuration has no [policy] section and no --init checkpoint gives one"
            if stored is None
            else f"{start} is pre-trained and knows no action head; describe the policy in a [policy] section"
        )
    else:
        policy = policy_config(config.policy, dataset, config.precision)
    if bool(policy.action.bins) != (stage == "pretrain"):
        raise BitvlaError(
            "stage 'pretrain' writes actions as tokens: policy.action needs bins, as in bins = 256"
            if stage == "pretrain"
            else f"stage '{stage}' regresses its actions: leave out policy.action.bins"
        )
    policy = with_head(policy, config)
    if config.train_head_only and stored is None:
        raise BitvlaError("train_head_only = true trains on top of a policy: give one with --init")
    if config.train_head_only and stored and policy.action.max_prefix and not stored.action.max_prefix:
        raise BitvlaError(
            f"train_head_only = true would leave the projector of max_prefix untrained, which {start} does not have"
        )
    if stored is not None:
        _check_backbone(policy, stored, start)
    return policy


def _check_backbone(policy: PolicyConfig, stored: PolicyConfig, start: Path | None) -> None:
    """Tower and decoder must be those of the checkpoint; whether the decoder is causal may change."""
    causal = msgspec.structs.replace(policy.language, bidirectional=stored.language.bidirectional)
    for name, wanted, found in (("vision", policy.vision, stored.vision), ("language", causal, stored.language)):
        for field in wanted.__struct_fields__:
            if getattr(wanted, field) != getattr(found, field):
                raise BitvlaError(
                    f"policy.{name}.{field} is {getattr(wanted, field)}, {start} has {getattr(found, field)}; "
                    "give the policy the sizes of the checkpoint"
                )


def _check_fits(config: Any, dataset: LeRobotDataset, start: Path) -> None:
    wanted = [camera.name for camera in config.processing.cameras]
    if not set(wanted) <= set(dataset.cameras):
        raise BitvlaError(f"{start} was trained on the cameras {wanted}, the data has {list(dataset.cameras)}")
    state_dim = 0 if config.action.bins else dataset.state.shape[1]
    if dataset.action.shape[1] != config.action.dim or state_dim != config.action.state_dim:
        raise BitvlaError(
            f"{start} has {config.action.state_dim} state and {config.action.dim} action values, the data has "
            f"{dataset.state.shape[1]} and {dataset.action.shape[1]}"
        )


def _provenance_of(checkpoint: Path) -> Any:
    path = checkpoint / "provenance.json"
    return json.loads(path.read_text()) if path.is_file() else None


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
