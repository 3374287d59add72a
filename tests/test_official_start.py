"""Published checkpoints as the start of training: read as they are, computed as published, trained, packed.

pytest tests/test_official_start.py
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import SiglipVisionModel

import bitvla
from bitvla import BitvlaError
from bitvla.bundle import EMBEDDING, LANGUAGE_HEAD, tensor_specs, to_float32
from bitvla.cli import main
from bitvla.config import ActionConfig, LanguageConfig, VisionConfig
from bitvla.convert import conventions, official
from bitvla.convert.make_checkpoint import make_checkpoint
from bitvla.convert.pack import PARITY_BOUND, pack
from bitvla.convert.training import open_start
from bitvla.convert.weights import find_weights, pack_rows
from bitvla.data.lerobot import Episode, LeRobotDataset, LeRobotWriter
from bitvla.model.checkpoint import load_language_network, load_network
from bitvla.model.network import BitVLA, Output
from bitvla.model.policy import TorchPolicy
from bitvla.processing.prompt import Chat, Prompt
from bitvla.processing.vectors import normalize
from bitvla.quantization import ternarize
from bitvla.runtime.language import LanguageModel
from bitvla.train.batches import Window, Windows
from bitvla.train.config import load
from bitvla.train.loop import run
from bitvla.train.plan import plan
from bitvla.train.starts import check_backbone
from datasets import write_conversations
from reference_network import ReferenceNetwork
from training import write_config

CONFIGS = Path(__file__).parent.parent / "configs"
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
SEEING = f"""
[model]
name = "seeing"
tied = false
vision = {{ hidden_size = 48, intermediate_size = 104, num_layers = 2, num_heads = 4, ternary = false }}
image = {{ resize = "bicubic", crop_area = 1.0 }}

[model.language]
vocab_size = 128256
hidden_size = 80
intermediate_size = 176
num_layers = 2
num_heads = 4
num_kv_heads = 2
bidirectional = false

[model.chat]
begin = {json.dumps(conventions.CHAT.begin)}
turn = "Human: {{prompt}}<|eot_id|>Assistant: "
turn_with_images = "Human: {{images}}\\n{{prompt}}<|eot_id|>Assistant: "
stop_tokens = ["<|eot_id|>", "<|end_of_text|>"]
image_token = "<|image_pad|>"
"""
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


@pytest.mark.parametrize(("stage", "option"), [("instruct", "init"), ("distill", "teacher")])
def test_a_vision_language_model_is_trained_from_a_published_one(published, tmp_path, stage, option):
    """Every weight is kept, and what was trained packs, and is a base model for a policy."""
    base = published / "vision-language-bf16-tower"
    conversations = write_conversations(tmp_path / "colours", 2)
    config = write_config(tmp_path, "", **{**QUIET, "batch_size": 1, "learning_rate": 1e-9})
    run(stage, config, conversations, tmp_path / "out", **{option: base})
    before, after = open_start(base), open_start(tmp_path / "out")
    assert after.config.vision.ternary == (stage == "distill")
    assert after.config.chat == before.config.chat
    assert after.provenance["parents"][option]["digest"] == before.sha256
    for name in tensor_specs(before.config):
        np.testing.assert_allclose(after.tensor(name), to_float32(before.tensor(name)), atol=1e-6, err_msg=name)
    assert set(conventions.TOKEN_IDS) <= Tokenizer.from_str(after.tokenizer).get_vocab().keys()
    pack(tmp_path / "out", tmp_path / "model.safetensors")
    model = LanguageModel.load(tmp_path / "model.safetensors")
    assert len(model.see([np.zeros((20, 20, 3), np.uint8)])) == 256


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
    config = open_start(tmp_path / "base").config
    assert Chat(config, tokenizer).image_id == conventions.TOKEN_IDS["<|image_pad|>"]


def test_actions_get_tokens_beside_those_of_the_base_model(published):
    """A policy of more tokens keeps the known ones; the new ones begin as their mean."""
    base = open_start(published / "vision-language")
    config = official.open_official(published / "pretrained", control_hz=5).config
    assert (base.config.language.vocab_size, config.language.vocab_size) == (128264, 128268)
    check_backbone(config, base)
    acting = msgspec.structs.replace(config, action=ActionConfig())
    with pytest.raises(BitvlaError, match=r"policy\.language\.vocab_size is 128268, .* has 128264"):
        check_backbone(acting, base)
    network, _ = load_network(base, config)
    known = {name: torch.from_numpy(to_float32(base.tensor(name))) for name in (EMBEDDING, LANGUAGE_HEAD)}
    rows = network.get_parameter(EMBEDDING)
    assert torch.equal(rows[:128264], known[EMBEDDING])
    assert torch.equal(rows[128264:], known[EMBEDDING].mean(dim=0).expand(4, -1))
    assert torch.equal(network.get_parameter(LANGUAGE_HEAD)[:252], known[LANGUAGE_HEAD][128012:])


def test_words_of_the_prompt_are_no_actions(published):
    policy = official.open_official(published / "pretrained", control_hz=5)
    more = msgspec.structs.replace(policy.config.action, bins=258)
    with pytest.raises(
        BitvlaError, match=r"<\|image_pad\|> \(id 128010\) is one of the last 258 tokens, which are actions"
    ):
        Prompt(msgspec.structs.replace(policy.config, action=more), Tokenizer.from_str(policy.tokenizer))


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
    with pytest.raises(BitvlaError, match=r"the teacher .* is ternary; distillation needs full precision"):
        run("distill", write_config(tmp_path, ""), data, tmp_path / "out", teacher=published / "libero")
    with pytest.raises(BitvlaError, match=r"tower of the teacher .* is ternary"):
        run("distill", write_config(tmp_path, ""), data, tmp_path / "out", teacher=published / "vision-language")
    packed = shutil.copytree(published / "vision-language", tmp_path / "packed", copy_function=os.link)
    (packed / "model.safetensors.index.json").unlink()
    tensors, name = load_file(packed / SHARD), "language_model.model.layers.0.self_attn.q_proj.weight"
    codes, scale = ternarize(tensors[name].float().numpy())
    tensors |= {name: torch.from_numpy(pack_rows(codes)), f"{name}_scale": torch.tensor([scale])}
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(BitvlaError, match=r"is packed .*; training needs the latent weights"):
        open_start(packed)


# A vision-language model that begins as two published checkpoints.


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> tuple[Path, Path]:
    """A language model and a SigLIP, reduced, which no test changes."""
    folder = tmp_path_factory.mktemp("parents")
    for kind in ("language-bf16", "siglip"):
        make_checkpoint(folder / kind, kind=kind, reduced=True)
    return folder / "language-bf16", folder / "siglip"


def test_a_tower_sees_as_siglip_does(parents):
    """What leaves SigLIP's last layer but one, computed by transformers from the checkpoint as it is."""
    network, _ = load_language_network(open_start(*parents))
    siglip = SiglipVisionModel.from_pretrained(parents[1])
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        states = network.vision_tower(pixels)
        expected = siglip(pixels, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) - 1 == 3
    torch.testing.assert_close(states[-1], expected[-2], rtol=1e-4, atol=1e-5)
    assert (expected[-1] - expected[-2]).abs().max() > 0.1


def test_the_recipe_from_its_beginning(parents, tmp_path, capsys):
    """Tower, decoder and embedding are the published ones, also as the language head; the connector is the seed's."""
    language, siglip = parents
    start = open_start(language, siglip)
    data = str(write_conversations(tmp_path / "colours", 2))
    settings = {**QUIET, "batch_size": 1, "seed": 11}

    def train(stage: str, text: str, *options: str) -> Path:
        (tmp_path / stage).mkdir()
        config, out = write_config(tmp_path / stage, text, **settings), tmp_path / stage / "out"
        assert main(["train", stage, "--config", str(config), "--data", data, "--out", str(out), *options]) == 0
        return out

    out = train("align", SEEING, "--init", str(language), "--tower", str(siglip))
    aligned = open_start(out)
    assert aligned.config == start.config
    published = {"language_model." + name: place for name, place in find_weights(language).places.items()}
    published |= {"vision_tower." + name: place for name, place in find_weights(siglip).places.items()}
    published[LANGUAGE_HEAD] = published[EMBEDDING]
    torch.manual_seed(11)
    random, _ = load_language_network(start)
    for name in tensor_specs(aligned.config):
        if name.startswith("multi_modal_projector."):
            made = random.get_parameter(name).detach().numpy()
            moved = np.abs(aligned.tensor(name) - made).max()
            assert 0 < moved < 3 * 1e-3, name
        else:
            with safe_open(published[name].path, "pt") as file:
                expected = file.get_tensor(published[name].key).float().numpy()
            np.testing.assert_array_equal(aligned.tensor(name), expected, err_msg=name)
    named = aligned.provenance["parents"]["init"]["provenance"]["parents"]
    assert named["language"]["digest"] == official.open_official(language).sha256
    assert [*named["tower"]["provenance"]["checkpoint"]["files"]] == [SHARD]

    config = write_config(tmp_path, SEEING, **settings)
    for start_anew in (lambda: open_start(out, siglip), lambda: plan("align", config, init=out, tower=siglip)):
        with pytest.raises(BitvlaError, match="has a vision tower already; leave out --tower"):
            start_anew()

    instructed = train("instruct", "", "--init", str(out))
    distilled = train("distill", "", "--teacher", str(instructed))
    pack(distilled, tmp_path / "model.safetensors")
    capsys.readouterr()
    image = str(next((tmp_path / "colours" / "images").iterdir()))
    asked = ["--image", image, "--prompt", "What is it?", "--max-tokens", "2"]
    assert main(["chat", str(tmp_path / "model.safetensors"), *asked]) == 0
    assert LanguageModel.load(tmp_path / "model.safetensors").config.vision.ternary


def test_the_full_size_file_describes_what_the_published_parents_become():
    model = load(CONFIGS / "bitvla-3b-align.toml").model
    assert model.vision == VisionConfig(ternary=False)
    assert model.language == LanguageConfig(vocab_size=conventions.LANGUAGE_VOCABULARY, bidirectional=False)
    assert (model.image, model.chat) == (conventions.SIGLIP, conventions.base_chat("<|image_pad|>"))
    assert not model.tied


def changed(siglip: Path, folder: Path, edit: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    """A copy whose config.json and tensors `edit` has changed."""
    folder.mkdir()
    config, tensors = json.loads((siglip / "config.json").read_text()), load_file(siglip / SHARD)
    edit(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


KEY = "vision_model.encoder.layers.2.mlp.fc1.weight"
WRONG_TOWERS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "a tensor is missing": (lambda config, tensors: tensors.pop(KEY), rf"lacks the tensor vision_tower.{KEY}"),
    "one layer less": (
        lambda config, tensors: config["vision_config"].update(num_hidden_layers=2),
        r"has the unknown tensor vision_tower.vision_model.encoder.layers.2",
    ),
    "another width": (
        lambda config, tensors: config["vision_config"].update(intermediate_size=112),
        r"encoder.layers.0.mlp.fc1.weight is F32 \[104, 48\], its config.json asks for BF16 \[112, 48\]",
    ),
    "another activation": (
        lambda config, tensors: config["vision_config"].update(hidden_act="gelu"),
        "vision_config.hidden_act is 'gelu'; only 'gelu_pytorch_tanh' can be computed",
    ),
    "what it does not say is SigLIP's": (
        lambda config, tensors: config["vision_config"].pop("patch_size"),
        r"patch_embedding.weight is F32 \[48, 3, 14, 14\], its config.json asks for BF16 \[48, 3, 16, 16\]",
    ),
    "no number": (
        lambda config, tensors: tensors.update({KEY.replace("2", "1"): tensors[KEY] * torch.nan}),
        "has values that are not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TOWERS)
def test_a_tower_that_does_not_fit_is_refused(parents, tmp_path, name):
    edit, message = WRONG_TOWERS[name]
    with pytest.raises(BitvlaError, match=message):
        load_language_network(open_start(parents[0], changed(parents[1], tmp_path / "siglip", edit)))


def test_parents_that_are_none_are_refused(published, parents, tmp_path):
    language, siglip = parents
    make_checkpoint(tmp_path / "packed", kind="language", reduced=True)
    with pytest.raises(BitvlaError, match=r"is packed .*; training needs the latent weights, as in its -bf16 variant"):
        open_start(tmp_path / "packed", siglip)
    with pytest.raises(BitvlaError, match=r"model without a vision tower; align it with one \(--tower google/siglip"):
        open_start(language)
    with pytest.raises(BitvlaError, match="has a vision tower already; leave out --tower"):
        open_start(published / "vision-language", siglip)
    with pytest.raises(BitvlaError, match="model_type is 'bitnet'; only 'siglip' can be computed"):
        open_start(language, language)
    with pytest.raises(BitvlaError, match=r"config\.json is missing: --tower takes a SigLIP checkpoint"):
        open_start(language, tmp_path)
    with pytest.raises(BitvlaError, match="is a checkpoint of another model"):
        open_start(siglip)


def test_a_tower_belongs_to_one_stage_and_to_its_model(parents, tmp_path):
    language, siglip = parents
    data = write_conversations(tmp_path / "colours", 2)

    def check(message: str, stage: str = "align", text: str = SEEING, **options: Any) -> None:
        config = write_config(tmp_path, text, **QUIET)
        with pytest.raises(BitvlaError, match=message):
            run(stage, config, data, tmp_path / "out", **{"init": language, "tower": siglip, **options})

    check("--tower is for stage 'align', with a language model as --init", stage="instruct")
    check("--tower is for stage 'align', with a language model as --init", init=None)
    check("model.language.hidden_size is 88, .* has 80", text=SEEING.replace("hidden_size = 80", "hidden_size = 88"))
    check("model.vision.num_layers is 3, .* has 2", text=SEEING.replace("num_layers = 2", "num_layers = 3", 1))
    check("model.chat.turn is .*Q: ", text=SEEING.replace("Human: {prompt}", "Q: {prompt}"))
    check("model.tied is True, .* has False", text=SEEING.replace("tied = false", ""))


def test_a_plan_of_two_parents_needs_neither(tmp_path):
    config = write_config(tmp_path, SEEING, **QUIET, max_tokens=512)
    parents = {"init": Path("microsoft/bitnet-b1.58-2B-4T-bf16"), "tower": Path("google/siglip-so400m-patch14-224")}
    result = plan("align", config, **parents)
    assert result["parameters"]["trained"] == 48 * 80 + 80 + 80 * 80 + 80
    with pytest.raises(BitvlaError, match="--tower is for stage 'align'"):
        plan("instruct", config, **parents)
