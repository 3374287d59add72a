"""What `bitvla train --plan` says: the network's own figures, and the paper's at full size."""

import json
from pathlib import Path

import pytest
import torch

from bitvla import cli
from bitvla.config import load_toml
from bitvla.errors import BitvlaError
from bitvla.model.network import BitVLA
from bitvla.runtime.work import work
from bitvla.train import plan as planning
from bitvla.train import stages
from bitvla.train.config import TrainConfig
from bitvla.train.plan import plan
from datasets import write_dataset
from training import BLIND, POLICY, TOKENS, write_config

CONFIGS = Path(__file__).parent.parent / "configs"
SEEING = POLICY.replace('name = "test"', 'name = "test"\ncameras = ["front", "wrist"]')


def memory(result: dict, column: str = "whole") -> dict[str, float]:
    return {row[""]: row[column] for row in result["memory a device, GB"]}


def tiny_policy(folder: Path, precision: str = "ternary"):
    config = load_toml(TrainConfig, write_config(folder, SEEING, precision=precision))
    return config, planning._described(config.policy, config, None)


def test_the_published_model_at_full_size():
    """Parameters add up to those of the published checkpoint without its language head."""
    result = plan("finetune", CONFIGS / "bitvla-3b-finetune.toml", devices=8, tflops=100)
    parameters, batch = result["parameters"], result["effective batch"]
    assert parameters["ternary"] == 2_479_890_432
    assert parameters["ternary"] + parameters["full precision"] == 3_213_543_591 - 328_355_840 == parameters["trained"]
    assert batch["windows a step"] == 64
    assert 631 <= batch["tokens a window, about"] <= 680

    config = load_toml(TrainConfig, CONFIGS / "bitvla-3b-finetune.toml")
    policy = planning._described(config.policy, config, None)
    call = 2 * sum(part.total for part in work(policy, batch["tokens a window, about"]).values())
    # Forwards, twice that backwards, and the layers once more; a call needs less of its last layer.
    assert result["arithmetic"]["a step, TFLOP"] == pytest.approx(64 * 4 * call / 1e12, rel=0.05)
    seconds = result["arithmetic"]["a step, TFLOP"] / (8 * 100)
    assert result["arithmetic"]["the run, hours"] == pytest.approx(seconds * 10_000 / 3600)

    whole, shards = memory(result), memory(result, "in shards")
    for name, bytes_each in (("weights", 4), ("gradients", 4), ("optimiser state", 8)):
        assert whole[name] == pytest.approx(bytes_each * parameters["trained"] / 1e9)
        assert shards[name] == pytest.approx(whole[name] / 8)
    assert whole["activations, checkpointed"] < whole["activations"] / 4
    constant = sum(shards[name] for name in ("weights", "average of weights", "gradients", "optimiser state"))
    expected = constant + shards["weights gathered at a time"] + shards["activations, checkpointed"]
    assert shards["in all, checkpointed"] == pytest.approx(expected)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_memory_is_what_a_step_on_real_tensors_takes(tmp_path, checkpoints):
    config, policy = tiny_policy(tmp_path)
    length = planning._sequence_length(policy)
    planned = planning._pass("finetune", config, policy, 4, length, checkpoints=checkpoints)

    network = BitVLA(policy, 0, 2, attention="sdpa")
    if checkpoints:
        planning.checkpoint_activations(network)
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(planning._drop_gradient)
    window = planning._window(policy, 4, length, keypoints=0, flow_samples=0)
    images = policy.vision.num_patches * len(policy.processing.cameras)
    token_ids = torch.full((4, length), 5)
    token_ids[:, 1 : 1 + images] = 0
    inputs = window.inputs._replace(token_ids=token_ids, padding=token_ids < 0)
    objective = stages.finetune(config, stages.AuxiliaryHead(policy, 0, 0))
    with planning.Count() as counted:
        objective(network, window._replace(inputs=inputs))["loss"].backward()
    assert planned.activations == pytest.approx(counted.peak, rel=0.02)


def test_ternary_parameters_are_those_of_ternary_layers(tmp_path):
    for precision, expected in (("ternary", True), ("full", False)):
        _, policy = tiny_policy(tmp_path, precision)
        parameters = plan("finetune", write_config(tmp_path, SEEING, precision=precision))["parameters"]
        network = BitVLA(policy, 0, 2)
        assert parameters["ternary"] + parameters["full precision"] == sum(p.numel() for p in network.parameters())
        assert bool(parameters["ternary"]) == expected


def test_every_stage_has_a_plan(tmp_path):
    localized = plan("localize", write_config(tmp_path, SEEING))
    finetuned = plan("finetune", write_config(tmp_path, SEEING))
    distilled = plan("distill", write_config(tmp_path, SEEING))
    data = write_dataset(tmp_path / "random", episodes=2)
    pretrained = plan("pretrain", write_config(tmp_path, TOKENS), data=data)
    assert localized["parameters"]["trained"] < finetuned["parameters"]["trained"]
    assert memory(distilled)["teacher"] == memory(distilled)["weights"]
    assert memory(distilled)["activations"] > memory(finetuned)["activations"]
    assert "1 views" in pretrained["stage"]
    accumulated = plan("finetune", write_config(tmp_path, SEEING, gradient_accumulation=3), devices=2)
    assert accumulated["effective batch"]["as"] == "3 x 2 devices x 4"
    per_step = finetuned["arithmetic"]["a step, TFLOP"]
    assert accumulated["arithmetic"]["a step, TFLOP"] == pytest.approx(3 * per_step)
    assert memory(accumulated)["activations"] < 0.7 * memory(finetuned)["activations"]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(BitvlaError, match=r"give --data, or policy\.cameras"):
        plan("finetune", write_config(tmp_path, POLICY))
    with pytest.raises(BitvlaError, match="batch_size 8 cannot be shared by 3 devices"):
        plan("finetune", write_config(tmp_path, SEEING), devices=3)
    with pytest.raises(BitvlaError, match=r"\[policy\]"):
        plan("finetune", write_config(tmp_path, ""))


def test_what_is_published_must_be_described(tmp_path):
    config = write_config(tmp_path, "", **BLIND)
    for stage, parents, section in (
        ("instruct", {"init": Path("org/model")}, "model"),
        ("finetune", {"init": Path("org/policy")}, "policy"),
        ("distill", {"teacher": Path("org/policy")}, "policy"),
    ):
        with pytest.raises(BitvlaError, match=rf"nothing of .*, as org/\w+; .* in a \[{section}\] section"):
            plan(stage, config, **parents)


def test_a_checkpoint_that_is_not_there_is_no_published_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    config = write_config(tmp_path, SEEING)
    for stage, parents in (
        ("finetune", {"init": Path("runs/typo")}),
        ("distill", {"teacher": Path("runs/typo")}),
        ("align", {"init": Path("org/model"), "tower": tmp_path / "runs/typo"}),
    ):
        with pytest.raises(BitvlaError, match=r"runs/typo does not exist; .* leave it out"):
            plan(stage, config, **parents)


def test_data_that_training_would_refuse_are_refused(tmp_path):
    config, described = write_config(tmp_path, SEEING), {"random": {"control_hz": 20}}
    with pytest.raises(BitvlaError, match="'finetune' trains on one dataset, not on one, two"):
        plan("finetune", config, data=[Path("one"), Path("two")])
    with pytest.raises(BitvlaError, match="describes the data 'random', which is no --data; did you mean 'randon'"):
        plan("finetune", write_config(tmp_path, SEEING, data=described), data=Path("randon"))


def test_the_command_prints_it(tmp_path, capsys):
    command = ["train", "finetune", "--config", str(write_config(tmp_path, SEEING)), "--plan"]
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["effective batch"]["windows a step"] == 8
    assert cli.main(command) == 0
    assert "memory a device" in capsys.readouterr().out
    assert cli.main(command[:-1]) == 1
    assert "--plan does without" in capsys.readouterr().err
    assert cli.main([*command[:-1], "--data", "d", "--out", "o", "--devices", "2"]) == 1
    assert "--devices and --tflops are of --plan" in capsys.readouterr().err
