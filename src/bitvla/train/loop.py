"""The one training loop: steps, learning rate, average weights, progress, checkpoints, resume."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import bitvla
from bitvla.config import PolicyConfig, check, to_dict
from bitvla.data.lerobot import LeRobotDataset
from bitvla.errors import BitvlaError
from bitvla.model.checkpoint import digest, golden_tensors, load_config, load_network, load_tokenizer, save_policy
from bitvla.model.network import BitVLA
from bitvla.model.policy import TorchPolicy
from bitvla.processing.prompt import Prompt, train_tokenizer
from bitvla.train import stages
from bitvla.train.batches import Window, Windows, batches
from bitvla.train.config import TrainConfig, load, policy_config

STATE_FILE = "training_state.pt"
STAGES = ("localize", "finetune", "distill")
GOLDEN_OBSERVATIONS = 2


def run(
    stage: str,
    config_path: Path,
    data: Path,
    out: Path,
    *,
    init: Path | None = None,
    teacher: Path | None = None,
    sentences: list[str] | None = None,
) -> dict[str, Any]:
    """Train a policy and return a summary (steps, losses, checkpoint folder).

    Args:
        stage: "localize", "finetune", or "distill" which needs `teacher`.
        config_path: TOML file of a `TrainConfig`.
        data: root of a LeRobotDataset v3.
        out: folder of the run. If it holds an unfinished run of the same settings, that run goes on.
        init: checkpoint whose weights are the start; by default random (finetune) or the teacher's (distill).
        teacher: full-precision checkpoint that a distilled student follows.
        sentences: corpus of the tokenizer of a new policy; by default the instructions of the dataset.

    Raises:
        BitvlaError: unusable configuration, data or checkpoint; a loss that is not finite.
    """
    if stage not in STAGES:
        raise BitvlaError(f"unknown stage '{stage}': use one of {', '.join(STAGES)}")
    config = load(config_path)
    if stage == "distill" and teacher is None:
        raise BitvlaError("stage 'distill' needs a full-precision teacher: --teacher CHECKPOINT")
    start = init or (teacher if stage == "distill" else None)
    trainer = _Trainer(stage, config, LeRobotDataset(data), Path(out), start, teacher, sentences)
    with _interruptible() as interrupted:
        return trainer.train(interrupted)


class _Trainer:
    def __init__(
        self,
        stage: str,
        config: TrainConfig,
        dataset: LeRobotDataset,
        out: Path,
        start: Path | None,
        teacher: Path | None,
        sentences: list[str] | None,
    ) -> None:
        self.stage, self.config, self.out, self.dataset = stage, config, out, dataset
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.gradient_accumulation
        )
        self.console = Console(stderr=True, quiet=not self.accelerator.is_main_process)
        set_seed(config.seed)
        self.network, self.prompt, self.tokenizer = self._policy(start, sentences)
        policy = self.network.config
        positions = 0 if dataset.environment_state is None else dataset.environment_state.shape[1]
        keypoints = 0 if dataset.keypoints is None else dataset.keypoints.shape[2]
        self.auxiliary = stages.AuxiliaryHead(policy, positions, keypoints)
        self.average = AveragedModel(self.network, multi_avg_fn=_moving_average(config.ema_decay))
        self.optimizers = _optimizers(self.network, self.auxiliary, config)
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, config))
            for optimizer in self.optimizers
        ]
        self.provenance = self._provenance(start, teacher)
        self.step = self._resume()
        # Without gradients where nothing is asked of them, as several processes demand.
        self.auxiliary.linear.requires_grad_(bool(positions and config.auxiliary_weight))
        self.auxiliary.points.requires_grad_(bool(keypoints and config.keypoint_weight))
        self.part = self._part(self.network)
        self.objective = self._objective(teacher)
        self.trained = _Trained(self.part, self.auxiliary, self.objective, config.compile)
        self.trained, *self.optimizers = self.accelerator.prepare(self.trained, *self.optimizers)
        self.average.to(self.accelerator.device)
        self._last_log: tuple[int, float] | None = None

    def train(self, interrupted: list[int]) -> dict[str, Any]:
        config = self.config
        split = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        with self.accelerator.main_process_first():  # which decodes the videos once
            windows = self._windows("train", **split)
        self._announce(windows)
        micro_steps = range(self.step * config.gradient_accumulation, config.steps * config.gradient_accumulation)
        losses: dict[str, float] = {}
        with self._progress() as progress:
            bar = progress.add_task(self.stage, total=config.steps, completed=self.step, losses="")
            for window in batches(windows, micro_steps):
                latest = self._step(window)
                if not self.accelerator.sync_gradients:
                    continue
                if self.step % config.log_every == 0 or self.step == config.steps:
                    losses = self._log(latest, progress, bar)
                progress.update(bar, completed=self.step)
                if self.step % config.save_every == 0 and self.step < config.steps:
                    self._save(progress.console)
                if interrupted:
                    self._save(progress.console)
                    raise KeyboardInterrupt(f"stopped at step {self.step}; run the same command again to go on")
        self._save(self.console)
        return {"stage": self.stage, "steps": self.step, "checkpoint": str(self.out), "losses": losses}

    def _step(self, window: Window) -> dict[str, torch.Tensor]:
        with self.accelerator.accumulate(self.trained):
            losses = self.trained(_to(window, self.accelerator.device))
            if not torch.isfinite(losses["loss"]):
                raise BitvlaError(
                    f"the loss became {losses['loss'].item()} at step {self.step}; the last good checkpoint is in "
                    f"{self.out}. Lower learning_rate or look at this batch of the data"
                )
            self.accelerator.backward(losses["loss"])
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.trained.parameters(), self.config.clip_gradient)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            for schedule in self.schedules:
                schedule.step()
            self.average.update_parameters(self.network)
            self.step += 1
        return losses

    # -- what is trained -----------------------------------------------------------------

    def _policy(self, start: Path | None, sentences: list[str] | None) -> tuple[BitVLA, Prompt, Tokenizer]:
        if start is not None:
            config = msgspec.structs.replace(load_config(start), precision=self.config.precision)
            config = _with_prefix(config, self.config)
            _check_fits(config, self.dataset, start)
            network, prompt = load_network(start, config)
            return network, prompt, load_tokenizer(start)
        if self.config.policy is None:
            raise BitvlaError("the configuration has no [policy] section and no --init checkpoint gives one")
        config = _with_prefix(policy_config(self.config.policy, self.dataset, self.config.precision), self.config)
        template = config.processing.prompt
        specials = [template.pad_token, "<|slot|>", template.image_token, template.proprio_token, template.stop_token]
        specials += [token for token in ("<|begin_of_text|>", "<|eot_id|>") if token in template.template]
        corpus = sorted(set(sentences or self.dataset.task_strings))
        tokenizer = train_tokenizer(corpus, config.language.vocab_size, specials)
        prompt = Prompt(config, tokenizer)
        return BitVLA(config, prompt.image_id, prompt.proprio_id), prompt, tokenizer

    def _part(self, network: BitVLA) -> torch.nn.Module:
        """What this stage trains."""
        return network.vision_tower if self.stage == "localize" else network

    def _objective(self, teacher: Path | None) -> stages.Objective:
        if self.stage == "localize":
            if not (self.config.keypoint_weight and self.dataset.keypoints is not None):
                raise BitvlaError(
                    f"stage 'localize' needs keypoint_weight above 0 and observation.keypoints in {self.dataset.root}"
                )
            return stages.localize(self.auxiliary)
        if self.stage == "finetune":
            return stages.finetune(self.config, self.auxiliary)
        assert teacher is not None
        frozen, _ = load_network(teacher)
        if frozen.config.precision != "full":
            raise BitvlaError(f"the teacher {teacher} is {frozen.config.precision}; distillation needs full precision")
        frozen = frozen.requires_grad_(False).eval().to(self.accelerator.device)
        return stages.distill(self.config, self.auxiliary, torch.compile(frozen) if self.config.compile else frozen)

    def _windows(self, split: str, **shard: int) -> Windows:
        return Windows(
            self.dataset,
            self.network.config,
            self.prompt,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            augmentation=self.config.augmentation if split == "train" else None,
            prefix_dropout=self.config.prefix_dropout if split == "train" else 1.0,
            split=split,
            balance_tasks=self.config.balance_tasks,
            **shard,
        )

    # -- keeping -------------------------------------------------------------------------

    def _provenance(self, start: Path | None, teacher: Path | None) -> dict[str, Any]:
        settings = msgspec.json.encode(self.config)
        parents = {"init": start, "teacher": teacher}
        return {
            "stage": self.stage,
            "config": to_dict(self.config),
            "config_digest": hashlib.sha256(settings).hexdigest(),
            # The exact statistics of every frame change when any value does, and are cheap to read.
            "data_digest": digest(self.dataset.root / "meta" / "stats.json"),
            "data": {"episodes": self.dataset.num_episodes, "frames": self.dataset.num_frames},
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

    def _resume(self) -> int:
        path = self.out / STATE_FILE
        if not path.is_file():
            return 0
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:
            raise BitvlaError(f"{path} cannot be read ({error}); delete it to start this run again") from None
        if state["identity"] != self._identity():
            raise BitvlaError(
                f"{self.out} holds a run with another configuration, data or start; choose another --out or delete it"
            )
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        return int(state["step"])

    def _stateful(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "auxiliary": self.auxiliary,
            "average": self.average,
            **{f"optimizer.{i}": optimizer for i, optimizer in enumerate(self.optimizers)},
            **{f"schedule.{i}": schedule for i, schedule in enumerate(self.schedules)},
        }

    def _averaged(self) -> BitVLA:
        return cast(BitVLA, self.average.module)

    def _save(self, console: Console) -> None:
        """Write the averaged weights as a policy, then the state of the run."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        validation = self._validate()
        console.print(f"step {self.step}: validation " + _show(validation))
        self._append_metrics({"step": self.step, **{f"validation_{k}": v for k, v in validation.items()}})
        averaged = self._averaged()
        provenance = {**self.provenance, "steps": self.step, "validation": validation}
        save_policy(self.out, averaged, self.tokenizer, self._golden(averaged), provenance)
        state = {name: part.state_dict() for name, part in self._stateful().items()}
        temporary = self.out / (STATE_FILE + ".tmp")
        torch.save({**state, "step": self.step, "identity": self._identity()}, temporary)
        os.replace(temporary, self.out / STATE_FILE)
        averaged.train()

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Mean losses of the averaged weights over episodes that are never trained on."""
        windows = self._windows("validation")
        if windows.num_frames == 0 or self.config.validation_batches == 0:
            return {}
        averaged = self._part(self._averaged().eval())
        plain = self.objective if self.stage == "localize" else stages.finetune(self.config, self.auxiliary)
        with self.accelerator.autocast():
            rows = [
                plain(averaged, _to(windows[i], self.accelerator.device)) for i in range(self.config.validation_batches)
            ]
        return {name: sum(row[name].item() for row in rows) / len(rows) for name in rows[0]}

    def _golden(self, network: BitVLA) -> tuple[dict[str, torch.Tensor], list[str]]:
        """A few raw observations of the data with the answers of the network."""
        dataset, policy = self.dataset, TorchPolicy(network.cpu(), self.prompt)
        first_frames = [begin for begin, _ in dataset.episode_ranges]
        chosen = first_frames[:: max(1, len(first_frames) // GOLDEN_OBSERVATIONS)][:GOLDEN_OBSERVATIONS]
        observations = [
            {
                "images": {camera: dataset.images(camera)[frame] for camera in dataset.cameras},
                "state": dataset.state[frame],
                "instruction": dataset.task_strings[dataset.episode_index[frame]],
            }
            for frame in chosen
        ]
        answers = [policy.act(observation) for observation in observations]
        network.to(self.accelerator.device)
        return golden_tensors(observations, answers)

    # -- telling -------------------------------------------------------------------------

    def _announce(self, windows: Windows) -> None:
        config = self.config
        effective = config.batch_size * config.gradient_accumulation
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        self.console.print(
            f"{self.stage} of '{self.network.config.name}' ({config.precision} precision, {parameters / 1e6:.2f} M "
            f"parameters): {windows.num_frames} frames of {self.dataset.num_episodes} episodes, {config.steps} steps "
            f"of {effective} windows ({config.steps * effective / windows.num_frames:.1f} epochs), "
            f"{self.accelerator.num_processes} process(es) on {self.accelerator.device}"
        )
        if self.step:
            self.console.print(f"going on at step {self.step}")

    def _progress(self) -> Progress:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[losses]}"), console=self.console)

    def _log(self, latest: dict[str, torch.Tensor], progress: Progress, bar: Any) -> dict[str, float]:
        losses = {name: value.item() for name, value in latest.items()}
        now = time.monotonic()
        previous_step, previous_time = self._last_log or (self.step, now)
        speed = (self.step - previous_step) / max(now - previous_time, 1e-9)
        self._last_log = (self.step, now)
        progress.update(bar, losses=f"{_show(losses)}  {speed:.2f} steps/s")
        rate = float(self.schedules[0].get_last_lr()[0])
        self._append_metrics({"step": self.step, "learning_rate": rate, "steps_per_second": speed, **losses})
        if not sys.stderr.isatty():
            left = (self.config.steps - self.step) / speed / 60 if speed else math.nan
            self.console.print(
                f"step {self.step}/{self.config.steps}  {_show(losses)}  {speed:.2f} steps/s  {left:.0f} min left"
            )
        return losses

    def _append_metrics(self, row: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


class _Trained(torch.nn.Module):
    """Everything that has gradients, called with a window: what is wrapped when there are several processes."""

    def __init__(
        self, network: torch.nn.Module, auxiliary: stages.AuxiliaryHead, objective: stages.Objective, compiles: bool
    ) -> None:
        super().__init__()
        self.network, self.auxiliary = network, auxiliary
        run: stages.Network = torch.compile(network) if compiles else network
        self._losses = lambda window: objective(run, window)

    def forward(self, window: Window) -> stages.Losses:
        return self._losses(window)


def _optimizers(network: BitVLA, auxiliary: torch.nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Matrices decay; norms, biases and embeddings of position do not."""
    inside = [p for name, p in network.named_parameters() if ".layers." in name and p.ndim == 2]
    matrices = inside if config.optimizer == "muon" else []
    taken = {id(p) for p in matrices}
    others = [p for p in [*network.parameters(), *auxiliary.parameters()] if id(p) not in taken]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )
    if not matrices:
        return [adamw]
    # Updates as large as AdamW's, so that one learning rate serves both.
    muon = torch.optim.Muon(
        matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon]


def _moving_average(decay: float) -> Any:
    """Exponential moving average that follows closely at first, so that a short run is not averaged with its start."""

    @torch.no_grad()
    def update(averages: list[Tensor], parameters: list[Tensor], num_averaged: Tensor) -> None:
        count = float(num_averaged)
        torch._foreach_lerp_(averages, parameters, 1 - min(decay, (1 + count) / (10 + count)))

    return update


def _learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a half cosine to zero (paper, Table V)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _to(window: Window, device: torch.device) -> Window:
    inputs = type(window.inputs)(*(tensor.to(device) for tensor in window.inputs))
    return Window(inputs, *(tensor.to(device) for tensor in window[1:]))


def _with_prefix(policy: PolicyConfig, config: TrainConfig) -> PolicyConfig:
    if config.max_prefix is None:
        return policy
    action = msgspec.structs.replace(policy.action, max_prefix=config.max_prefix)
    return check(msgspec.structs.replace(policy, action=action))


def _check_fits(config: Any, dataset: LeRobotDataset, start: Path) -> None:
    wanted = [camera.name for camera in config.processing.cameras]
    if wanted != list(dataset.cameras):
        raise BitvlaError(f"{start} was trained on the cameras {wanted}, the data has {list(dataset.cameras)}")
    if dataset.action.shape[1] != config.action.dim or dataset.state.shape[1] != config.action.state_dim:
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
