"""The one training loop: steps, learning rate, average weights, progress, checkpoints, resume."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import math
import platform
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

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
from bitvla.config import to_dict
from bitvla.convert.source import Source
from bitvla.convert.training import Adapters, open_start
from bitvla.data.lerobot import AS_STORED, LeRobotDataset, name_of
from bitvla.data.llava import LlavaDataset
from bitvla.errors import BitvlaError
from bitvla.files import put
from bitvla.model.checkpoint import save_checkpoint
from bitvla.model.lora import trained_state
from bitvla.model.network import Backbone, checkpoint_activations, layers
from bitvla.train import stages
from bitvla.train.batches import TokenWindow, Window, batches, of_workers, workers_alive
from bitvla.train.config import FREE_TO_CHANGE, TrainConfig, load
from bitvla.train.language import LanguageLearner
from bitvla.train.policy import PolicyLearner
from bitvla.train.starts import (
    check_asked,
    check_mixture,
    check_out,
    check_stage,
    check_teacher,
    check_tower,
    trains_language,
)

STATE_FILE = "training_state.pt"
LAUNCHERS_SECONDS = 2  # within which a signal that is sent twice was meant once


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
        BitvlaError: unusable configuration, data or checkpoint; a loss that is not finite; memory that ran out.
    """
    check_stage(stage, teacher)
    check_tower(stage, init, tower)
    config = load(config_path)
    start = init or (teacher if stage == "distill" else None)
    sources = [data] if isinstance(data, str | Path) else list(data)
    names = [name_of(source) for source in sources]
    check_mixture(stage, config, names)
    parents = {path for path in (start, teacher) if path is not None}
    check_out(Path(out), parents if tower is None else {*parents, tower})
    opened = {path: open_start(path, tower) for path in parents}
    if teacher is not None:
        check_teacher(opened[teacher].config, teacher, opened[teacher].provenance)
    of_language = trains_language(stage, None if teacher is None else opened[teacher].config)
    check_asked(stage, config, of_language)
    if config.lora_rank and start is None:
        raise BitvlaError(f"lora_rank is {config.lora_rank}: adapters need a checkpoint to adapt; give one with --init")
    accelerator = _accelerator(config, Path(out))
    set_seed(config.seed)
    source = None if start is None else opened[start]
    share = None if cache_bytes is None else cache_bytes // len(sources)
    learner: Learner
    if of_language:
        learner = LanguageLearner(stage, config, LlavaDataset(sources[0], share), source)
    else:
        described = [config.data.get(name, AS_STORED) for name in names]
        datasets = [LeRobotDataset(one, how, share) for one, how in zip(sources, described, strict=True)]
        learner = PolicyLearner(stage, config, datasets, source, sentences)
    try:
        return Trainer(stage, config, learner, Path(out), accelerator, start, teacher, opened).train()
    except torch.OutOfMemoryError as error:
        raise BitvlaError(
            f"the device has too little memory ({str(error).splitlines()[0]}); checkpoint_activations = true, shard = "
            "true on several devices, or a smaller batch_size with as much more gradient_accumulation takes less, and "
            "the same command goes on; --plan says how much"
        ) from None


class Learner(Protocol):
    """What the loop trains: a network, the data that it learns from, and what is minimised."""

    network: Any
    tokenizer: Tokenizer
    auxiliary: stages.AuxiliaryHead
    unit: str  # what an epoch has so many of

    def windows(self, split: str, **shard: int) -> Any:
        """The batches of "train" or "validation": a dataset with `num_frames`, `prepare(step)` and `where(step)`."""

    def teacher(self, source: Source) -> torch.nn.Module:
        """Whose states are followed."""

    def objective(self, teacher: stages.Network | None) -> stages.Objective:
        """Without the teacher what is validated."""

    def data(self) -> list[dict[str, Any]]:
        """What the data are, for the record."""

    def golden(self, network: Any) -> tuple[dict[str, Tensor], list[str]] | None:
        """A few raw observations with the answers of `network`, which has the averaged weights."""


class Trainer:
    """One run of a stage."""

    def __init__(
        self,
        stage: str,
        config: TrainConfig,
        learner: Learner,
        out: Path,
        accelerator: Accelerator,
        start: Path | None,
        teacher: Path | None,
        opened: Mapping[Path, Source],
    ) -> None:
        self.stage, self.config, self.learner, self.out, self.accelerator = stage, config, learner, out, accelerator
        self.console = Console(stderr=True, quiet=not accelerator.is_main_process, soft_wrap=True)
        self.network, self.auxiliary = learner.network, learner.auxiliary
        # What is saved: whole, and not on the device; brought up to date with the averages when it is needed.
        self.averaged = copy.deepcopy(self.network).requires_grad_(False)
        parents = {"init": start, "teacher": teacher}
        self.provenance = self._provenance({name: opened[path] for name, path in parents.items() if path is not None})
        if config.lora_rank and start is not None:
            base = str(start.resolve()) if start.exists() else str(start)
            self.provenance["adapters"] = to_dict(
                Adapters(base=base, sha256=opened[start].sha256, rank=config.lora_rank, alpha=config.lora_alpha)
            )
        state = self._read_state()
        if state is not None:
            self.network.load_state_dict(self.network.state_dict() | state["network"])
            self.auxiliary.load_state_dict(state["auxiliary"])
            self.averaged.load_state_dict(self.averaged.state_dict() | state["averaged"])
        self.step = 0 if state is None else int(state["step"])
        found = set(accelerator.gather(torch.tensor([self.step], device=accelerator.device)).tolist())
        if len(found) > 1:  # on machines without a common disk
            raise BitvlaError(
                f"the processes read checkpoints of the steps {sorted(found)} from --out {out}; give a "
                "folder that all of them see"
            )
        self._place(self._objective(None if teacher is None else opened[teacher]), state)
        self._last_log: tuple[int, float] | None = None

    def _objective(self, teacher: Source | None) -> stages.Objective:
        """What is minimised; the teacher, where there is one, stands frozen beside what it teaches."""
        if teacher is None:
            return self.learner.objective(None)
        frozen: Any = self.learner.teacher(teacher).requires_grad_(False).eval().to(self.accelerator.device)
        if self._sharded:
            shard(frozen)
        return self.learner.objective(torch.compile(frozen) if self.config.compile else frozen)

    def _place(self, objective: stages.Objective, state: dict[str, Any] | None) -> None:
        """Bring everything to its device, or its shards to their processes; optimisers over what is there then."""
        config, device = self.config, self.accelerator.device
        part = stages.trained_part(self.stage, self.network)
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
    def _sharded(self) -> bool:
        return self.config.shard and self.accelerator.num_processes > 1

    def train(self) -> dict[str, Any]:
        config, passes = self.config, self.config.gradient_accumulation
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BitvlaError(f"--out {self.out} cannot be a folder: {error.strerror}; choose another") from None
        if config.trackers:
            self.accelerator.init_trackers("bitvla", init_kwargs={"wandb": {"name": self.out.name}})
        split = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        with self.accelerator.local_main_process_first():  # which decodes the videos once
            self.windows = self.learner.windows("train", **split)
            self.windows.prepare(self.step * passes)
        self._announce(self.windows)
        steps = range(self.step * passes, config.steps * passes)
        losses: dict[str, float] = {}
        latest: list[stages.Losses] = []
        prepared = closing(batches(self.windows, steps, config.workers))
        with _interruptible() as interrupted, workers_alive(), prepared as windows, self._progress() as progress:
            bar = progress.add_task(self.stage, total=config.steps, completed=self.step, losses="")
            for number, window in zip(steps, windows, strict=True):
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
            self._save(progress.console)
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

    # -- keeping -------------------------------------------------------------------------

    def _provenance(self, parents: dict[str, Source]) -> dict[str, Any]:
        settings = msgspec.json.encode(self.config)
        return {
            "stage": self.stage,
            "config": to_dict(self.config),
            "config_digest": hashlib.sha256(settings).hexdigest(),
            "data": self.learner.data(),
            "parents": {
                name: {"digest": source.sha256, "provenance": source.provenance} for name, source in parents.items()
            },
            "versions": {
                "bitvla": bitvla.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

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
        """What a run goes on from, in whole tensors: the number of processes may change. Every process must ask; the
        main one alone gets it, as the memory of a machine may hold it once, and not once a process."""

        def kept(value: Any) -> Any:
            whole = _whole(value)
            return whole if self.accelerator.is_main_process else None

        with torch.no_grad():
            for average, value in zip(self.kept_averages, self.averages, strict=True):
                average.copy_(_whole(value))
        parts = {
            "network": trained_state(self.network),
            "auxiliary": self.auxiliary.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
        }
        gathered: dict[str, Any] = tree_map(kept, parts)
        return {**gathered, "averaged": trained_state(self.averaged), "step": self.step, "identity": self._identity()}

    def _save(self, console: Console) -> None:
        """Write the averaged weights as a policy, then the state of the run."""
        state = self._state()
        if self.accelerator.is_main_process:
            self._write(state, console)
        self.accelerator.wait_for_everyone()  # where one process ends, a launcher ends the others, also one that writes

    def _write(self, state: dict[str, Any], console: Console) -> None:
        validation = self._validate()
        shown = _show(validation) or "left out (few episodes, or validation_batches = 0)"
        console.print(f"step {self.step}: validation {shown}")
        self._record({f"validation_{k}": v for k, v in validation.items()})
        provenance = {**self.provenance, "steps": self.step, "validation": validation}
        averaged, temporary = self.averaged.cpu(), self.out / (STATE_FILE + ".tmp")
        golden = self.learner.golden(averaged)
        try:
            save_checkpoint(self.out, averaged, self.learner.tokenizer, golden, provenance)
            torch.save(state, temporary)
            put(temporary, self.out / STATE_FILE)
        except (RuntimeError, SafetensorError) as error:  # as PyTorch and safetensors tell of a full disk
            if of_workers(error):
                raise
            raise BitvlaError(
                f"the checkpoint of step {self.step} cannot be written to {self.out} ({' '.join(str(error).split())}); "
                "free some space and run the same command again"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Mean losses of the averaged weights over episodes that are never trained on."""
        windows = self.learner.windows("validation")
        if windows.num_frames == 0 or self.config.validation_batches == 0:
            return {}
        device = self.accelerator.device
        averaged = stages.trained_part(self.stage, self.averaged.eval().to(device))
        plain = self.learner.objective(None)
        with self.accelerator.autocast():
            rows = [plain(averaged, _to(windows[i], device)) for i in range(self.config.validation_batches)]
        return {name: sum(row[name].item() for row in rows) / len(rows) for name in rows[0]}

    # -- telling -------------------------------------------------------------------------

    def _announce(self, windows: Any) -> None:
        config, processes = self.config, self.accelerator.num_processes
        effective = config.batch_size * config.gradient_accumulation
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        trained = sum(parameter.numel() for parameter in self.parameters)
        self.console.print(
            f"{self.stage} of '{self.network.config.name}' ({config.precision} precision, {parameters / 1e6:.2f} M "
            f"parameters, {trained / 1e6:.2f} M trained): {windows.num_frames} {self.learner.unit}, "
            f"{config.steps} steps of {effective} windows ({config.gradient_accumulation} x {processes} process(es) x "
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
    return accelerator


def _show(losses: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in losses.items())


@contextmanager
def _interruptible() -> Iterator[list[float]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step, as times; who asks again, later than a
    launcher that passes on what all have heard, is not kept waiting, as for a batch that never comes."""
    received: list[float] = []

    def collect(*_: object) -> None:
        received.append(time.monotonic())
        if received[-1] - received[0] > LAUNCHERS_SECONDS:
            raise KeyboardInterrupt("stopped at once; run the same command again to go on from the last checkpoint")

    previous = {number: signal.signal(number, collect) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
