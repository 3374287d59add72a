"""Robot pre-training: a mixture of datasets, actions as tokens, and the policy that is finetuned from it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bitvla
from bitvla.config import ImageProcessing, LanguageConfig, LanguageModelConfig, VisionConfig
from bitvla.convert import conventions
from bitvla.convert.pack import pack
from bitvla.data.lerobot import Episode, LeRobotDataset, LeRobotWriter
from bitvla.errors import BitvlaError
from bitvla.model.policy import TorchPolicy
from bitvla.processing.prompt import Prompt, train_tokenizer
from bitvla.processing.vectors import normalize, token_values, value_tokens
from bitvla.train import batches
from bitvla.train import plan as planning
from bitvla.train.config import Augmentation, for_dataset, load, policy_config
from bitvla.train.loop import run
from bitvla.train.starts import check_backbone
from datasets import write_dataset
from training import BLIND, POLICY, TOKENS, losses_of, write_config


@pytest.fixture(scope="module")
def arm(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "arm")


@pytest.fixture(scope="module")
def cart(tmp_path_factory) -> Path:
    """Another robot: two cameras of other sizes, another rate, two values an action."""
    root = tmp_path_factory.mktemp("data") / "cart"
    writer = LeRobotWriter(
        root,
        robot_type="cart",
        fps=5,
        cameras={"left": (24, 32), "right": (20, 20)},
        vectors={"observation.state": ("x",), "action": ("speed", "turn")},
    )
    writer.append([cart_episode(i) for i in range(12)])
    return root


def cart_episode(index: int, length: int = 9) -> Episode:
    rng = np.random.default_rng(index)
    sizes = {"left": (24, 32), "right": (20, 20)}
    images = {name: rng.integers(0, 255, (length, *size, 3), dtype=np.uint8) for name, size in sizes.items()}
    vectors = {"observation.state": rng.normal(size=(length, 1)), "action": rng.uniform(-3, 3, (length, 2))}
    return Episode(images, {key: value.astype(np.float32) for key, value in vectors.items()}, "drive to the door")


def mixture(roots: list[Path], folder: Path, weights: dict[str, float], **shard: int) -> batches.Mixture:
    datasets = [LeRobotDataset(root) for root in roots]
    policy = (
        TOKENS if roots[0].name == "arm" else TOKENS.replace("dim = 3", "dim = 2").replace('"m", "m", "m"', '"1", "1"')
    )
    settings = load(write_config(folder, policy))
    config = policy_config(settings.policy, datasets[0], "full")
    template = config.processing.prompt
    specials = [template.pad_token, "<|slot|>", template.image_token, template.proprio_token, template.stop_token]
    sentences = sorted({text for dataset in datasets for text in dataset.task_strings})
    tokenizer = train_tokenizer(sentences, config.language.vocab_size - config.action.bins, specials)
    share = {"batch_size": 8, "seed": 3, **shard}
    parts = []
    for dataset in datasets:
        own = for_dataset(config, dataset)
        parts.append(batches.Windows(dataset, own, Prompt(own, tokenizer), augmentation=Augmentation(), **share))
    return batches.Mixture(parts, weights, config, **share)


def test_values_survive_as_tokens():
    values = np.linspace(-1, 1, 1001, dtype=np.float32)
    tokens = value_tokens(values, 256)
    assert tokens.min() == 0
    assert tokens.max() == 255
    assert np.abs(token_values(tokens, 256) - values).max() <= 1 / 255 + 1e-6
    assert np.array_equal(value_tokens(token_values(np.arange(1, 256), 256), 256), np.arange(1, 256))
    assert value_tokens(np.array([-7, 7], np.float32), 256).tolist() == [255, 0]  # high to low, clipped


def test_a_batch_mixes_robots(arm, cart, tmp_path):
    window = mixture([arm, cart], tmp_path, {"arm": 1.0, "cart": 1.0})[0]
    sizes = (window.targets != batches.UNKNOWN).sum(dim=1)
    assert set(sizes.tolist()) == {2, 3}
    views = torch.where(sizes == 2, 2, 1)
    patches = 4
    image_id = 2  # the third special token
    assert torch.equal((window.inputs.token_ids == image_id).sum(dim=1), views * patches)
    assert window.inputs.pixels.shape == (1, views.sum(), 3, 16, 16)
    # Every action token but the last is an input, left of what it is followed by.
    first_id = 300 - 16
    for ids, target, size in zip(window.inputs.token_ids, window.targets, sizes, strict=True):
        assert torch.equal(ids[len(ids) - size + 1 :] - first_id, target[-size:-1])
        assert (ids[: len(ids) - size + 1] < first_id).all()


def test_targets_are_the_actions_of_the_frames(cart, tmp_path):
    windows = mixture([cart], tmp_path, {})
    dataset = LeRobotDataset(cart)
    config = windows._parts[0]._config
    expected = normalize(dataset.action, config.processing.action)
    tokens = np.stack([windows._parts[0].example(0, place, np.zeros((2, 5)))[2] for place in np.linspace(0, 0.999, 40)])
    frames = windows._parts[0]._frames[(np.linspace(0, 0.999, 40) * windows.num_frames).astype(int)]
    assert np.abs(token_values(tokens, 16) - expected[frames]).max() <= 1 / 15 + 1e-6


def test_datasets_are_seen_by_their_weights(arm, cart, tmp_path):
    frames = {"arm": mixture([arm], tmp_path, {}).num_frames, "cart": mixture([cart], tmp_path, {}).num_frames}
    for weights in ({}, {"arm": 1.0, "cart": 3.0}):
        windows = mixture([arm, cart], tmp_path, weights)
        names = [part.name for step in range(200) for part, *_ in windows._chosen(step)]
        share = names.count("cart") / len(names)
        wanted = weights or frames
        assert share == pytest.approx(wanted["cart"] / sum(wanted.values()), abs=0.05)
    episodes = {windows._parts[0].origin(0, place) for step in range(200) for _, _, place, _ in windows._chosen(step)}
    assert len(episodes) > 25  # all of the robot's


def test_processes_share_one_batch(arm, cart, tmp_path):
    whole = mixture([arm, cart], tmp_path, {})[5]
    for rank in range(2):
        share = mixture([arm, cart], tmp_path, {}, rank=rank, world_size=2)[5]
        assert torch.equal(share.targets, whole.targets[rank::2])
        assert torch.equal(share.inputs.token_ids, whole.inputs.token_ids[rank::2])


def test_pretrained_actions_are_written_alike_in_pytorch_and_packed(arm, cart, tmp_path):
    config = write_config(tmp_path, TOKENS, precision="ternary", steps=60, learning_rate=3e-3)
    run("pretrain", config, [arm, cart], tmp_path / "base")
    losses = list(losses_of(tmp_path / "base").values())
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:5])
    pack(tmp_path / "base", tmp_path / "policy.safetensors")
    policy, packed = TorchPolicy.load(tmp_path / "base"), bitvla.load(tmp_path / "policy.safetensors")
    dataset = LeRobotDataset(arm)
    for frame in (0, 40, 90):
        observation = {"images": {"front": dataset.images("front")[frame]}, "instruction": "push the puck"}
        np.testing.assert_allclose(packed.act(observation), policy.act(observation), atol=1e-5)


def test_a_policy_is_finetuned_from_a_pretrained_one(arm, cart, tmp_path):
    # The first dataset is what the policy is for.
    with pytest.raises(BitvlaError, match=r"cart has vectors of 2, policy\.action\.dim is 3"):
        run("pretrain", write_config(tmp_path, TOKENS), [cart, arm], tmp_path / "x")
    run("pretrain", write_config(tmp_path, TOKENS, steps=2), [arm, cart], tmp_path / "base")
    config = write_config(tmp_path, steps=1, learning_rate=1e-9)
    run("finetune", config, arm, tmp_path / "policy", init=tmp_path / "base")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "policy"))
    shared = before.keys() & after.keys()
    assert {name.split(".")[0] for name in after.keys() - shared} == {"proprio_projector", "action_head"}
    for name in shared:
        torch.testing.assert_close(after[name], before[name])
    assert TorchPolicy.load(tmp_path / "policy").config.action.horizon == 3

    with pytest.raises(BitvlaError, match=r"knows no action head; describe the policy in a \[policy\]"):
        run("finetune", write_config(tmp_path, ""), arm, tmp_path / "x", init=tmp_path / "base")
    wider = POLICY.replace("hidden_size = 32", "hidden_size = 48")
    with pytest.raises(BitvlaError, match=r"policy.language.hidden_size is 48, .*base has 32"):
        run("finetune", write_config(tmp_path, wider), arm, tmp_path / "x", init=tmp_path / "base")
    with pytest.raises(BitvlaError, match="stage 'pretrain' and has no action head"):
        run("distill", write_config(tmp_path, ""), arm, tmp_path / "x", teacher=tmp_path / "base")
    with pytest.raises(BitvlaError, match="regresses its actions; stage 'pretrain' goes on from"):
        run("pretrain", write_config(tmp_path, TOKENS), arm, tmp_path / "x", init=tmp_path / "policy")


def test_the_paper_pretrains_with_2048_windows_over_the_published_base_model():
    config = load(Path(__file__).parent.parent / "configs" / "bitvla-3b-pretrain.toml")
    assert config.batch_size * config.gradient_accumulation == 2048
    assert (config.steps, config.learning_rate, config.vision_learning_rate) == (200_000, 3e-4, 1e-4)
    policy = planning._described(config.policy, config, None)
    assert policy.action.bins == 256
    assert policy.processing.prompt.template == conventions.PRETRAINED_TEMPLATE
    assert policy.processing.image == conventions.SIGLIP
    base = LanguageModelConfig(name="base", vision=VisionConfig(), image=ImageProcessing(), chat=conventions.CHAT,
                               language=LanguageConfig(bidirectional=False), tied=False)  # fmt: skip
    check_backbone(policy, SimpleNamespace(folder="base", config=base))


@pytest.mark.parametrize(
    ("stage", "policy", "changes", "message"),
    [
        ("pretrain", TOKENS, {"mixture": {"arm": 1, "kart": 2}}, "weight for 'kart'.*; did you mean 'cart'"),
        ("pretrain", TOKENS, {"mixture": {"arm": 1}}, "no weight for 'cart'"),
        ("pretrain", TOKENS, {"mixture": {"arm": 1, "cart": 0}}, "weight of 'cart' is 0"),
        ("pretrain", POLICY, BLIND, "policy.action needs bins"),
        ("finetune", POLICY, {}, "trains on one dataset, not on arm, cart"),
    ],
)
def test_what_is_wrong_is_named(arm, cart, tmp_path, stage, policy, changes, message):
    with pytest.raises(BitvlaError, match=message):
        run(stage, write_config(tmp_path, policy, **changes), [arm, cart], tmp_path / "out")


def test_tokens_are_for_pretraining_and_towers_are_no_policies(arm, tmp_path):
    with pytest.raises(BitvlaError, match=r"leave out policy\.action\.bins"):
        run("finetune", write_config(tmp_path, TOKENS), arm, tmp_path / "out")
    with pytest.raises(BitvlaError, match="two datasets of a mixture have the same name"):
        run("pretrain", write_config(tmp_path, TOKENS), [arm, arm], tmp_path / "out")
    run("localize", write_config(tmp_path, steps=1), arm, tmp_path / "tower")
    with pytest.raises(BitvlaError, match=r"is a vision tower .* finetune --init"):
        pack(tmp_path / "tower", tmp_path / "policy.safetensors")
    with pytest.raises(BitvlaError, match="stage 'localize' and has no action head"):
        run("distill", write_config(tmp_path, ""), arm, tmp_path / "out", teacher=tmp_path / "tower")
    with pytest.raises(BitvlaError, match="stage 'localize' and has no action head"):
        planning.plan("distill", write_config(tmp_path, ""), teacher=tmp_path / "tower")
