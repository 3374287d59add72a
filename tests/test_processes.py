"""One run, however it is cut: over processes, into shards, into several passes a step, or without its activations."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from bitvla.errors import BitvlaError
from bitvla.train import loop
from bitvla.train.loop import run
from datasets import write_conversations, write_dataset
from training import BLIND, FLOW, MODEL, POLICY, TOKENS, losses_of, write_config


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "random")


def assert_same_run(one: Path, other: Path, steps: int) -> None:
    """Losses and weights are the same but for the order of float32 sums."""
    expected, actual = losses_of(one), losses_of(other)
    assert set(expected) == set(actual) == set(range(1, steps + 1))
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=1e-4), step
    weights, others = (load_file(out / "model.safetensors") for out in (one, other))
    for name, tensor in weights.items():
        if name.endswith("k_proj.bias"):
            continue  # a softmax does not depend on it: its gradient is rounding, which Adam makes steps of
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def two_processes(*command: object) -> subprocess.CompletedProcess[bytes]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*launch, *map(str, command)], env=environment, capture_output=True, timeout=900)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("finetune", {"gradient_accumulation": 2, "optimizer": "muon"}),
        ("finetune", {"shard": True, "film": True, "flow": FLOW, **BLIND}),
        ("pretrain", {"film": True}),
    ],
)
def test_two_processes_train_as_one(data, tmp_path, stage, changes):
    policy = TOKENS if stage == "pretrain" else POLICY
    config = write_config(tmp_path, policy, steps=6, save_every=3, **changes)
    run(stage, config, data, tmp_path / "one")
    command = ["-m", "bitvla", "train", stage, "--config", config, "--data", data, "--out", tmp_path / "two"]
    result = two_processes(*command)
    assert result.returncode == 0, result.stderr.decode()
    assert "2 process(es) x 4" in " ".join(result.stderr.decode().split())
    assert result.stdout.decode().count("checkpoint") == 1  # one of them speaks
    assert_same_run(tmp_path / "one", tmp_path / "two", steps=6)
    # The state of the run knows nothing of processes: one goes on where two stopped.
    before = load_file(tmp_path / "two" / "model.safetensors")
    run(stage, config, data, tmp_path / "two")
    after = load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_processes_that_see_different_folders_are_refused(data, tmp_path):
    """As on machines without a common disk, one of which holds the checkpoint."""
    config = write_config(tmp_path, POLICY, steps=2, save_every=2)
    run("finetune", config, data, tmp_path / "0")
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\nfrom bitvla.train.loop import run\n"
        "config, data, out = map(Path, sys.argv[1:])\nrun('finetune', config, data, out / os.environ['RANK'])\n"
    )
    result = two_processes(script, config, data, tmp_path)
    assert result.returncode != 0
    assert "checkpoints of the steps [0, 2]" in result.stderr.decode()
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("stage", ["localize", "pretrain", "finetune", "instruct"])
def test_all_that_asks_for_gradients_has_some(data, tmp_path, monkeypatch, stage):
    """Several processes wait for those of every parameter, also of heads that a stage has no use for."""
    without, check = list[list[str]](), loop.Trainer._check_finite

    def look(self: loop.Trainer, what: str, *rest: Any, **options: Any) -> None:
        if what == "gradient":
            asking = [(name, p) for name, p in self.trained.named_parameters() if p.requires_grad]
            without.append([name for name, p in asking if p.grad is None])
        check(self, what, *rest, **options)

    monkeypatch.setattr(loop.Trainer, "_check_finite", look)
    section, changes = {"pretrain": TOKENS, "instruct": MODEL}.get(stage, POLICY), {}
    if stage == "instruct":
        data, changes = write_conversations(tmp_path / "said", 8), {"learning_parts": ["tower", "connector", "decoder"]}
    run(stage, write_config(tmp_path, section, steps=1, validation_batches=0, **changes), data, tmp_path / "out")
    assert without == [[]]


def test_several_passes_a_step_are_one_large_batch(data, tmp_path):
    """Also in how windows are augmented and which actions are given as decided."""
    policy = POLICY.replace("horizon = 3,", "horizon = 3, max_prefix = 2,")
    run("finetune", write_config(tmp_path, policy, batch_size=8), data, tmp_path / "one")
    passes = write_config(tmp_path, policy, batch_size=2, gradient_accumulation=4)
    run("finetune", passes, data, tmp_path / "four")
    assert_same_run(tmp_path / "one", tmp_path / "four", steps=8)


@pytest.mark.parametrize("stage", ["localize", "finetune"])
def test_checkpointed_activations_change_nothing(data, tmp_path, monkeypatch, stage):
    run(stage, write_config(tmp_path, POLICY), data, tmp_path / "kept")
    calls = count_recomputations(monkeypatch)
    run(stage, write_config(tmp_path, POLICY, checkpoint_activations=True), data, tmp_path / "again")
    assert len(calls) == 8 * (2 if stage == "localize" else 4)  # two layers of the tower, two of the decoder
    assert_same_run(tmp_path / "kept", tmp_path / "again", steps=8)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("finetune", {"workers": 2, "checkpoint_activations": True, "shard": True, "save_every": 3}),
        ("pretrain", {"batch_size": 2, "gradient_accumulation": 4, "validation_batches": 0}),
    ],
)
def test_a_run_goes_on_cut_otherwise(data, tmp_path, monkeypatch, stage, changes):
    """As where memory ran out, or the loader was too slow."""
    policy = TOKENS if stage == "pretrain" else POLICY
    run(stage, write_config(tmp_path, policy, **BLIND), data, tmp_path / "whole")
    step = loop.Trainer._step

    def full(self: loop.Trainer, window: Any) -> Any:
        if self.step == 5:
            raise MemoryError
        return step(self, window)

    monkeypatch.setattr(loop.Trainer, "_step", full)
    with pytest.raises(MemoryError):
        run(stage, write_config(tmp_path, policy, **BLIND), data, tmp_path / "cut")
    monkeypatch.undo()
    run(stage, write_config(tmp_path, policy, **{**BLIND, **changes}), data, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut", steps=8)


def count_recomputations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from bitvla.model import network

    calls: list[Any] = []
    checkpoint = network.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(network, "checkpoint", counted)
    return calls


def test_a_batch_that_the_processes_cannot_share_is_refused(data, tmp_path, monkeypatch):
    class Three(loop.Accelerator):
        num_processes = 3

    monkeypatch.setattr(loop, "Accelerator", Three)
    with pytest.raises(BitvlaError, match="batch_size 8 cannot be shared by 3 processes"):
        run("finetune", write_config(tmp_path), data, tmp_path / "out")


def test_one_process_alone_holds_what_is_saved(data, tmp_path, monkeypatch):
    """Weights and moments, of all shards: the processes of a machine share its memory."""

    class Other(loop.Accelerator):
        is_main_process = False

    states, state = list[dict[str, Any]](), loop.Trainer._state
    monkeypatch.setattr(loop, "Accelerator", Other)
    monkeypatch.setattr(loop.Trainer, "_state", lambda self: states.append(state(self)) or states[-1])
    run("finetune", write_config(tmp_path, steps=1), data, tmp_path / "out")
    assert {type(leaf) for name in ("network", "optimizers") for leaf in tree_leaves(states[-1][name])} == {type(None)}


def test_processes_wait_for_the_one_that_decodes(data, tmp_path, monkeypatch):
    """Longer than the ten minutes that NCCL gives them."""
    given, accelerator = [], loop.Accelerator
    monkeypatch.setattr(loop, "Accelerator", lambda **options: given.append(options) or accelerator(**options))
    run("finetune", write_config(tmp_path, steps=1), data, tmp_path / "out")
    assert given[0]["kwargs_handlers"][0].timeout >= timedelta(hours=1)


def test_a_run_is_logged_for_tensorboard(data, tmp_path):
    with pytest.raises(BitvlaError, match="needs keypoint_weight"):
        run("localize", write_config(tmp_path, keypoint_weight=0, trackers=["tensorboard"]), data, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    run("finetune", write_config(tmp_path, steps=2, trackers=["tensorboard"]), data, tmp_path / "out")
    assert any(path.stat().st_size > 0 for path in (tmp_path / "out" / "bitvla").glob("events.out.tfevents.*"))
