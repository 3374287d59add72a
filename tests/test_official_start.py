"""Published checkpoints as the start of training: read as they are, computed as published, trained, packed.

pytest tests/test_official_start.py
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import bitvla
from bitvla import BitvlaError
from bitvla.bundle import tensor_specs, to_float32
from bitvla.convert import conventions, official
from bitvla.convert.make_checkpoint import make_checkpoint
from bitvla.convert.pack import PARITY_BOUND, pack
from bitvla.convert.training import open_start
from bitvla.convert.weights import find_weights, pack_rows
from bitvla.data.lerobot import Episode, LeRobotDataset, LeRobotWriter
from bitvla.model.checkpoint import load_network
from bitvla.model.network import BitVLA, Output
from bitvla.model.policy import TorchPolicy
from bitvla.processing.prompt import Prompt
from bitvla.processing.vectors import normalize
from bitvla.quantization import ternarize
from bitvla.train.batches import Window, Windows
from bitvla.train.loop import run
from bitvla.train.plan import plan
from reference_network import ReferenceNetwork
from training import write_config

SHARD = "model-00001-of-00001.safetensors"
SIZES = """
[policy]
name = "arm"
vision = { hidden_size = 48, intermediate_size = 104, num_layers = 2, num_heads = 4 }
language = { hidden_size = 80, intermediate_size = 176, num_layers = 2, num_heads = 4, num_kv_heads = 2 }
action = { horizon = 4, head_hidden_size = 32, slots_per_step = 1 }
image = { rotate180 = true, resize = "lanczos" }
state_units = ["m", "m", "m", "rad", "rad", "rad", "m", "m"]
action_units = ["1", "1", "1", "1", "1", "1", "1"]
execute_horizon = 4
"""
POLICY = SIZES + f"prompt = {{ template = {json.dumps(conventions.TEMPLATE)} }}\n"
OTHER_SIZE = POLICY.replace("hidden_size = 80", "hidden_size = 88")
FULL_TOWER = POLICY.replace("num_layers = 2, num_heads = 4 }", "num_layers = 2, num_heads = 4, ternary = false }", 1)
ENLARGED = POLICY.replace("hidden_size = 80", "hidden_size = 80, vocab_size = 128268")
QUIET = {"auxiliary_weight": 0.0, "keypoint_weight": 0.0, "steps": 1, "batch_size": 2, "precision": "ternary"}


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder with reduced checkpoints, which no test changes."""
    folder = tmp_path_factory.mktemp("published")
    for kind in ("libero", "vision-language", "vision-language-bf16-tower", "pretrained"):
        make_checkpoint(folder / kind, kind=kind, reduced=True)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two random episodes of an arm like LIBERO's."""
    views, names = conventions.CAMERAS[2], (tuple(conventions.LIBERO_STATE), tuple(conventions.LIBERO_ACTION))
    writer = LeRobotWriter(
        tmp_path_factory.mktemp("data") / "arm",
        robot_type="test",
        fps=20,
        cameras=dict.fromkeys(views, (256, 256)),
        vectors={"observation.state": names[0], "action": names[1]},
    )
    episodes = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        action = rng.uniform(-0.5, 0.5, (5, 7)).astype(np.float32)
        action[:, -1] = [-1, -1, 1, 1, -1]  # open, closed, open
        episodes.append(
            Episode(
                images={name: rng.integers(0, 255, (5, 256, 256, 3), dtype=np.uint8) for name in views},
                vectors={"observation.state": rng.normal(size=(5, 8)).astype(np.float32), "action": action},
                task="pick up the black bowl and place it on the plate",
                extra={"recovery": False},
            )
        )
    writer.append(episodes)
    return writer.root


def first_window(data: Path, network: BitVLA, prompt: Prompt) -> Window:
    options: dict[str, Any] = {"batch_size": 2, "seed": 0, "augmentation": None}
    return Windows(LeRobotDataset(data), network.config, prompt, **options)[0]


@pytest.mark.parametrize("kind", ["libero", "vision-language", "vision-language-bf16-tower", "pretrained"])
def test_every_tensor_is_the_published_one(published, kind):
    start = open_start(published / kind)
    weights = find_weights(published / kind)
    specs = tensor_specs(start.config)
    assert set(weights.places) - set(specs) <= {"language_model.lm_head.weight"}
    if kind != "libero":
        return
    network, _ = load_network(start)
    for name, parameter in network.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), to_float32(weights.read(name)), err_msg=name)


def test_each_layer_computes_as_published(published, data):
    """Alone, most tokens of a layer agree to float32 precision: the others hold a code that fell the other way."""
    start = open_start(published / "libero")
    network, prompt = load_network(start)
    window = first_window(data, network, prompt)
    with torch.inference_mode():
        output: Output = network.eval()(window.inputs)
    reference = ReferenceNetwork(network.config, {n: p.detach().numpy() for n, p in network.named_parameters()})
    seen = [state[:2].flatten(0, 1).numpy() for state in output.vision_states]  # both views of the first window
    heard = [state[0].numpy() for state in output.decoder_states]
    for index in range(2):
        agree(reference.vision_layer(index, seen[index]), seen[index + 1])
        after = reference.decoder_layer(index, heard[index])
        agree(reference.final_norm(after) if index == 1 else after, heard[index + 1])
    answers = heard[-1][-2 - network.config.action.num_slots : -2]
    np.testing.assert_allclose(reference.head(answers), output.actions[0].numpy(), rtol=1e-4, atol=1e-5)


def agree(expected: np.ndarray, actual: np.ndarray) -> None:
    errors = np.linalg.norm(expected - actual, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(errors) < 1e-5
    assert errors.max() < 0.1


def test_a_fine_tune_acts_in_pytorch_as_it_does_packed(published, tmp_path):
    pack(published / "libero", tmp_path / "policy.safetensors", matrix_dtype="F32")
    policies = TorchPolicy.load(published / "libero"), bitvla.load(tmp_path / "policy.safetensors")
    rng = np.random.default_rng(0)
    observation = {
        "images": {name: rng.integers(0, 255, (256, 256, 3), dtype=np.uint8) for name in conventions.CAMERAS[2]},
        "state": rng.uniform(-0.1, 0.1, 8).astype(np.float32),
        "instruction": "open the drawer",
    }
    one, other = (normalize(p.act(observation), p.config.processing.action)[:, :-1] for p in policies)
    assert np.abs(one - other).mean() < PARITY_BOUND


def test_a_fine_tune_is_trained_further_and_packs(published, data, tmp_path):
    """With its own statistics and conventions: the network's gripper is 1 where the robot's is open, at -1."""
    start = open_start(published / "libero")
    network, prompt = load_network(start)
    actions = first_window(data, network, prompt).actions[..., -1]
    assert set(actions.unique().tolist()) == {0.0, 1.0}

    run("finetune", write_config(tmp_path, "", **QUIET), data, tmp_path / "out", init=published / "libero")
    after = open_start(tmp_path / "out")
    assert after.config == start.config
    provenance = after.provenance["parents"]["init"]
    assert provenance["digest"] == start.sha256
    assert provenance["provenance"]["checkpoint"]["kind"] == "libero"
    pack(tmp_path / "out", tmp_path / "policy.safetensors")
    assert bitvla.load(tmp_path / "policy.safetensors").config == start.config


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("vision-language", POLICY), ("vision-language-bf16-tower", FULL_TOWER), ("pretrained", ENLARGED)],
)
def test_a_policy_is_trained_from_a_base_model(published, data, tmp_path, kind, policy):
    """Tower, connector and decoder are kept; what acts is new, and statistics come from the data."""
    config = write_config(tmp_path, policy, **{**QUIET, "learning_rate": 1e-9})
    run("finetune", config, data, tmp_path / "out", init=published / kind)
    before, after = open_start(published / kind), open_start(tmp_path / "out")
    new = tensor_specs(after.config).keys() - tensor_specs(before.config).keys()
    assert {name.split(".")[0] for name in new} == {"proprio_projector", "action_head"}
    for name in tensor_specs(after.config).keys() - new:
        np.testing.assert_allclose(after.tensor(name), to_float32(before.tensor(name)), atol=1e-6, err_msg=name)
    low = LeRobotDataset(data).stats["action"]["q01"]
    assert after.config.processing.action.low == pytest.approx(low)
    if kind == "vision-language":
        pack(tmp_path / "out", tmp_path / "policy.safetensors")
        packed = bitvla.load(tmp_path / "policy.safetensors")
        seen = after.golden.observations[0]
        assert packed.act(seen).shape == (4, 7)


def test_reserved_tokens_become_those_of_a_policy(published, tmp_path):
    """As the official `convert_ckpt.py` has it: base models know of no state and no action."""
    shutil.copytree(published / "vision-language", tmp_path / "base", copy_function=os.link)
    content = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        if token["id"] == 128002 or token["id"] >= 128010:
            token["content"] = f"<|reserved_special_token_{token['id']}|>"
    (tmp_path / "base" / "tokenizer.json").unlink()
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_str(open_start(tmp_path / "base").tokenizer)
    assert {token: tokenizer.token_to_id(token) for token in conventions.TOKEN_IDS} == conventions.TOKEN_IDS
    assert tokenizer.get_vocab_size() == len(content["added_tokens"]) + 128000


def test_a_hub_id_is_a_start(published, data, tmp_path, monkeypatch):
    known = {"hongyuw/base": published / "vision-language"}
    monkeypatch.setattr(official, "local", lambda source: known.get(source, Path(source)))
    config = write_config(tmp_path, POLICY, **QUIET, lora_rank=2)
    run("finetune", config, data, tmp_path / "out", init=Path("hongyuw/base"))
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["adapters"]["base"] == "hongyuw/base"
    assert open_start(tmp_path / "out").tensor("vision_tower.vision_model.embeddings.patch_embedding.weight").any()


def test_a_plan_needs_no_weights(tmp_path):
    policy = POLICY.replace('name = "arm"', 'name = "arm"\ncameras = ["full"]')
    result = plan("finetune", write_config(tmp_path, policy), init=Path("hongyuw/bitvla-bitsiglipL-224px-bf16"))
    assert result["parameters"]["trained"] > 10_000_000


@pytest.mark.parametrize(
    ("kind", "policy", "message"),
    [
        ("vision-language", "", r"knows no action head; describe the policy in a \[policy\]"),
        ("vision-language", OTHER_SIZE, "policy.language.hidden_size is 88, .* has 80"),
        ("vision-language", FULL_TOWER, "policy.vision.ternary is False, .* has True"),
        ("pretrained", POLICY, "policy.language.vocab_size is 128264, .* has 128268"),
    ],
)
def test_what_does_not_fit_is_named(published, data, tmp_path, kind, policy, message):
    with pytest.raises(BitvlaError, match=message):
        run("finetune", write_config(tmp_path, policy, **QUIET), data, tmp_path / "out", init=published / kind)


def test_models_that_cannot_be_a_start_are_refused(published, data, tmp_path):
    make_checkpoint(tmp_path / "language", kind="language", reduced=True)
    with pytest.raises(BitvlaError, match="is a language model without a vision tower"):
        open_start(tmp_path / "language")
    with pytest.raises(BitvlaError, match="is a base model, which does not act"):
        TorchPolicy.load(published / "vision-language")
    with pytest.raises(BitvlaError, match="is a published checkpoint; one is needed here that training wrote"):
        run("distill", write_config(tmp_path, ""), data, tmp_path / "out", teacher=published / "libero")
    packed = shutil.copytree(published / "vision-language", tmp_path / "packed", copy_function=os.link)
    (packed / "model.safetensors.index.json").unlink()
    tensors, name = load_file(packed / SHARD), "language_model.model.layers.0.self_attn.q_proj.weight"
    codes, scale = ternarize(tensors[name].float().numpy())
    tensors |= {name: torch.from_numpy(pack_rows(codes)), f"{name}_scale": torch.tensor([scale])}
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(BitvlaError, match=r"is packed .*; training needs the latent weights"):
        open_start(packed)
