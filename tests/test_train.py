"""Training: stages, exact resume, interruption, and what is refused."""

import gc
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bitvla.convert.pack import pack
from bitvla.data.lerobot import Conventions, LeRobotDataset
from bitvla.errors import BitvlaError
from bitvla.model.network import BitVLA
from bitvla.model.policy import TorchPolicy
from bitvla.train import batches, stages
from bitvla.train.config import Augmentation, load, policy_config
from bitvla.train.loop import run
from bitvla.train.plan import plan
from datasets import make_writer, random_episode, write_dataset
from training import FLOW, POLICY, TOKENS, losses_of, windows, write_config


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "random")


def test_three_stages_learn_and_make_a_policy(data, tmp_path):
    teacher_config = write_config(tmp_path, steps=60, learning_rate=3e-3)
    run("finetune", teacher_config, data, tmp_path / "teacher")
    losses = losses_of(tmp_path / "teacher")
    assert losses[60] < 0.8 * losses[1]

    student_config = write_config(tmp_path, policy="", precision="ternary", steps=4)
    run("distill", student_config, data, tmp_path / "distilled", teacher=tmp_path / "teacher")
    distilled = json.loads((tmp_path / "distilled" / "metrics.jsonl").read_text().splitlines()[0])
    assert min(distilled["vision"], distilled["decoder"]) > 0

    run("finetune", student_config, data, tmp_path / "student", init=tmp_path / "distilled")
    policy = TorchPolicy.load(tmp_path / "student")
    observation = {
        "images": {"front": np.zeros((16, 16, 3), np.uint8)},
        "state": np.zeros(3, np.float32),
        "instruction": "open the drawer",
    }
    assert policy.config.precision == "ternary"
    assert policy.act(observation).shape == (3, 3)
    provenance = json.loads((tmp_path / "student" / "provenance.json").read_text())
    assert provenance["parents"]["init"]["provenance"]["stage"] == "distill"


def test_localize_trains_the_tower_and_nothing_else(data, tmp_path):
    run("localize", write_config(tmp_path, steps=1), data, tmp_path / "one")
    run("localize", write_config(tmp_path, steps=60, learning_rate=3e-3), data, tmp_path / "many")
    losses = losses_of(tmp_path / "many")
    assert losses[60] < 0.95 * losses[1]
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    for name, tensor in one.items():
        in_tower = name.startswith("vision_tower.")
        assert in_tower or torch.equal(tensor, many[name]), name
    moved = {name for name, tensor in one.items() if not torch.equal(tensor, many[name])}
    assert any("patch_embedding" in name for name in moved)
    assert any("layers.1." in name for name in moved)

    config = write_config(tmp_path, policy="", steps=1)
    run("finetune", config, data, tmp_path / "policy", init=tmp_path / "many")
    provenance = json.loads((tmp_path / "policy" / "provenance.json").read_text())
    assert provenance["parents"]["init"]["provenance"]["stage"] == "localize"


def test_golden_answers_are_those_of_the_saved_network(data, tmp_path):
    run("finetune", write_config(tmp_path, steps=4), data, tmp_path / "out")
    golden = load_file(tmp_path / "out" / "golden.safetensors")
    instruction = "open the drawer"  # of episode 0
    observation = {
        "images": {"front": golden["0.image.front"].numpy()},
        "state": golden["0.state"].numpy(),
        "instruction": instruction,
    }
    np.testing.assert_allclose(TorchPolicy.load(tmp_path / "out").act(observation), golden["0.chunk"], atol=1e-6)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    run("finetune", write_config(folder, steps=1), data, folder / "teacher")
    return folder / "teacher"


# Runs a command that dies, without a chance to tidy up, where {where} says.
DYING = """
import os, signal, sys
from bitvla.cli import main
from bitvla.train import loop

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

step = loop.Trainer._step
loop.Trainer._step = lambda self, window: die() if self.step == {at} else step(self, window)
if {saving}:
    loop.torch.save = die
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("stage", "at", "saving", "changes"),
    [
        ("localize", 6, False, {}),
        ("pretrain", 6, False, {"gradient_accumulation": 2}),
        ("distill", 6, False, {"precision": "ternary"}),
        ("finetune", 2, False, {}),  # before anything is saved
        ("finetune", 6, False, {"optimizer": "muon", "flow": FLOW}),
        ("finetune", 6, False, {"precision": "ternary", "lora_rank": 2, "film": True}),
        ("finetune", -1, True, {}),  # the policy is written, the state of the run not yet
    ],
)
def test_a_killed_run_goes_on_to_the_same_weights(data, teacher, tmp_path, stage, at, saving, changes):
    policy = {"pretrain": TOKENS, "distill": ""}.get(stage, POLICY)
    config = write_config(tmp_path, policy, **changes)
    parents = {"teacher": teacher} if stage == "distill" else {"init": teacher} if "lora_rank" in changes else {}
    run(stage, config, data, tmp_path / "whole", **parents)

    command = ["train", stage, "--config", config, "--data", data, "--out", tmp_path / "cut"]
    command += [word for name, path in parents.items() for word in (f"--{name}", path)]
    code = DYING.format(at=at, saving=saving)
    with (tmp_path / "told").open("wb") as told:  # no pipe: its loader, which outlives it a little, would hold it open
        words = [sys.executable, "-c", code, *map(str, command)]
        status = subprocess.run(words, stdout=told, stderr=told, timeout=900).returncode
    assert status == -signal.SIGKILL, (tmp_path / "told").read_text()
    assert (tmp_path / "cut" / "training_state.pt").exists() == (at == 6)
    run(stage, config, data, tmp_path / "cut", **parents)
    expected, actual = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


@pytest.mark.parametrize("what", ["INT", "TERM"])
def test_a_signal_to_all_processes_of_a_run_keeps_the_work(data, tmp_path, monkeypatch, what):
    """As Ctrl-C, `timeout`, torchrun and schedulers send it; the loader still brings what a step in passes needs."""
    from bitvla.train import loop

    config = write_config(tmp_path, steps=50, save_every=100, gradient_accumulation=9, log_every=100)
    step, passes = loop.Trainer._step, []

    def interrupt_at_step_one(self, window):
        passes.append(window)
        if len(passes) == 10:
            processes = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
            subprocess.run(["kill", f"-{what}", *map(str, processes)], check=True)
            time.sleep(0.2)  # in which another process ends
        return step(self, window)

    monkeypatch.setattr(loop.Trainer, "_step", interrupt_at_step_one)
    kept, waited = tmp_path / "out" / "training_state.pt", list[bool]()
    monkeypatch.setattr(loop.Accelerator, "wait_for_everyone", lambda self: waited.append(kept.exists()))
    with pytest.raises(KeyboardInterrupt, match="go on"):
        run("finetune", config, data, tmp_path / "out")
    assert torch.load(kept, weights_only=True)["step"] == 2
    assert waited[-1]  # the other processes, until it is written: where they end, it is ended


def test_a_run_whose_batch_never_comes_can_be_stopped(data, tmp_path, monkeypatch):
    from bitvla.train import loop

    def stuck(self, step):
        for _ in range(2):
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(0.2)
        while True:
            time.sleep(60)

    monkeypatch.setattr(batches.Windows, "__getitem__", stuck)
    monkeypatch.setattr(loop, "LAUNCHERS_SECONDS", 0.1)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    with pytest.raises(KeyboardInterrupt, match="stopped at once"):
        run("finetune", write_config(tmp_path), data, tmp_path / "out")
    for process in multiprocessing.active_children():
        process.join(timeout=9)
        assert not process.is_alive()


def test_ctrl_c_at_the_end_does_not_lose_it(data, tmp_path, monkeypatch):
    from bitvla.train import loop

    validate = loop.Trainer._validate
    monkeypatch.setattr(loop.Trainer, "_validate", lambda self: os.kill(os.getpid(), signal.SIGINT) or validate(self))
    run("finetune", write_config(tmp_path, steps=2), data, tmp_path / "out")
    assert torch.load(tmp_path / "out" / "training_state.pt", weights_only=True)["step"] == 2


def test_a_loader_that_is_killed_while_a_checkpoint_is_written_is_not_a_full_disk(data, tmp_path, monkeypatch):
    from bitvla.train import loop

    def killed(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")  # as PyTorch does, anywhere

    monkeypatch.setattr(loop.torch, "save", killed)
    with pytest.raises(BitvlaError, match="a process that prepares batches was ended from outside"):
        run("finetune", write_config(tmp_path), data, tmp_path / "out")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(data, tmp_path, monkeypatch):
    from bitvla.train import loop

    step = loop.Trainer._step

    def poison(self, window):
        if self.step == 6:
            window = window._replace(actions=window.actions * float("nan"))
        return step(self, window)

    monkeypatch.setattr(loop.Trainer, "_step", poison)
    with pytest.raises(BitvlaError, match=r"nan at step 6, on episodes [0-9, ]+ of random; the last good"):
        run("finetune", write_config(tmp_path), data, tmp_path / "out")
    assert torch.load(tmp_path / "out" / "training_state.pt", weights_only=True)["step"] == 4
    TorchPolicy.load(tmp_path / "out")


def test_a_gradient_that_is_not_finite_moves_nothing(data, tmp_path, monkeypatch):
    """Of a finite loss: with it the next checkpoint, at step 4, would hold nothing but NaN."""
    from bitvla.train import loop

    calls, backward = [], loop.Accelerator.backward

    def poisoned(self, loss):
        backward(self, loss)
        calls.append(loss)
        if len(calls) == 4:
            self._optimizers[0].param_groups[0]["params"][0].grad.fill_(float("nan"))

    monkeypatch.setattr(loop.Accelerator, "backward", poisoned)
    with pytest.raises(
        BitvlaError, match=r"gradient became nan at step 3, on episodes [0-9, ]+ of random; nothing was"
    ):
        run("finetune", write_config(tmp_path, clip_gradient=0), data, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("size", [100_000, 300_000])  # less than the weights, and than the state of the run
def test_a_checkpoint_that_the_disk_refuses_is_one_line(data, tmp_path, size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(BitvlaError, match=r"the checkpoint of step 2 cannot be written to .*; free some space"):
            run("finetune", write_config(tmp_path, steps=2), data, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_memory_that_runs_out_is_one_line(data, tmp_path, monkeypatch):
    from bitvla.train import loop

    def full(self, window):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(loop.Trainer, "_step", full)
    with pytest.raises(BitvlaError, match=r"Tried to allocate 9 GiB\.\); checkpoint_activations = true"):
        run("finetune", write_config(tmp_path), data, tmp_path / "out")


def test_ctrl_c_is_heard_while_videos_are_decoded(data, tmp_path, monkeypatch):
    monkeypatch.setattr(batches.Windows, "prepare", lambda self, step: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run("finetune", write_config(tmp_path), data, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_on_a_gpu_goes_on_without_one(data, tmp_path, monkeypatch):
    config = write_config(tmp_path)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    run("finetune", config, data, tmp_path / "out")
    monkeypatch.undo()
    assert run("finetune", config, data, tmp_path / "out")["steps"] == 8


def test_matrices_decay_and_places_do_not(data, tmp_path):
    from bitvla.train import loop

    policy = POLICY.replace("head_hidden_size = 16, head_blocks = 1", f"flow = {_inline(FLOW)}").replace(
        "slots_per_step = 1,", "slots_per_step = 1, head_hidden_size = 0, head_blocks = 0,"
    )
    config = load(write_config(tmp_path, policy))
    network = BitVLA(policy_config(config.policy, LeRobotDataset(data), "full"), image_id=0, proprio_id=2)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decaying = {
        names[id(parameter)]
        for optimizer in loop.optimizers(network, torch.nn.Module(), config)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group["weight_decay"]
    }
    assert decaying == {n for n, p in network.named_parameters() if p.ndim >= 2 and "position" not in n}


def _inline(values: dict[str, Any]) -> str:
    return "{ " + ", ".join(f"{key} = {value}" for key, value in values.items()) + " }"


def test_another_configuration_does_not_continue_a_run(data, tmp_path):
    run("finetune", write_config(tmp_path, steps=4), data, tmp_path / "out")
    for changes, told in (
        ({"steps": 5}, "steps was 4, is 5"),
        ({"gradient_accumulation": 2, "log_every": 2}, "batch_size x gradient_accumulation was 8, is 16"),
        ({"augmentation": {"contrast": 0.5}, "seed": 8}, "augmentation.contrast was 0.2, is 0.5; seed was 7, is 8"),
    ):
        with pytest.raises(BitvlaError, match=f"another configuration, data or start: {re.escape(told)}; change it"):
            run("finetune", write_config(tmp_path, **{"steps": 4, **changes}), data, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "start")
    with pytest.raises(BitvlaError, match=r"start: init checkpoint was None, is [0-9a-f]{64}; change it"):
        run("finetune", write_config(tmp_path, steps=4), data, tmp_path / "out", init=tmp_path / "start")


def test_what_a_run_starts_from_is_not_overwritten(data, teacher, tmp_path):
    """A published checkpoint, or one without its training state, looks like a folder in which nothing has begun."""
    shutil.copytree(teacher, tmp_path / "start", ignore=shutil.ignore_patterns("training_state.pt"))
    before = (tmp_path / "start" / "model.safetensors").read_bytes()
    config, out = write_config(tmp_path, "", steps=1), tmp_path / "start" / ".." / "start"
    for stage, parent in (("finetune", "init"), ("distill", "teacher")):
        with pytest.raises(BitvlaError, match=r"start holds the checkpoint to start from, .*; choose another"):
            run(stage, config, data, out, **{parent: tmp_path / "start"})
    with pytest.raises(BitvlaError, match=r"start holds the checkpoint to start from"):
        run("align", config, data, out, init=tmp_path / "language", tower=tmp_path / "start")
    assert (tmp_path / "start" / "model.safetensors").read_bytes() == before


def test_a_damaged_tokenizer_is_named(data, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "start")
    (tmp_path / "start" / "tokenizer.json").write_text("{}")
    with pytest.raises(BitvlaError, match=r"start: the policy's tokenizer is damaged: Model missing"):
        run("finetune", write_config(tmp_path, "", steps=1), data, tmp_path / "out", init=tmp_path / "start")


@pytest.mark.parametrize("changes", [{"learning_parts": ["head"]}, {"lora_rank": 2}])
def test_a_decoder_that_nobody_has_taught_must_learn(data, teacher, tmp_path, changes):
    """The checkpoint of a tower has one, as it was drawn."""
    run("localize", write_config(tmp_path, steps=1), data, tmp_path / "tower")
    run("localize", write_config(tmp_path, "", steps=1), data, tmp_path / "again", init=tmp_path / "tower")
    config = write_config(tmp_path, "", steps=1, **changes)
    for start in ("tower", "again"):
        for train in (partial(run, data=data, out=tmp_path / "out"), plan):
            with pytest.raises(BitvlaError, match=rf"\S+ does not learn, and .*{start} has never learnt it"):
                train("finetune", config, init=tmp_path / start)
    run("localize", write_config(tmp_path, "", steps=1), data, tmp_path / "taught", init=teacher)
    run("finetune", config, data, tmp_path / "out", init=tmp_path / "taught")


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("finetune", {"learning_rat": 1}, "unknown field `learning_rat`; did you mean 'learning_rate'?"),
        ("finetune", {"augmentation": {"brightnes": 1}}, "brightnes.*; did you mean 'brightness'?"),
        ("finetune", {"augmentation": {"contrast": 20}}, r"Expected `float` <= 1.0 - at `\$.augmentation.contrast`"),
        ("finetune", {"mixture": {"random": 0}}, "weight of 'random' is 0"),
        ("finetune", {"shard": True, "optimizer": "muon"}, "shard = true needs"),
        ("finetune", {"trackers": ["wandb"]}, "'wandb' is not installed"),
        ("finetune", {"batch_size": 0}, "batch_size must be positive"),
        ("finetune", {"precision": "int3"}, "int3"),
        ("finetune", {"ema_decay": 1.0}, "ema_decay must be from 0 to below 1"),
        ("finetune", {"vision_learning_rate": 0.0}, "vision_learning_rate must be positive, it is 0.0"),
        ("finetune", {"warmup_steps": -1}, "warmup_steps must not be negative, it is -1"),
        ("finetune", {"seed": 1 << 32}, r"seed must be below 2\*\*32, it is 4294967296"),
        ("distill", {}, "needs a full-precision teacher"),
        ("localize", {"keypoint_weight": 0}, "needs keypoint_weight above 0"),
        ("aling", {}, "unknown stage 'aling'"),
    ],
)
def test_what_is_wrong_is_named(data, tmp_path, stage, changes, message):
    with pytest.raises(BitvlaError, match=message):
        run(stage, write_config(tmp_path, **changes), data, tmp_path / "out")


def test_cameras_of_other_names_are_told_where_to_be_named(data, tmp_path):
    config = write_config(tmp_path, policy=POLICY.replace('name = "test"', 'name = "test"\ncameras = ["full"]'))
    with pytest.raises(BitvlaError, match=r"no camera 'full', only front; .* \[data.random\] cameras = { full = "):
        run("finetune", config, data, tmp_path / "out")


def test_the_log_of_a_short_run_is_plain(data, tmp_path, capsys):
    run("finetune", write_config(tmp_path, steps=1, validation_batches=0), data, tmp_path / "out")
    log = capsys.readouterr().err
    assert "step 1: validation left out" in log
    assert "nan" not in log
    assert log.count("action_l1") == 1  # no row of a bar that nobody sees
    assert re.search(rf"^finetune of .* windows an epoch, of {LeRobotDataset(data).num_episodes} .* cpu$", log, re.M)


def test_what_does_not_fit_a_checkpoint_is_named_before_it_is_trained(data, teacher, tmp_path):
    plain, out, three = write_config(tmp_path, ""), tmp_path / "out", tmp_path / "three"
    make_writer(tmp_path / "large", size=32).append([random_episode(0, size=32)])
    with pytest.raises(BitvlaError, match="pictures of 16 x 16 from the camera 'front', the data has 32 x 32"):
        run("finetune", plain, tmp_path / "large", out, init=teacher)
    slow = write_config(tmp_path, "", data={"random": {"control_hz": 5}})
    with pytest.raises(BitvlaError, match=r"10 times a second, random has 5 .*: data\.random\.control_hz = 10"):
        run("finetune", slow, data, out, init=teacher)
    with pytest.raises(BitvlaError, match="stage 'finetune' follows no teacher"):
        run("finetune", plain, data, out, teacher=teacher)
    run("finetune", write_config(tmp_path, POLICY.replace("num_layers = 2", "num_layers = 3"), steps=1), data, three)
    for train in (partial(run, data=data, out=out), plan):
        with pytest.raises(BitvlaError, match=r"the student's vision\.num_layers is 3, .*teacher has 2"):
            train("distill", plain, init=three, teacher=teacher)
    assert not out.exists()
    (tmp_path / "file").touch()
    with pytest.raises(BitvlaError, match=r"--out .*file cannot be a folder"):
        run("finetune", plain, data, tmp_path / "file", init=teacher)
    (tmp_path / "foreign").mkdir()
    torch.save({}, tmp_path / "foreign" / "training_state.pt")
    with pytest.raises(BitvlaError, match=r"training_state\.pt cannot be read"):
        run("finetune", plain, data, tmp_path / "foreign", init=teacher)


@pytest.mark.parametrize(
    ("here", "there", "told"),
    [
        ("horizon = 3", "horizon = 5", r"action\.horizon is 5, .* has 3"),
        ("execute_horizon = 2", "execute_horizon = 3", r"execute_horizon is 3, .* has 2"),
        ('action_units = ["m", "m", "m"]', 'action_units = ["m", "m", "rad"]', r"action_units is .*rad.*, .* has \("),
        ('name = "test"', 'name = "test"\ncameras = ["wrist"]', r"cameras is \('wrist',\), .* has \('front',\)"),
    ],
)
def test_a_section_that_contradicts_its_checkpoint_is_refused_planned_or_not(
    data, teacher, tmp_path, here, there, told
):
    config = write_config(tmp_path, POLICY.replace(here, there))
    for train in (partial(run, data=data, out=tmp_path / "out"), plan):
        with pytest.raises(BitvlaError, match=rf"^policy\.{told}.*; make them equal$"):
            train("finetune", config, init=teacher)
    assert plan("finetune", config, init=Path("owner/published"), data=data)["stage"]  # of which nothing is read


def test_a_new_policy_that_cannot_be_is_refused(data, tmp_path):
    units = POLICY.replace('state_units = ["m", "m", "m"]', 'state_units = ["m"]')
    for train in (partial(run, data=data, out=tmp_path / "out"), partial(plan, data=data)):
        with pytest.raises(BitvlaError, match=r"policy\.state_units names 1 units, policy\.action\.state_dim is 3"):
            train("finetune", write_config(tmp_path, units))
    few = POLICY.replace("vocab_size = 300", "vocab_size = 200")
    with pytest.raises(BitvlaError, match=r"vocab_size leaves 200 tokens .* alone are 263; enlarge it by 63"):
        run("finetune", write_config(tmp_path, few), data, tmp_path / "out")
    blind = POLICY.replace("[policy.prompt]", '[policy.prompt]\npad_token = "<|end_of_text|>"')  # which ends a prompt
    with pytest.raises(BitvlaError, match=r"the prompt holds its own pad_token, <\|end_of_text\|>"):
        run("finetune", write_config(tmp_path, blind), data, tmp_path / "out")
    short = POLICY.replace("max_positions = 64", "max_positions = 11")
    with pytest.raises(BitvlaError, match=r"random have up to \d+ tokens, language\.max_positions is 11"):
        run("finetune", write_config(tmp_path, short), data, tmp_path / "out")


def test_a_policy_is_needed(data, tmp_path):
    with pytest.raises(BitvlaError, match=r"no \[policy\] section: give the checkpoint to go on from \(--init"):
        run("finetune", write_config(tmp_path, policy=""), data, tmp_path / "out")
    config, file = write_config(tmp_path, policy=""), tmp_path / "policy.safetensors"
    file.touch()
    for start in (tmp_path, file):
        with pytest.raises(BitvlaError, match="not a training checkpoint"):
            run("finetune", config, data, tmp_path / "out", init=start)


def test_a_ternary_teacher_is_refused(data, tmp_path):
    run("finetune", write_config(tmp_path, precision="ternary", steps=1), data, tmp_path / "ternary")
    with pytest.raises(BitvlaError, match="needs full precision"):
        run("distill", write_config(tmp_path, policy=""), data, tmp_path / "out", teacher=tmp_path / "ternary")


def test_batches_are_a_function_of_the_step_and_cover_an_epoch(data, tmp_path):
    whole = windows(data, tmp_path)
    steps = whole.num_frames // 8
    seen = np.concatenate([whole.indices(step) for step in range(steps)])
    assert len(set(seen.tolist())) == len(seen)
    again = windows(data, tmp_path)[steps - 1]
    assert torch.equal(again.inputs.pixels, whole[steps - 1].inputs.pixels)


def test_processes_that_prepare_batches_end_nothing_of_ours():
    """What waits here to be collected may own threads, which do not survive a fork: gRPC's servers wait for theirs."""
    ended = []

    class Owner:
        def __init__(self):
            self.itself = self

        def __del__(self):
            ended.append(os.getpid())

    class Collecting(torch.utils.data.Dataset):
        def __getitem__(self, step):
            gc.collect()
            return list(ended)

    gc.disable()
    try:
        Owner()
        assert list(batches.batches(Collecting(), range(2))) == [[], []]
        assert not ended
    finally:
        gc.enable()
    gc.collect()
    assert ended == [os.getpid()]
    assert not gc.get_freeze_count()


def test_processes_that_prepare_batches_do_not_wait_for_the_display(monkeypatch):
    """Whose thread may have had its lock when they were forked, and is not there to give it back."""

    class Locked:
        def write(self, text):
            raise AssertionError("this would wait for ever")

    class Complaining(torch.utils.data.Dataset):
        def __getitem__(self, step):
            print("a warning", file=sys.stderr)
            return step

    monkeypatch.setattr(sys, "stderr", Locked())
    assert list(batches.batches(Complaining(), range(2))) == [0, 1]


def test_processes_share_one_batch_augmented_alike(data, tmp_path):
    whole = windows(data, tmp_path)[3]
    for rank in range(2):
        share = windows(data, tmp_path, rank=rank, world_size=2)[3]
        assert torch.equal(share.inputs.pixels, whole.inputs.pixels[rank::2])
        assert torch.equal(share.actions, whole.actions[rank::2])


def test_validation_holds_out_whole_episodes_at_no_regular_distance(data, tmp_path):
    dataset = LeRobotDataset(data)
    held_out, trained = (windows(data, tmp_path, split=split)._frames for split in ("validation", "train"))
    assert sorted([*held_out, *trained]) == list(range(dataset.num_frames))
    assert not set(dataset.episode_index[held_out]) & set(dataset.episode_index[trained])
    assert (
        len({batches.held_out(episode.to_bytes(4, "little")) and episode % 10 for episode in range(2000)} - {False})
        >= 9
    )


def test_the_episodes_to_hold_out_can_be_named(data, tmp_path):
    dataset = LeRobotDataset(data, Conventions(held_out=(3, 7)))
    apart, trained = (windows(dataset, tmp_path, split=split)._frames for split in ("validation", "train"))
    assert set(dataset.episode_index[apart]) == {3, 7}
    assert set(dataset.episode_index[trained]) == set(range(dataset.num_episodes)) - {3, 7}
    for wrong in ((dataset.num_episodes,), tuple(range(dataset.num_episodes))):
        with pytest.raises(
            BitvlaError, match=rf"held_out must be some, not all, of .* 0 to {dataset.num_episodes - 1}"
        ):
            LeRobotDataset(data, Conventions(held_out=wrong))


def test_balanced_tasks_are_seen_equally_often(tmp_path):
    writer = make_writer(tmp_path / "uneven")
    writer.append([random_episode(0, length=30), random_episode(1, length=5), random_episode(3, length=7)])
    sentence = LeRobotDataset(tmp_path / "uneven").task_strings
    for balanced, expected in ((True, [30, 30]), (False, [30, 12])):
        whole = windows(tmp_path / "uneven", tmp_path, balance_tasks=balanced)
        assert whole.num_frames == sum(expected)
        episodes = whole._episode[whole._frames]
        assert [sum(sentence[e] == s for e in episodes) for s in (sentence[0], sentence[1])] == expected
        assert len(set(whole._frames.tolist())) == 42  # none is lost
        assert windows(tmp_path / "uneven", tmp_path, balance_tasks=balanced, split="validation").num_frames == 0


def test_first_actions_are_given_as_decided_and_are_no_target(data, tmp_path):
    policy = POLICY.replace("horizon = 3,", "horizon = 3, max_prefix = 2,")
    some, none, all_ = (windows(data, tmp_path, policy, prefix_dropout=share) for share in (0.5, 1.0, 0.0))
    lengths = np.concatenate([some._prefix_lengths(step) for step in range(100)])
    assert [0.4 < (lengths == 0).mean() < 0.6, abs((lengths == 1).mean() - (lengths == 2).mean()) < 0.1] == [True] * 2
    plain, given = none[3], all_[3]
    assert not plain.inputs.decided.any()
    assert given.inputs.decided[:, 0].all()
    assert torch.equal(given.inputs.prefix, given.actions[:, :2])
    assert torch.equal(given.actions, plain.actions)
    assert torch.equal(given.inputs.pixels, plain.inputs.pixels)  # everything else is drawn as before
    decided = torch.nn.functional.pad(given.inputs.decided, (0, 1))
    assert torch.equal(given.valid, plain.valid & ~decided)
    for rank in range(2):
        share = windows(data, tmp_path, policy, prefix_dropout=0.5, rank=rank, world_size=2)[3]
        assert torch.equal(share.inputs.decided, some[3].inputs.decided[rank::2])
    assert windows(data, tmp_path)[3].inputs.prefix.shape == (8, 0, 3)


def test_a_policy_learns_to_continue_decided_actions(data, tmp_path):
    """Also one that was trained without; it then takes a prefix, and packs, and the decided action tells it more."""
    run("finetune", write_config(tmp_path, steps=1), data, tmp_path / "plain")
    with pytest.raises(BitvlaError, match="was not trained"):
        TorchPolicy.load(tmp_path / "plain").act(first_observation(data), prefix=np.zeros((1, 3), np.float32))
    settings = {"steps": 60, "learning_rate": 3e-3, "max_prefix": 2, "prefix_dropout": 0.2}
    config = write_config(tmp_path, policy="", precision="ternary", **settings)
    run("finetune", config, data, tmp_path / "rtc", init=tmp_path / "plain")
    policy = TorchPolicy.load(tmp_path / "rtc")
    assert policy.max_prefix == 2
    free = policy.act(first_observation(data))
    changes = [policy.act(first_observation(data), prefix=free[:1] + shift)[1:] - free[1:] for shift in (-0.5, 0.5)]
    assert np.abs(changes).max() > 1e-3
    pack(tmp_path / "rtc", tmp_path / "policy.safetensors")
    with pytest.raises(BitvlaError, match="leaves nothing"):
        run("finetune", write_config(tmp_path, policy="", max_prefix=3), data, tmp_path / "x", init=tmp_path / "plain")
    with pytest.raises(BitvlaError, match="prefix_dropout 2"):
        run("finetune", write_config(tmp_path, prefix_dropout=2), data, tmp_path / "x")


def test_a_teacher_of_decided_actions_is_told_as_many_as_its_student(data, tmp_path):
    run("finetune", write_config(tmp_path, steps=1, max_prefix=2), data, tmp_path / "teacher")
    for most in (0, 1):
        config = write_config(tmp_path, "", precision="ternary", max_prefix=most)
        with pytest.raises(BitvlaError, match=rf"the student's action\.max_prefix is {most}, .*teacher has 2"):
            run("distill", config, data, tmp_path / "out", teacher=tmp_path / "teacher")


def first_observation(data: Path) -> dict[str, Any]:
    dataset = LeRobotDataset(data)
    return {
        "images": {"front": dataset.images("front")[0]},
        "state": dataset.state[0],
        "instruction": dataset.task_strings[0],
    }


@pytest.mark.parametrize("random_crop", [True, False])
def test_keypoints_follow_the_crop(tmp_path, random_crop):
    """A bright spot is drawn where the keypoint is; in the network's picture it must lie there still."""
    episode = random_episode(0, size=64)
    centres = np.linspace(20.5, 43.5, episode.length)
    rows, columns = np.mgrid[:64, :64] + 0.5
    spots = [200 * np.exp(-((columns - x) ** 2 + (rows - 32) ** 2) / 18) for x in centres]
    images = np.stack([np.repeat(spot[..., None], 3, axis=-1) for spot in spots]).astype(np.uint8)
    points = np.tile(np.array([0.5, 0.5, -1, -1], np.float32), (episode.length, 1))
    points[:, 0] = centres / 64
    vectors = {**episode.vectors, "observation.keypoints": points}
    writer = make_writer(tmp_path / "spots", size=64)
    writer.append([type(episode)({"front": images}, vectors, episode.task)])

    still = Augmentation(random_crop=random_crop, brightness=0, contrast=0, saturation=0)
    policy = POLICY.replace("image_size = 16", "image_size = 64").replace("max_positions = 64", "max_positions = 128")
    window = windows(tmp_path / "spots", tmp_path, policy, augmentation=still)[0]
    light = window.inputs.pixels.mean(dim=2)[:, 0].numpy() + 1  # (8, 64, 64), black is 0
    weights = light / light.sum(axis=(1, 2), keepdims=True)
    found = np.stack([(weights * columns).sum(axis=(1, 2)), (weights * rows).sum(axis=(1, 2))], axis=-1) / 64
    assert np.abs(found - window.keypoints[:, 0, 0].numpy()).max() < 0.01
    assert (window.keypoints[:, 0, 1] < 0).all()
    assert bool((np.ptp(found[:, 1]) > 0.01) == random_crop)  # a crop that moves, moves the spot


def test_the_keypoint_loss_knows_patch_and_place():
    # On a 4 x 4 grid: column 1, row 3; the other is out of view.
    targets = torch.tensor([[[[0.30, 0.80], [1.20, 0.50]]]])
    logits, places = torch.zeros(1, 2, 16), torch.zeros(1, 2, 16, 2)
    logits[0, 0, 3 * 4 + 1] = 50
    places[0, 0, 3 * 4 + 1] = torch.tensor([0.2, 0.2])
    assert stages._keypoint_loss(logits, places, targets) == pytest.approx(0, abs=1e-5)
    places[0, 0, 3 * 4 + 1, 0] += 0.5
    assert stages._keypoint_loss(logits, places, targets) == pytest.approx(0.5 / 2, abs=1e-5)
    logits[0, 1] = torch.randn(16)  # out of view: nothing to say
    assert stages._keypoint_loss(logits, places, targets) == pytest.approx(0.5 / 2, abs=1e-5)
    logits[0, 0] = 0
    assert stages._keypoint_loss(logits, places, targets) == pytest.approx((math.log(16) + 0.5) / 2, abs=1e-5)
