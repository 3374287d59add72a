"""What a training run takes, before there are weights or data: parameters, memory, arithmetic, time.

One pass of the stage runs, forwards and backwards, on tensors that have a shape and no values; what it allocates and
multiplies is counted. So the figures are of the network and the stage as they are, not of formulas about them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import bitvla
from bitvla.bundle import TensorSpec, tensor_specs
from bitvla.config import Camera, LanguageModelConfig, PolicyConfig, ProcessingConfig, Statistics
from bitvla.convert import official
from bitvla.convert.source import read_json
from bitvla.convert.training import read_config
from bitvla.data.lerobot import AS_STORED, cameras_of, locate, name_of, read_info
from bitvla.errors import BitvlaError
from bitvla.model.lora import add_adapters
from bitvla.model.network import Batch, BitVLA, VisionLanguageModel, VisionTower, checkpoint_activations, layers
from bitvla.model.ternary import TernaryLinear
from bitvla.train import stages
from bitvla.train.batches import TokenWindow, Window
from bitvla.train.config import NewPolicy, TrainConfig, check_units, load
from bitvla.train.loop import optimizers
from bitvla.train.starts import (
    Start,
    check_asked,
    check_follows,
    check_frozen,
    check_mixture,
    check_stage,
    check_teacher,
    check_tower,
    start_model,
    start_policy,
    trains_language,
)

CHARACTERS_A_TOKEN = 4  # of English text, about
# FLOP of an operation, from its arguments; PyTorch's own table has the attention of GPUs only.
_FLOP: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *args, **_: sdpa_flop_count(
        *(tensor.shape for tensor in args[:3])
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *args, **_: sdpa_backward_flop_count(
        *(tensor.shape for tensor in args[:4])
    ),
}


def plan(
    stage: str,
    config_path: Path,
    *,
    init: Path | None = None,
    tower: Path | None = None,
    teacher: Path | None = None,
    data: str | Path | Sequence[str | Path] = (),
    devices: int = 1,
    tflops: float | None = None,
) -> dict[str, Any]:
    """Parameters by precision, bytes a device, tokens, FLOP and time of a run of `stage`.

    Args:
        stage, config_path, init, tower, teacher: as of `bitvla.train.loop.run`; of checkpoints no weights are read,
            of published ones nothing, and without a teacher one like the policy is assumed.
        data: as there; the first says which cameras there are, where neither `init` nor the configuration does.
        devices: how many share a batch.
        tflops: 1e12 FLOP a second that one device reaches in training; without it no time is given.

    Raises:
        BitvlaError: unusable configuration; a batch that the devices cannot share; cameras that nothing names.
    """
    if stage != "distill":  # which is like its student, where none is named
        check_stage(stage, teacher)
    check_tower(stage, init, tower)
    for checkpoint in (init, tower, teacher):
        _check_there(checkpoint)
    config, followed = load(config_path), _stored(teacher)
    if stage == "distill" and followed is not None:
        check_teacher(followed.config, followed.folder, followed.provenance)
    if config.batch_size % devices:
        raise BitvlaError(f"batch_size {config.batch_size} cannot be shared by {devices} devices; make it a multiple")
    start = init or (teacher if stage == "distill" else None)
    policy: PolicyConfig | LanguageModelConfig
    of_language = trains_language(stage, None if followed is None else followed.config) or (
        stage == "distill" and followed is None and config.model is not None
    )
    check_asked(stage, config, of_language)
    sources = [data] if isinstance(data, str | Path) else list(data)
    if sources:
        check_mixture(stage, config, [name_of(source) for source in sources])
    stored = _stored(start)
    if start is not None and stored is None and config.model is None and config.policy is None:
        raise BitvlaError(
            f"--plan reads nothing of a published checkpoint, as {start}; describe it in {config_path}, in a "
            f"{'[model]' if of_language else '[policy]'} section"
        )
    if of_language:
        if tower is not None and stored is not None:
            raise BitvlaError(f"{start} {official.SEES}")
        policy, length, views = start_model(stage, config, stored), config.max_tokens, 1
    else:
        policy = start_policy(stage, config, stored, lambda new: _described(new, config, sources))
        length, views = _sequence_length(policy), len(policy.processing.cameras)
    if followed is not None and stored is not None and isinstance(stored.config, type(policy)):
        check_follows(policy, followed)
    windows = config.batch_size // devices
    whole = _pass(stage, config, policy, windows, length, stored, checkpoints=False)
    thrifty = _pass(stage, config, policy, windows, length, checkpoints=True)
    passes = config.gradient_accumulation
    step = (thrifty if config.checkpoint_activations else whole).flop * devices * passes
    compute: dict[str, Any] = {"a step, TFLOP": step / 1e12, "the run, PFLOP": step * config.steps / 1e15}
    if tflops is not None:
        seconds = step / (devices * tflops * 1e12)
        compute |= {"a step, seconds": seconds, "the run, hours": seconds * config.steps / 3600}
    return {
        "stage": f"{stage} of '{policy.name}', {config.precision} precision, {views} views",
        "parameters": whole.parameters,
        "effective batch": {
            "windows a step": config.batch_size * passes,
            "as": f"{passes} x {devices} devices x {windows}",
            "tokens a window, about": length,
            "tokens a step, about": config.batch_size * passes * length,
            "windows in all": config.batch_size * passes * config.steps,
        },
        "memory a device, GB": _memory(whole, thrifty, devices),
        "arithmetic": compute,
    }


class _Pass(NamedTuple):
    """What one pass over the windows of one device has and takes: bytes, but for `parameters` and `flop`."""

    parameters: dict[str, int]
    weights: int
    average: int
    gathered: int  # whole at a time where weights are in shards: two layers, and what is outside of layers
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    flop: int


def _memory(whole: _Pass, thrifty: _Pass, devices: int) -> list[dict[str, Any]]:
    """Rows of a table: every device has all, or each its share (`shard = true`)."""
    rows = {
        "weights": whole.weights,
        "average of weights": whole.average,
        "teacher": whole.teacher,
        "gradients": whole.gradients,
        "optimiser state": whole.optimizer,
    }
    table: list[dict[str, Any]] = [
        {"": name, "whole": size / 1e9, "in shards": size / devices / 1e9} for name, size in rows.items()
    ]
    table.append({"": "weights gathered at a time", "whole": 0.0, "in shards": whole.gathered / 1e9})
    constant = {column: sum(row[column] for row in table) for column in ("whole", "in shards")}
    for name, size in (("activations", whole.activations), ("activations, checkpointed", thrifty.activations)):
        table.append({"": name, "whole": size / 1e9, "in shards": size / 1e9})
    for name, size in (("in all", whole.activations), ("in all, checkpointed", thrifty.activations)):
        table.append({"": name, **{column: value + size / 1e9 for column, value in constant.items()}})
    return table


def _pass(
    stage: str,
    config: TrainConfig,
    policy: PolicyConfig | LanguageModelConfig,
    windows: int,
    length: int,
    start: Start | None = None,
    *,
    checkpoints: bool,
) -> _Pass:
    # The tensors claim to be on a CPU; attention is that of a GPU, which keeps no scores.
    with FakeTensorMode():
        network: Any
        teacher: nn.Module | None = None
        objective: stages.Objective
        keypoints = int(stage == "localize")
        auxiliary = stages.AuxiliaryHead(policy, 0, keypoints)
        if isinstance(policy, LanguageModelConfig):
            network = VisionLanguageModel(policy, image_id=0, attention="sdpa")
            stages.freeze(stage, config, network)
            if stage == "distill" and policy.vision is not None:
                teacher = VisionTower(policy.vision, "sdpa").requires_grad_(False)
            objective = stages.likelihood if teacher is None else stages.distill_tower(config, teacher, image_id=0)
        else:
            network = BitVLA(policy, image_id=0, proprio_id=2, attention="sdpa")
            stages.freeze(stage, config, network)
            if stage == "distill":
                whole = msgspec.structs.replace(policy, precision="full")
                teacher = BitVLA(whole, 0, 2, "sdpa").requires_grad_(False)
            objective = stages.objective(stage, config, auxiliary, teacher)
        parameters = _count(network.parameters())
        ternary = sum(m.weight.numel() for m in network.modules() if isinstance(m, TernaryLinear))
        if config.lora_rank:
            add_adapters(network, config.lora_rank, config.lora_alpha)
        if start is not None:
            check_frozen(stage, network, start)
        part = stages.trained_part(stage, network)
        if checkpoints:
            checkpoint_activations(part)
        for parameter in _trained(part):
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # they are counted for themselves
        window: Any = _window(policy, windows, length, keypoints, config.flow_samples)
        counted = Count()
        with counted:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                loss = objective(part, window)["loss"]
            loss.backward()
        # What is frozen has neither gradients nor moments.
        trained, inside = _count(_trained(part)), [_count(layer.parameters()) for layer in layers(part)]
        return _Pass(
            parameters={
                "ternary": ternary,
                "full precision": parameters - ternary,
                "adapters": _count(network.parameters()) - parameters,
                "trained": trained,
                "of the teacher": 0 if teacher is None else _count(teacher.parameters()),
            },
            weights=4 * _count(network.parameters()),
            average=4 * trained,
            gathered=4 * (_count(part.parameters()) - sum(inside) + 2 * max(inside)),
            gradients=4 * trained,
            optimizer=sum(_state_bytes(optimizer, part) for optimizer in optimizers(network, auxiliary, config)),
            teacher=0 if teacher is None else 4 * _count(teacher.parameters()),
            activations=counted.peak,
            flop=counted.flop,
        )


class Count(TorchDispatchMode):
    """Counts FLOP, and the most bytes at a time of what is allocated inside."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if formula := _FLOP.get(func._overloadpacket):
            self.flop += formula(*args, **kwargs, out_val=result)
        known = {_storage(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (name := _storage(value)) not in known and name not in self._sizes:
                storage = value.untyped_storage()
                self._sizes[name] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, name)
        self.peak = max(self.peak, self._now)
        return result

    def _freed(self, storage: int) -> None:
        self._now -= self._sizes.pop(storage)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _trained(part: nn.Module) -> list[Tensor]:
    return [parameter for parameter in part.parameters() if parameter.requires_grad]


def _state_bytes(optimizer: torch.optim.Optimizer, part: nn.Module) -> int:
    """Of the moments: two of AdamW, one of Muon."""
    trained = {id(parameter) for parameter in _trained(part)}
    moments = 1 if isinstance(optimizer, torch.optim.Muon) else 2
    return 4 * moments * _count(p for group in optimizer.param_groups for p in group["params"] if id(p) in trained)


def _window(
    policy: PolicyConfig | LanguageModelConfig, windows: int, length: int, keypoints: int, flow_samples: int
) -> Window | TokenWindow:
    """As the loader makes them, without values."""
    if isinstance(policy, LanguageModelConfig):
        size = policy.vision.image_size if policy.vision else 0
        conversation = Batch(
            pixels=torch.empty(1, windows, 3, size, size),
            token_ids=torch.empty(windows, length, dtype=torch.int64),
            padding=torch.empty(windows, length, dtype=torch.bool),
            state=torch.empty(windows, 0),
            prefix=torch.empty(windows, 0, 0),
            decided=torch.empty(windows, 0, dtype=torch.bool),
        )
        return TokenWindow(conversation, torch.empty(windows, length, dtype=torch.int64))
    action, views, size = policy.action, len(policy.processing.cameras), policy.vision.image_size
    inputs = Batch(
        pixels=torch.empty(windows, views, 3, size, size),
        token_ids=torch.empty(windows, length, dtype=torch.int64),
        padding=torch.empty(windows, length, dtype=torch.bool),
        state=torch.empty(windows, action.state_dim),
        prefix=torch.empty(windows, action.max_prefix, action.dim),
        decided=torch.empty(windows, action.max_prefix, dtype=torch.bool),
    )
    if action.bins:
        return TokenWindow(inputs, torch.empty(windows, action.dim, dtype=torch.int64))
    actions = torch.empty(windows, *([flow_samples] if action.flow else []), action.horizon, action.dim)
    if action.flow:
        inputs = inputs._replace(noisy=actions, time=actions[..., 0])
    return Window(
        inputs,
        actions=actions,
        valid=torch.empty(actions.shape[:-1], dtype=torch.bool),
        auxiliary=torch.empty(windows, 0),
        keypoints=torch.empty(windows, views, keypoints, 2),
    )


def _sequence_length(policy: PolicyConfig) -> int:
    """Tokens of a window: exact but for the text, which is the template and the longest instruction."""
    prompt, action = policy.processing.prompt, policy.action
    text = len(prompt.template.replace("{images}", "").replace("{instruction}", "")) // CHARACTERS_A_TOKEN
    images = policy.vision.num_patches * len(policy.processing.cameras)
    return images + text + prompt.max_instruction_tokens + (action.dim if action.bins else action.num_slots + 1)


class _Stored(NamedTuple):
    """A training checkpoint of which no weights were read."""

    folder: Path
    config: PolicyConfig | LanguageModelConfig
    provenance: dict[str, Any]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return tensor_specs(self.config)


def _stored(start: Path | None) -> _Stored | None:
    """What the checkpoint of a start says that it is; a published one is not read."""
    if start is None or official.recognizes(start) or _is_on_the_hub(start):
        return None
    return _Stored(start, read_config(start), read_json(start / "provenance.json"))


def _described(new: NewPolicy, config: TrainConfig, data: Sequence[str | Path]) -> PolicyConfig:
    """A new policy without the statistics of its data."""
    check_units(new)
    names = new.cameras
    if names is None and data:
        chosen = config.data.get(name_of(data[0]), AS_STORED).cameras
        names = tuple(chosen or cameras_of(read_info(locate(data[0]))["features"]))
    if names is None:
        raise BitvlaError(
            "nothing says how many cameras there are: give --data, or policy.cameras in the configuration"
        )
    processing = ProcessingConfig(
        cameras=tuple(Camera(name=name, height=1, width=1) for name in names),
        image=new.image,
        prompt=new.prompt,
        state=_bounds(new.action.state_dim),
        action=_bounds(new.action.dim),
        control_hz=1.0,
        execute_horizon=new.execute_horizon,
    )
    return PolicyConfig(
        name=new.name,
        vision=new.vision,
        language=new.language,
        action=new.action,
        processing=processing,
        precision=config.precision,
    )


def _check_there(checkpoint: Path | None) -> None:
    """BitvlaError for what is not here and cannot be meant as an id on the Hub: a folder here has its owner's name."""
    if checkpoint is None or checkpoint.exists() or (_is_on_the_hub(checkpoint) and not checkpoint.parent.is_dir()):
        return
    raise BitvlaError(
        f"{checkpoint} does not exist; correct it, or where it is an id on the Hugging Face Hub leave it out: --plan "
        "reads nothing of it"
    )


def _is_on_the_hub(start: Path) -> bool:
    return not start.exists() and bitvla.HUB_ID.fullmatch(str(start)) is not None


def _bounds(size: int) -> Statistics:
    return Statistics(
        names=("",) * size, units=("",) * size, low=(-1.0,) * size, high=(1.0,) * size, mask=(True,) * size
    )
