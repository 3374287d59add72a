"""The flow-matching head: what it is trained towards, that it learns it, and that a policy with it is like any other.

    pytest tests/test_flow.py

`test_runtime.py` compares its arithmetic with NumPy, `test_parity.py` with PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bitvla
from bitvla import BitvlaError
from bitvla.bundle import read, tensor_specs
from bitvla.config import FlowConfig, check
from bitvla.convert.pack import pack
from bitvla.convert.training import open_start, read_config
from bitvla.model.network import BitVLA, FlowHead
from bitvla.model.policy import TorchPolicy
from bitvla.processing.vectors import normalize
from bitvla.runtime.inspect import inspect
from bitvla.runtime.verify import verify
from bitvla.runtime.work import work
from bitvla.train.loop import run
from bitvla.train.plan import Count, plan
from checkpoints import flow_config, observation, pack_random, tiny_config, token_config
from datasets import write_dataset
from test_train import first_observation
from training import FLOW, POLICY, losses_of, windows, write_config

DTYPES = {"bfloat16": np.uint16, "int8": np.int8, "ternary": np.uint8}
HEAD_ONLY = {"flow": FLOW, "learning_parts": ["head"], "auxiliary_weight": 0, "keypoint_weight": 0}
FLOWING = POLICY.replace(
    "head_hidden_size = 16, head_blocks = 1",
    "head_hidden_size = 0, head_blocks = 0, max_prefix = 2, flow = { hidden_size = 16, num_heads = 2 }",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "random")


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ternary policy with a regression head."""
    folder = tmp_path_factory.mktemp("plain")
    run("finetune", write_config(folder, precision="ternary", steps=1), data, folder / "plain")
    return folder / "plain"


# What it is trained towards.


def test_noisy_chunks_lie_on_the_line_to_the_actions(data: Path, tmp_path: Path) -> None:
    clean, window = (windows(data, tmp_path, FLOWING, flow_samples=samples)[3] for samples in (0, 400))
    noisy, time = window.inputs.noisy, window.inputs.time
    assert noisy.shape == window.actions.shape == (8, 400, 3, 3)
    arrived = noisy + (1 - time[..., None]) * window.actions
    torch.testing.assert_close(arrived, clean.actions[:, None].expand_as(arrived), atol=1e-5, rtol=0)
    noise = clean.actions[:, None] - window.actions
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert abs(time.mean() - 0.4) < 0.02  # of 1 - u, u of Beta(1.5, 1)
    assert torch.equal(time[..., :1].expand_as(time), time)  # one time for a chunk
    assert clean.inputs.time.numel() == 0
    for rank in range(2):
        share = windows(data, tmp_path, FLOWING, flow_samples=400, rank=rank, world_size=2)[3]
        assert torch.equal(share.inputs.noisy, noisy[rank::2])
        assert torch.equal(share.inputs.time, time[rank::2])


def test_decided_actions_have_arrived_and_are_no_target(data: Path, tmp_path: Path) -> None:
    window = windows(data, tmp_path, FLOWING, flow_samples=4, prefix_dropout=0.0)[3]
    decided = nn.functional.pad(window.inputs.decided, (0, 1))[:, None].expand(-1, 4, -1)
    assert decided[..., 0].all()
    assert torch.equal(window.inputs.time == 1, decided)
    given = nn.functional.pad(window.inputs.prefix, (0, 0, 0, 1))[:, None].expand_as(window.inputs.noisy)
    torch.testing.assert_close(window.inputs.noisy[decided], given[decided])
    assert not window.valid.expand_as(decided)[decided].any()


def test_it_learns_two_chunks_by_heart(data: Path, tmp_path: Path) -> None:
    """The loss of one batch falls, and then the noise flows to the chunks: velocity, time and steps fit together."""
    torch.manual_seed(0)
    config = flow_config(steps=5)
    action, flow = config.action, config.action.flow
    head = FlowHead(action, flow, config.language, "eager")
    states = torch.randn(2, action.horizon, action.slots_per_step * config.language.hidden_size)
    actions = torch.rand(2, action.horizon, action.dim) * 2 - 1
    optimizer, losses = torch.optim.Adam(head.parameters(), 1e-2), []
    for _ in range(250):
        noise, time = torch.randn(2, 8, *actions.shape[1:]), torch.rand(2, 8, 1).expand(-1, -1, action.horizon)
        velocity = head(states, torch.lerp(noise, actions[:, None], time[..., None]), time)
        loss = (velocity - (actions[:, None] - noise)).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:5])
    nothing, none = torch.zeros(2, 2, action.dim), torch.zeros(2, 2, dtype=torch.bool)
    with torch.no_grad():
        chunk = head.sample(states, nothing, none)
        assert (chunk - actions).abs().mean() < 0.15 < (actions[0] - actions[1]).abs().mean() / 2
        given = head.sample(states, nothing, torch.tensor([[True, False], [False, False]]))
    assert torch.equal(given[0, 0], nothing[0, 0])
    assert torch.equal(given[1], chunk[1])


# A policy with it.


@pytest.mark.parametrize("precision", ["full", "ternary"])
def test_the_head_alone_is_trained_and_packs(data: Path, plain: Path, tmp_path: Path, precision: str) -> None:
    """On a policy that has another one; everything else stays as it is."""
    changes = {**HEAD_ONLY, "flow": {**FLOW, "precision": precision}, "optimizer": "muon"}
    ternary = precision == "ternary"
    config = write_config(tmp_path, "", precision="ternary", steps=30, learning_rate=1e-2, **changes)
    run("finetune", config, data, tmp_path / "flow", init=plain)
    losses = list(losses_of(tmp_path / "flow").values())
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])
    before, after = (load_file(path / "model.safetensors") for path in (plain, tmp_path / "flow"))
    assert not any(name.startswith("action_head.model.") for name in after)
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name
    pack(tmp_path / "flow", tmp_path / "policy.safetensors")
    trained, packed = TorchPolicy.load(tmp_path / "flow"), bitvla.load(tmp_path / "policy.safetensors")
    seen = first_observation(data)
    one, other = (normalize(policy.act(seen), packed.config.processing.action) for policy in (trained, packed))
    assert np.abs(one - other).mean() < (0.05 if ternary else 1e-4)
    assert inspect(tmp_path / "policy.safetensors")["parts"]["head"]["ternary"] == ternary * 2 * 2 * 16 * (32 + 32)


def test_another_precision_or_number_of_steps_keeps_its_weights(data: Path, plain: Path, tmp_path: Path) -> None:
    settings = {"precision": "ternary", "steps": 1, "learning_rate": 1e-9, **HEAD_ONLY}
    run("finetune", write_config(tmp_path, "", **settings), data, tmp_path / "full", init=plain)
    config = write_config(tmp_path, "", **{**settings, "flow": {**FLOW, "precision": "ternary", "steps": 7}})
    run("finetune", config, data, tmp_path / "ternary", init=tmp_path / "full")
    full, ternary = (load_file(tmp_path / which / "model.safetensors") for which in ("full", "ternary"))
    assert full.keys() == ternary.keys()
    for name in full:  # the noise as well
        torch.testing.assert_close(full[name], ternary[name], atol=1e-6, rtol=0)
    other = write_config(tmp_path, "", **{**settings, "flow": {**FLOW, "hidden_size": 32}})
    with pytest.raises(BitvlaError, match=r"action_head.noise|action_head.*is \[.*16\], it must be \[.*32\]"):
        run("finetune", other, data, tmp_path / "wider", init=tmp_path / "full")


def test_a_new_policy_may_be_described_with_it(data: Path, plain: Path, tmp_path: Path) -> None:
    """Its backbone is that of a checkpoint then, also of one that regresses; adapters leave it whole."""
    new = FLOWING.replace("max_prefix = 2, ", "")
    config = write_config(tmp_path, new, precision="ternary", steps=1, learning_rate=1e-9, lora_rank=2)
    run("finetune", config, data, tmp_path / "flow", init=plain)
    kept = load_file(tmp_path / "flow" / "model.safetensors")
    assert {"action_head.noise", "action_head.layers.3.mlp.fc1.weight"} <= kept.keys()
    assert not any("lora" in name for name in kept if name.startswith("action_head."))
    start, now = open_start(plain), open_start(tmp_path / "flow")
    for name in tensor_specs(start.config).keys() & tensor_specs(now.config).keys():
        np.testing.assert_allclose(now.tensor(name), start.tensor(name), atol=1e-6)


def test_its_noise_is_of_the_seed_and_stays(tmp_path: Path) -> None:
    networks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        networks.append(BitVLA(flow_config(), 5, 6))
    one, same, other = (network.action_head.noise for network in networks)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    policy = bitvla.load(pack_random(tmp_path, flow_config()))
    seen = observation(flow_config())
    first = policy.act(seen)
    policy.act(observation(flow_config(), 1))
    np.testing.assert_array_equal(policy.act(seen), first)


@pytest.mark.parametrize("expert", ["bfloat16", "int8", "ternary"])
def test_its_layers_alone_are_rounded_and_verified_on_every_instruction_set(tmp_path: Path, expert: Any) -> None:
    config = tiny_config(action=msgspec.structs.replace(flow_config().action, max_prefix=3))
    exact, rounded = (
        pack_random(tmp_path / name, config, expert=chosen) for name, chosen in (("exact", None), ("rounded", expert))
    )
    before, after = read(exact).tensors, read(rounded).tensors
    changed = {
        name.removesuffix("_scale")
        for name in after
        if before.get(name) is None or after[name].dtype != before[name].dtype
    }
    layers = {name for name, spec in tensor_specs(config).items() if spec.kind == "matrix" and ".layers." in name}
    assert changed == {name for name in layers if name.startswith("action_head.")}
    assert {after[name].dtype for name in changed} == {np.dtype(DTYPES[expert])}
    result = verify(rounded)
    assert result["passed"], result
    one, other = (bitvla.load(path).act(observation(config)) for path in (exact, rounded))
    assert not np.array_equal(one, other)


def test_work_is_what_a_step_of_the_network_takes() -> None:
    config = flow_config(steps=1)
    action, width = config.action, config.action.flow.hidden_size
    head = FlowHead(action, action.flow, config.language, "eager")
    states = torch.zeros(1, action.horizon, action.slots_per_step * config.language.hidden_size)
    with Count() as count:
        head(states, torch.zeros(1, 1, action.horizon, action.dim), torch.zeros(1, 1, action.horizon))
    times = action.horizon - 2  # the runtime tells each time once, and that of decided actions
    assert work(config, 40)["head"].total == count.flop // 2 - times * width**2


def test_a_plan_counts_what_is_trained(plain: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, "", precision="ternary", **HEAD_ONLY)
    result = plan("finetune", config, init=plain)
    head = FlowHead(*_head_sizes(plain), "eager")
    assert result["parameters"]["trained"] == sum(parameter.numel() for parameter in head.parameters())


def _head_sizes(checkpoint: Path):
    config = read_config(checkpoint)
    return config.action, FlowConfig(**FLOW), config.language


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, r"action\.flow\.hidden_size 24 is not even, or not a multiple of .*num_heads 5"),
        ({"hidden_size": 3}, r"hidden_size 3 is not even"),
        ({"steps": 0}, r"action\.flow\.steps is 0; it must be a size from 1"),
        ({"steps": 1001}, r"action\.flow\.steps is 1001; more than 1000 are a mistake"),
        ({"layer_norm_eps": 0.0}, r"layer_norm_eps 0.0 is not positive"),
    ],
)
def test_impossible_sizes_are_named(changes: dict, message: str) -> None:
    with pytest.raises(BitvlaError, match=message):
        flow_config(**changes)


def test_what_is_no_expert_in_full_precision_is_not_rounded(tmp_path: Path) -> None:
    with pytest.raises(BitvlaError, match="has no flow-matching expert to store in int8; leave out --expert"):
        pack_random(tmp_path / "plain", tiny_config(), expert="int8")
    with pytest.raises(BitvlaError, match="was trained ternary, it cannot be int8"):
        pack_random(tmp_path / "ternary", flow_config(precision="ternary"), expert="int8")


def test_one_head_only() -> None:
    flow = flow_config().action.flow
    with pytest.raises(BitvlaError, match=r"head_hidden_size is 56; it must be 0, as action\.flow takes the place"):
        tiny_config(action=msgspec.structs.replace(tiny_config().action, flow=flow))
    tokens = token_config()
    with pytest.raises(BitvlaError, match=r"action\.flow and action\.bins are two kinds of actions"):
        check(msgspec.structs.replace(tokens, action=msgspec.structs.replace(tokens.action, flow=flow)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flow": {"stepz": 3}}, "unknown field `stepz`.*; did you mean 'steps'"),
        ({"flow": {**FLOW, "num_heads": 3}}, "num_heads 3"),
        ({"flow_samples": 0}, "flow_samples must be positive"),
        ({"flow": {**FLOW, "precision": "int4"}}, "Invalid enum value 'int4'"),
        (HEAD_ONLY, "vision_tower.* does not learn, and no --init gives it: it would stay random"),
    ],
)
def test_what_is_wrong_in_a_run_is_named(data: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(BitvlaError, match=message):
        run("finetune", write_config(tmp_path, **changes), data, tmp_path / "out")


def test_what_learns_is_checked(data: Path, plain: Path, tmp_path: Path) -> None:
    prefixed = write_config(tmp_path, "", **HEAD_ONLY, max_prefix=1)
    with pytest.raises(BitvlaError, match=r"prefix_projector.weight does not learn, and .*plain has never learnt it"):
        run("finetune", prefixed, data, tmp_path / "out", init=plain)
    with pytest.raises(BitvlaError, match=r"learning_parts = \['head'\] leaves nothing to learn in stage 'localize'"):
        plan("localize", write_config(tmp_path, "", **HEAD_ONLY | {"keypoint_weight": 0.1}), init=plain)
    with pytest.raises(BitvlaError, match="lora_rank and learning_parts both say what learns"):
        run("finetune", write_config(tmp_path, "", **HEAD_ONLY, lora_rank=2), data, tmp_path / "out", init=plain)
