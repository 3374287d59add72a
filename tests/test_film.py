"""FiLM: the instruction reaches the vision tower, the same in training and packed, and begins as nothing.

pytest tests/test_film.py
"""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import bitvla
from bitvla.bundle import tensor_specs
from bitvla.config import PolicyConfig
from bitvla.convert.pack import pack
from bitvla.convert.training import open_start
from bitvla.errors import BitvlaError
from bitvla.model.checkpoint import load_network
from bitvla.model.network import BitVLA
from bitvla.model.policy import TorchPolicy
from bitvla.runtime.inspect import inspect
from bitvla.runtime.verify import verify
from bitvla.runtime.work import work
from bitvla.train.loop import run
from bitvla.train.plan import plan
from checkpoints import observation, pack_random, random_weights, tiny_config, token_config, write_random_checkpoint
from datasets import write_dataset
from test_model import IMAGE, PROPRIO, random_batch
from test_model import tiny_config as model_config
from training import MODEL, POLICY, TOKENS, write_config

SEEING = POLICY.replace('name = "test"', 'name = "test"\ncameras = ["front", "wrist"]')


def with_film(config: PolicyConfig, film: bool = True) -> PolicyConfig:
    return msgspec.structs.replace(config, vision=msgspec.structs.replace(config.vision, film=film))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "random")


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    run("finetune", write_config(folder, steps=1), data, folder / "plain")
    return folder / "plain"


@pytest.fixture(scope="module")
def filmed(data, plain, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("filmed")
    run("finetune", write_config(folder, "", film=True, learning_rate=0.05), data, folder / "filmed", init=plain)
    return folder / "filmed"


def moved(checkpoint: Path) -> set[bool]:
    """Which FiLM tensors of a checkpoint are not zero any more: all, none or some."""
    tensors = load_file(checkpoint / "model.safetensors")
    return {bool(tensor.any()) for name, tensor in tensors.items() if name.startswith("film.")}


# Training.


def test_a_policy_that_gets_film_begins_as_it_was(plain):
    """To the last bit."""
    start = open_start(plain)
    before, (network, prompt) = TorchPolicy.load(plain), load_network(start, with_film(start.config))
    assert len(network.film) == start.config.vision.num_layers
    after = TorchPolicy(network, prompt)
    for seed in range(3):
        seen = observation(start.config, seed)
        assert np.array_equal(before.act(seen), after.act(seen))


def test_it_learns_and_stays_where_it_is(data, filmed, tmp_path):
    """All of it has gradients; the next stages keep it, student and teacher alike."""
    assert moved(filmed) == {True}
    student = write_config(tmp_path, "", precision="ternary", steps=2)
    run("distill", student, data, tmp_path / "student", teacher=filmed)
    assert open_start(tmp_path / "student").config.vision.film
    assert moved(tmp_path / "student") == {True}
    run("localize", write_config(tmp_path, POLICY, film=True, steps=2), data, tmp_path / "tower")
    assert moved(tmp_path / "tower") == {False}  # it is told nothing


def test_adapters_leave_it_whole_and_pack(data, plain, tmp_path):
    config = write_config(tmp_path, "", film=True, precision="ternary", lora_rank=2, steps=4, learning_rate=0.05)
    run("finetune", config, data, tmp_path / "adapted", init=plain)
    assert moved(tmp_path / "adapted") == {True}
    names = {name for name in load_file(tmp_path / "adapted" / "model.safetensors") if name.startswith("film.")}
    assert names == {f"film.{i}.{part}.{value}" for i in "01" for part in ("scale", "shift")
                     for value in ("weight", "bias")}  # fmt: skip
    assert pack(tmp_path / "adapted", tmp_path / "policy.safetensors")["compared_with_pytorch"] == 2
    assert bitvla.load(tmp_path / "policy.safetensors").config.vision.film


def test_it_hears_the_text_and_nothing_else(tmp_path):
    """Neither padding, slots and state nor, where actions are tokens, those that have been written already."""
    torch.manual_seed(0)
    network = BitVLA(with_film(model_config(precision="full")), IMAGE, PROPRIO).eval()
    for parameter in network.film.parameters():
        torch.nn.init.normal_(parameter)
    batch = random_batch()
    ids = batch.token_ids.clone()
    ids[1, 7] = 12  # another word, of the second window alone
    with torch.no_grad():
        seen, padded = network(batch).vision_states[-1], network(random_batch(padding=5)).vision_states[-1]
        silent = network(batch._replace(state=batch.state + 1)).vision_states[-1]
        other = network(batch._replace(token_ids=ids)).vision_states[-1]
        network.language_model.model.embed_tokens.weight[1] += 1  # of slots
        slots = network(batch).vision_states[-1]
    torch.testing.assert_close(padded, seen)
    assert torch.equal(silent, seen)
    assert torch.equal(slots, seen)
    assert torch.equal(other[0], seen[0])
    assert (other[1] - seen[1]).abs().max() > 1e-3

    config = with_film(token_config())
    start = open_start(write_random_checkpoint(tmp_path, config))
    network, prompt = load_network(start)
    prompts = torch.from_numpy(np.stack([prompt.ids("open the drawer")] * 2))
    written = torch.tensor([[295, 299], [291, 293]])
    pixels = torch.randn(1, 4, 3, 28, 28)
    with torch.no_grad():
        states = [
            network(random_batch()._replace(pixels=pixels, token_ids=ids, padding=ids < 0)).vision_states[-1]
            for ids in (prompts, torch.cat([prompts, written], dim=1))
        ]
    torch.testing.assert_close(*states)


def test_each_window_is_told_its_own(tmp_path):
    """Also where windows have different numbers of views, as in a mixture of robots."""
    network, prompt = load_network(open_start(write_random_checkpoint(tmp_path, with_film(token_config()))))
    two = prompt.ids("open the drawer")
    one = np.delete(prompt.ids("push the button"), np.flatnonzero(two == prompt.image_id)[:16])
    pixels = torch.randn(1, 3, 3, 28, 28)

    def states(rows: list[np.ndarray], pixels: torch.Tensor) -> torch.Tensor:
        ids = torch.full((len(rows), max(map(len, rows))), prompt.pad_id)
        for row, words in zip(ids, rows, strict=True):
            row[-len(words) :] = torch.from_numpy(words)
        batch = random_batch()._replace(pixels=pixels, token_ids=ids, padding=ids == prompt.pad_id)
        with torch.no_grad():
            return network(batch).vision_states[-1]

    together = states([one, two], pixels)
    torch.testing.assert_close(together, torch.cat([states([one], pixels[:, :1]), states([two], pixels[:, 1:])]))
    assert (together - states([two, one], pixels)).abs().max() > 1e-3


# Packed.


@pytest.mark.parametrize("config", [tiny_config(), token_config()])
def test_zeros_change_no_answer(tmp_path, config):
    """The file of a policy with FiLM that has learnt nothing answers as the one without, bit for bit."""
    weights = random_weights(config)
    chunks = []
    for film in (False, True):
        checkpoint = write_random_checkpoint(tmp_path / str(film), with_film(config, film))
        specs = tensor_specs(with_film(config, film))
        tensors = {name: weights.get(name, np.zeros(spec.shape, np.float32)) for name, spec in specs.items()}
        save_file(tensors, checkpoint / "model.safetensors")
        pack(checkpoint, tmp_path / "policy.safetensors")
        policy = bitvla.load(tmp_path / "policy.safetensors")
        chunks.append([policy.act(observation(config, seed)).tobytes() for seed in range(3)])
    assert chunks[0] == chunks[1]


def test_images_look_different_to_another_instruction(tmp_path):
    """And the same to the same one, whatever was asked in between."""
    seen = observation(tiny_config())
    for film in (False, True):
        policy = bitvla.load(pack_random(tmp_path, with_film(tiny_config(), film)))
        features = []
        policy.network.record = lambda name, value: features.append(value) if name == "connector" else None  # noqa: B023
        for text in ("open the drawer", "push the button", "open the drawer"):
            policy.act(seen | {"instruction": text})
        assert np.array_equal(features[0], features[2])
        assert np.array_equal(features[0], features[1]) != film


def test_written_actions_are_those_of_pytorch(tmp_path):
    checkpoint = write_random_checkpoint(tmp_path / "random", with_film(token_config()))
    pack(checkpoint, tmp_path / "policy.safetensors", matrix_dtype="F32")
    trained, packed = TorchPolicy.load(checkpoint), bitvla.load(tmp_path / "policy.safetensors")
    for seed in range(4):
        seen = observation(token_config(), seed)
        np.testing.assert_allclose(packed.act(seen), trained.act(seen), atol=1e-5)


def test_the_file_is_checked_and_counted(tmp_path):
    path = pack_random(tmp_path, with_film(tiny_config()), matrix_dtype="I8")
    assert verify(path)["passed"]
    plain, film = inspect(pack_random(tmp_path / "plain", tiny_config())), inspect(path)
    vision, language = tiny_config().vision, tiny_config().language
    size = 2 * vision.num_layers * vision.hidden_size * (language.hidden_size + 1)
    assert film["parts"]["vision"]["parameters"] - plain["parts"]["vision"]["parameters"] == size
    assert film["parts"]["vision"]["ternary"] == plain["parts"]["vision"]["ternary"]
    one, other = (work(config, 50)["vision"] for config in (tiny_config(), with_film(tiny_config())))
    assert other.full_precision - one.full_precision == 2 * vision.num_patches * vision.num_layers * vision.hidden_size
    assert other.ternary == one.ternary


def test_a_plan_counts_it(tmp_path):
    one, other = (plan("finetune", write_config(tmp_path, SEEING, film=film))["parameters"] for film in (False, True))
    assert other["ternary"] == one["ternary"]
    assert other["full precision"] - one["full precision"] == 2 * 2 * 16 * (32 + 1)


# What cannot be.


def test_what_does_not_fit_is_named(data, filmed, tmp_path):
    with pytest.raises(BitvlaError, match="only the tower of a policy knows what is said"):
        run("align", write_config(tmp_path, MODEL.replace("ternary = false", "film = true")), conversations(tmp_path),
            tmp_path / "out")  # fmt: skip
    run("pretrain", write_config(tmp_path, TOKENS, film=True, steps=1), data, tmp_path / "base")
    with pytest.raises(BitvlaError, match=r"policy\.vision\.film is False, .*base has True"):
        run("finetune", write_config(tmp_path, POLICY), data, tmp_path / "out", init=tmp_path / "base")
    copy = shutil.copytree(filmed, tmp_path / "copy")
    described = (filmed / "config.json").read_text()
    (copy / "config.json").write_text(described.replace('"film": true', '"film": false'))
    with pytest.raises(BitvlaError, match=r"film\.0\.scale\.bias"):
        pack(copy, tmp_path / "policy.safetensors")
    (copy / "config.json").write_text(described)
    tensors = load_file(copy / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if "film.1" not in name}, copy / "model.safetensors")
    with pytest.raises(BitvlaError, match=r"film\.1\.scale"):
        pack(copy, tmp_path / "policy.safetensors")


def conversations(folder: Path) -> Path:
    path = folder / "captions.json"
    path.write_text(
        '[{"id": "0", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}]'
    )
    return path
