"""Low-rank adapters: what is trained and kept, and that what is packed is what was trained.

pytest tests/test_lora.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitvla.bundle import read, tensor_specs
from bitvla.convert.pack import pack
from bitvla.convert.training import open_start
from bitvla.errors import BitvlaError
from bitvla.model.checkpoint import load_network
from bitvla.model.lora import add_adapters, trained_state
from bitvla.model.policy import TorchPolicy
from bitvla.quantization import ternarize, unpack
from bitvla.train.loop import run
from bitvla.train.plan import plan
from datasets import write_dataset
from training import POLICY, losses_of, write_config

LAYER = "language_model.model.layers.1.mlp.up_proj"
ADAPTED = {"precision": "ternary", "lora_rank": 4, "steps": 40, "learning_rate": 3e-3, "ema_decay": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "random")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    """A base, and a run with adapters of it."""
    folder = tmp_path_factory.mktemp("runs")
    run("finetune", write_config(folder, precision="ternary", steps=1), data, folder / "base")
    run("finetune", write_config(folder, "", **ADAPTED), data, folder / "lora", init=folder / "base")
    return folder


def effective(runs: Path, name: str) -> np.ndarray:
    """The weight that was trained, from what is in the files."""
    base, own = (load_file(runs / run_ / "model.safetensors") for run_ in ("base", "lora"))
    b, a = own[f"{name}.lora_B"].double(), own[f"{name}.lora_A"].double()
    return (base[f"{name}.weight"].double() + 16 / 4 * b @ a).numpy()


def test_adapters_and_what_acts_is_all_that_is_kept(runs):
    losses = losses_of(runs / "lora")
    assert losses[40] < 0.9 * losses[1]
    names = set(load_file(runs / "lora" / "model.safetensors"))
    whole = {name for name in names if "lora_" not in name}
    assert {name.split(".")[0] for name in whole} == {"proprio_projector", "action_head"}
    layers = {name.removesuffix(".lora_A") for name in names if name.endswith(".lora_A")}
    specs = tensor_specs(open_start(runs / "lora").config)
    assert {f"{layer}.weight" for layer in layers} == {
        name for name, spec in specs.items() if spec.kind in ("ternary", "matrix") and name not in whole
    }
    assert "multi_modal_projector.linear_1" in layers
    state = torch.load(runs / "lora" / "training_state.pt", weights_only=True)
    assert len(state["network"]) == len(state["averaged"]) == len(names)
    moments = sum(len(optimizer["state"]) for optimizer in state["optimizers"])
    assert moments <= len(names) + 4  # those of the auxiliary heads


def test_what_is_packed_is_what_was_trained(runs, tmp_path):
    """Also to the last code: the sum is what is quantised, and the golden answers are those of its network."""
    pack(runs / "lora", tmp_path / "policy.safetensors")
    bundle, start = read(tmp_path / "policy.safetensors"), open_start(runs / "lora")
    for layer in (LAYER, "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"):
        weight = effective(runs, layer)
        np.testing.assert_allclose(start.tensor(f"{layer}.weight"), weight, rtol=1e-5, atol=1e-6)
        codes, _ = ternarize(weight.astype(np.float32))
        packed = unpack(bundle.tensors[f"{layer}.weight"], *weight.shape)
        assert np.mean(packed != codes) < 1e-3
        before, _ = ternarize(load_file(runs / "base" / "model.safetensors")[f"{layer}.weight"].numpy())
        assert np.mean(packed != before) > 0.01
    golden = start.golden
    policy = TorchPolicy.load(runs / "lora")
    for observation, chunk in zip(golden.observations, golden.chunks, strict=True):
        assert np.array_equal(policy.act(observation), chunk)
    adapters = bundle.document.provenance["adapters"]
    assert adapters == {"sha256": open_start(runs / "base").sha256, "rank": 4, "alpha": 16.0}


def test_the_base_does_not_move_and_mixed_precision_does_not_blur_the_sum(runs):
    network, _ = load_network(open_start(runs / "base"))
    before = network.language_model.model.layers[1].mlp.up_proj.weight.detach().clone()
    add_adapters(network, 4, 16.0)
    layer = network.language_model.model.layers[1].mlp.up_proj
    assert torch.equal(layer.weight, before)  # an adapter begins as nothing
    with torch.no_grad():
        layer.parametrizations.weight[0].lora_B.normal_()
    exact = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, exact)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert not frozen & trained_state(network).keys()
    assert len(frozen) + len(trained_state(network)) == len(list(network.named_parameters()))


def test_a_run_goes_on_from_adapters_with_new_ones_or_whole(runs, data, tmp_path):
    for changes in ({"lora_rank": 2}, {}):
        config = write_config(tmp_path, "", precision="ternary", steps=1, learning_rate=1e-9, **changes)
        run("finetune", config, data, tmp_path / "next", init=runs / "lora")
        after, expected = open_start(tmp_path / "next"), open_start(runs / "lora")
        for name in tensor_specs(after.config):
            np.testing.assert_allclose(after.tensor(name), expected.tensor(name), atol=1e-6, err_msg=name)
        shutil.rmtree(tmp_path / "next")


def test_a_base_that_is_gone_or_changed_is_named(runs, tmp_path):
    shutil.copytree(runs / "lora", tmp_path / "lora")

    def say(base: Path) -> None:
        path = tmp_path / "lora" / "provenance.json"
        provenance = json.loads(path.read_text())
        provenance["adapters"]["base"] = str(base)
        path.write_text(json.dumps(provenance))

    say(tmp_path / "gone")
    with pytest.raises(BitvlaError, match=r"gone.* is missing.* Put it back, or say in provenance.json where it is"):
        pack(tmp_path / "lora", tmp_path / "policy.safetensors")
    shutil.copytree(runs / "base", tmp_path / "moved")
    say(tmp_path / "moved")
    pack(tmp_path / "lora", tmp_path / "policy.safetensors")
    tensors = load_file(tmp_path / "moved" / "model.safetensors")
    tensors[f"{LAYER}.weight"] += 1
    save_file(tensors, tmp_path / "moved" / "model.safetensors")
    with pytest.raises(BitvlaError, match="adapters of another checkpoint than the one now at"):
        pack(tmp_path / "lora", tmp_path / "policy.safetensors")
    say(runs / "base")
    tensors = load_file(tmp_path / "lora" / "model.safetensors")
    del tensors[f"{LAYER}.lora_A"]
    save_file(tensors, tmp_path / "lora" / "model.safetensors")
    with pytest.raises(BitvlaError, match=f"lacks the tensor {LAYER}.lora_A"):
        pack(tmp_path / "lora", tmp_path / "policy.safetensors")


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("finetune", {"lora_rank": 4}, "adapters need a checkpoint to adapt; give one with --init"),
        ("localize", {"lora_rank": 4}, "'localize' trains a new tower"),
        ("finetune", {"lora_rank": -1}, "lora_rank is -1"),
        ("finetune", {"lora_rank": 4, "lora_alpha": 0.0}, "lora_alpha 0.0"),
    ],
)
def test_what_is_wrong_is_named(data, tmp_path, stage, changes, message):
    with pytest.raises(BitvlaError, match=message):
        run(stage, write_config(tmp_path, **changes), data, tmp_path / "out")


def test_a_plan_tells_what_adapters_save(tmp_path):
    policy = POLICY.replace('name = "test"', 'name = "test"\ncameras = ["front"]')
    whole, adapted = (plan("finetune", write_config(tmp_path, policy, lora_rank=rank)) for rank in (0, 2))
    one, other = whole["parameters"], adapted["parameters"]
    assert one["adapters"] == 0 < other["adapters"] < other["trained"] < one["trained"] / 2
    assert [one[key] for key in ("ternary", "full precision")] == [other[key] for key in ("ternary", "full precision")]
    rows = {row[""]: row["whole"] * 1e9 for row in adapted["memory a device, GB"]}
    sizes = {"gradients": 4, "average of weights": 4, "optimiser state": 8}
    assert all(rows[name] == pytest.approx(size * other["trained"]) for name, size in sizes.items())
    assert rows["weights"] == pytest.approx(4 * (other["ternary"] + other["full precision"] + other["adapters"]))
