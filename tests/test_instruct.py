"""A vision-language model: what it learns from, which part learns when, and that the packed one answers the same.

pytest tests/test_instruct.py
"""

from __future__ import annotations

import json
import re
from functools import partial, reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import bitvla
from bitvla.cli import main
from bitvla.config import check
from bitvla.convert.pack import pack
from bitvla.convert.training import open_start, read_config
from bitvla.data.llava import LlavaDataset
from bitvla.errors import BitvlaError
from bitvla.evaluate import vqa
from bitvla.model.checkpoint import load_language_network, load_network
from bitvla.model.network import VisionTower
from bitvla.processing.images import crop_resized, to_pixels
from bitvla.processing.prompt import ASK_FOR_A_LETTER
from bitvla.runtime.language import Conversation, LanguageModel
from bitvla.runtime.network import Cache
from bitvla.train import loop, stages
from bitvla.train.batches import UNKNOWN
from bitvla.train.config import TrainConfig, load
from bitvla.train.conversations import Conversations
from bitvla.train.loop import run
from bitvla.train.plan import plan
from bitvla.train.starts import check_backbone, start_model
from datasets import COLOURS, QUESTION, write_conversations, write_dataset
from training import BLIND, FLOW, MODEL, POLICY, TOKENS, losses_of, write_config

CONFIGS = Path(__file__).parent.parent / "configs"


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def instructed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose decoder is ternary, and its tower not."""
    folder = tmp_path_factory.mktemp("instructed")
    parts = {"learning_parts": ["tower", "connector", "decoder"]}
    config = write_config(folder, MODEL, precision="ternary", steps=80, learning_rate=1e-2, **parts)
    run("instruct", config, data, folder / "model")
    return folder / "model"


def conversations(data: Path, checkpoint: Path, **options: Any) -> Conversations:
    network, chat = load_language_network(open_start(checkpoint))
    settings = {"batch_size": 4, "max_tokens": 256, "seed": 3, "augmentation": None} | options
    assert network.config.vision
    assert network.config.image
    return Conversations(LlavaDataset(data), network.config.vision, network.config.image, chat, **settings)


def test_only_the_answers_are_learnt(data: Path, instructed: Path) -> None:
    _, chat = load_language_network(open_start(instructed))
    window = conversations(data, instructed)[0]
    inputs, targets = window.inputs, window.targets
    assert inputs.pixels.shape == (1, 4, 3, 16, 16)
    for tokens, padded, wanted in zip(inputs.token_ids, inputs.padding, targets, strict=True):
        text = chat.tokenizer.decode(wanted[wanted != UNKNOWN].tolist(), skip_special_tokens=False)
        assert text[0] in "ABCD"
        colour = list(COLOURS)["ABCD".index(text[0])]
        assert text[1:] == f"<|end_of_text|>A {colour} picture.<|end_of_text|>"
        assert torch.equal(wanted[:-1][wanted[:-1] != UNKNOWN], tokens[1:][wanted[:-1] != UNKNOWN])
        assert (tokens == chat.image_id).sum() == 4
        assert not padded[padded.long().sum() :].any()  # on the left
        assert (wanted[padded] == UNKNOWN).all()


def test_training_says_what_the_runtime_says(data: Path, instructed: Path, tmp_path: Path) -> None:
    """The same tokens, and from the packed weights the same logits: a tower in full precision, a ternary decoder."""
    pack(instructed, tmp_path / "model.safetensors")
    model = LanguageModel.load(tmp_path / "model.safetensors")
    image = np.asarray(Image.open(data.parent / "images" / "1.png"))
    conversation = Conversation(model)
    list(conversation.say(QUESTION + ASK_FOR_A_LETTER, images=[image]))
    list(conversation.say("What do you see?", max_tokens=3))
    ids = conversation.ids[:-1]

    network, chat = load_language_network(open_start(instructed))
    window = conversations(data, instructed, batch_size=1)
    of_this = next(w for w in map(window.__getitem__, range(40)) if (w.targets == chat.answer("B")[0]).any())
    prompt = next(i for i, token in enumerate(ids) if token == chat.encode("<|eot_id|>")[0]) + 1
    assert of_this.inputs.token_ids[0, :prompt].tolist() == ids[:prompt]

    assert network.config.image
    view = to_pixels(crop_resized(image, network.config.image, 16), network.config.image)
    inputs = of_this.inputs._replace(
        pixels=torch.from_numpy(view.transpose(2, 0, 1))[None, None],
        token_ids=torch.tensor([ids]),
        padding=torch.zeros(1, len(ids), dtype=torch.bool),
    )
    with torch.no_grad():
        expected = network(inputs).actions[0, -1].numpy()
    actual = model.logits(ids, Cache(model.config.language, len(ids)), model.see([image]))
    assert np.abs(actual - expected).max() < 0.05 * np.abs(expected).max()


def test_the_packed_model_answers(data: Path, instructed: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    losses = losses_of(instructed)
    assert losses[80] < 0.3 * losses[1]
    pack(instructed, tmp_path / "model.safetensors")
    rows = [
        {"question": QUESTION, "answer": "ABCD"[n % 4], "category": "colour", "l2_category": "", "image": f"{n}.png"}
        for n in range(8)
    ]
    questions = data.parent / "images" / "test.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    result = vqa.evaluate(tmp_path / "model.safetensors", [questions])
    assert result.categories["colour"].rate >= 0.75
    image = str(data.parent / "images" / "2.png")
    assert main(["chat", str(tmp_path / "model.safetensors"), "--image", image, "--prompt", rows[0]["question"]]) == 0
    assert capsys.readouterr().out.strip()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}


def test_each_stage_teaches_its_part(data: Path, instructed: Path, tmp_path: Path) -> None:
    before = weights(instructed)
    for stage, parts in (
        ("align", {"multi_modal_projector"}),
        ("instruct", {"multi_modal_projector", "language_model"}),
    ):
        run(
            stage,
            write_config(tmp_path, "", precision="ternary", steps=2, **BLIND),
            data,
            tmp_path / stage,
            init=instructed,
        )
        assert moved(before, weights(tmp_path / stage)) == parts
        assert not read_config(tmp_path / stage).vision.ternary
    for gamma in (0.1, 0.0):
        config = write_config(tmp_path, "", precision="ternary", steps=2, alignment_weight=gamma, **BLIND)
        run("distill", config, data, out := tmp_path / f"distill-{gamma}", teacher=instructed)
        assert moved(before, weights(out)) == {"vision_tower"}
        logged = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        assert ("vision" in logged) == bool(gamma)
        assert not gamma or logged["loss"] == pytest.approx(logged["answers"] + gamma * logged["vision"])
        assert read_config(out).vision.ternary
        pack(out, out / "model.packed")
        assert LanguageModel.load(out / "model.packed").config.vision.ternary
    with pytest.raises(BitvlaError, match=r"tower of the teacher .* is ternary"):
        run("distill", config, data, tmp_path / "again", teacher=tmp_path / "distill-0.1")


def test_alignment_is_nothing_where_the_tower_is_the_teacher(data: Path, instructed: Path) -> None:
    network, _ = load_language_network(open_start(instructed))
    window = conversations(data, instructed)[0]
    losses = stages.distill_tower(TrainConfig(steps=1, batch_size=4, learning_rate=1, precision="full"),
                                  network.vision_tower, network.image_id)(network, window)  # fmt: skip
    assert losses["vision"] == 0
    assert losses["loss"] == losses["answers"] > 0


def test_windows_weigh_alike_however_many_images_they_have(instructed: Path, tmp_path: Path) -> None:
    """So that a step is the same in one pass or several, on any number of processes."""
    write_conversations(tmp_path, 6)
    entries = []
    for images in ((0, 1, 2), (3,), (), (4, 5)):
        said = [{"from": "human", "value": "<image>" * len(images) + "What?"}, {"from": "gpt", "value": "A"}]
        entries.append({"image": [f"images/{number}.png" for number in images], "conversations": said})
    (tmp_path / "several.json").write_text(json.dumps(entries))
    network, _ = load_language_network(open_start(instructed))
    settings = TrainConfig(steps=1, batch_size=1, learning_rate=1, precision="full")
    objective = stages.distill_tower(settings, VisionTower(network.config.vision), network.image_id)
    together = objective(network, conversations(tmp_path / "several.json", instructed, batch_size=4)[0])
    one = conversations(tmp_path / "several.json", instructed, batch_size=1)
    apart = [objective(network, one[number]) for number in range(4)]
    assert sorted(losses["vision"].item() == 0 for losses in apart) == [False, False, False, True]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.stack([losses[name] for losses in apart]).mean())


def test_conversations_without_images(instructed: Path, tmp_path: Path) -> None:
    said = [{"from": "human", "value": "Which letter?"}, {"from": "gpt", "value": "B"}]
    (tmp_path / "text.json").write_text(json.dumps([{"conversations": said}] * 4))
    config = write_config(tmp_path, "", precision="ternary", steps=2, **BLIND)
    for stage, parents in (("instruct", {"init": instructed}), ("distill", {"teacher": instructed})):
        run(stage, config, tmp_path / "text.json", tmp_path / stage, **parents)
        assert all(np.isfinite(loss) for loss in losses_of(tmp_path / stage).values())


@pytest.mark.parametrize("stage", ["align", "instruct", "distill"])
def test_a_run_that_ended_goes_on_to_the_same_weights(
    data: Path, instructed: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, MODEL, precision="ternary", weight_decay=0.1, weight_decay_steps=3)
    parents = {"teacher": instructed} if stage == "distill" else {"init": instructed}
    run(stage, config, data, tmp_path / "whole", **parents)
    step = loop.Trainer._step

    def dies_at_six(self: loop.Trainer, window: Any) -> Any:
        if self.step == 6:
            raise MemoryError
        return step(self, window)

    monkeypatch.setattr(loop.Trainer, "_step", dies_at_six)
    with pytest.raises(MemoryError):
        run(stage, config, data, tmp_path / "cut", **parents)
    monkeypatch.undo()
    run(stage, config, data, tmp_path / "cut", **parents)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_what_would_stay_random_is_named(data: Path, instructed: Path, tmp_path: Path) -> None:
    demonstrations = write_dataset(tmp_path / "random", episodes=3)
    run("localize", write_config(tmp_path, POLICY, steps=1), demonstrations, tmp_path / "tower")
    config = write_config(tmp_path, MODEL, precision="ternary", steps=1)
    with pytest.raises(BitvlaError, match=r"in stage 'instruct' vision_tower\.\S+ does not learn, and no --init gives"):
        run("instruct", config, data, tmp_path / "out")
    with pytest.raises(
        BitvlaError, match=r"'align' language_model\.\S+ does not learn, and .*tower has never learnt it"
    ):
        run("align", config, data, tmp_path / "out", init=tmp_path / "tower")
    with pytest.raises(BitvlaError, match="stage 'instruct' follows no teacher"):
        run("instruct", config, data, tmp_path / "out", init=instructed, teacher=instructed)


def test_the_tower_of_a_policy_is_a_beginning(data: Path, tmp_path: Path) -> None:
    demonstrations = write_dataset(tmp_path / "random", episodes=3)
    run("localize", write_config(tmp_path, POLICY, steps=1), demonstrations, tmp_path / "tower")
    parts = {"learning_parts": ["connector", "decoder"]}
    config = write_config(tmp_path, MODEL, precision="ternary", steps=1, **parts)
    run("align", config, data, tmp_path / "aligned", init=tmp_path / "tower")
    tower, aligned = weights(tmp_path / "tower"), weights(tmp_path / "aligned")
    assert all(torch.equal(tower[name], value) for name, value in aligned.items() if name.startswith("vision_tower."))
    larger = write_config(tmp_path, MODEL.replace("num_layers = 2", "num_layers = 3", 1), precision="ternary")
    with pytest.raises(BitvlaError, match=r"model\.vision\.num_layers is 3, .*tower has 2"):
        run("align", larger, data, tmp_path / "larger", init=tmp_path / "tower")
    with pytest.raises(BitvlaError, match="is a base model, which does not act"):
        load_network(open_start(tmp_path / "aligned"))
    with pytest.raises(BitvlaError, match=r"no \[model\] section"):
        run("align", write_config(tmp_path, "", **BLIND), data, tmp_path / "none")


@pytest.mark.parametrize("stage", ["align", "instruct", "distill"])
def test_a_section_that_contradicts_its_checkpoint_is_refused_planned_or_not(
    data: Path, instructed: Path, tmp_path: Path, stage: str
) -> None:
    parents = {"teacher": instructed} if stage == "distill" else {"init": instructed}
    blind = re.sub(r"image = .*|\[model\.vision\][^[]*", "", MODEL)
    for section, told in (
        (MODEL.replace("num_layers = 2", "num_layers = 3", 1), r"vision\.num_layers is 3, .*model has 2"),
        (blind, r"vision is None, .*model has VisionConfig\(.*\)"),
    ):
        config = write_config(tmp_path, section, precision="ternary")
        for train in (partial(run, data=data, out=tmp_path / "out"), plan):
            with pytest.raises(BitvlaError, match=rf"^model\.{told}; make them equal$"):
                train(stage, config, **parents)


@pytest.mark.parametrize("stage", ["align", "instruct", "distill"])
def test_adapters_of_a_model_are_refused_planned_or_not(
    data: Path, instructed: Path, tmp_path: Path, stage: str
) -> None:
    config = write_config(tmp_path, MODEL, precision="ternary", lora_rank=2)
    parents = {"teacher": instructed} if stage == "distill" else {"init": instructed}
    refused = r"adapters are of policies; leave out lora_rank, and say in learning_parts what learns"
    with pytest.raises(BitvlaError, match=refused):
        run(stage, config, data, tmp_path / "out", **parents)
    for given in (parents, {}):
        with pytest.raises(BitvlaError, match=refused):
            plan(stage, config, **given)


def test_an_impossible_model_is_named(tmp_path: Path) -> None:
    model = load(write_config(tmp_path, MODEL)).model
    assert model
    for section, changes, message in (
        ("language", {"num_layers": 0}, "language.num_layers is 0"),
        ("image", {"jpeg_quality": 500}, "image.jpeg_quality 500 is not within 1 and 100"),
        ("image", {"mean": float("nan")}, "image.mean nan and std 0.5 must be finite"),
    ):
        part = msgspec.structs.replace(getattr(model, section), **changes)
        with pytest.raises(BitvlaError, match=f"^language model configuration: {message}"):
            check(msgspec.structs.replace(model, **{section: part}))


@pytest.mark.parametrize("stage", ["align", "instruct", "distill"])
def test_what_is_of_policies_is_refused_planned_or_not(
    data: Path, instructed: Path, tmp_path: Path, stage: str
) -> None:
    parents = {"teacher": instructed} if stage == "distill" else {"init": instructed}
    sections = {"policy": POLICY, "data": '[data."colours.json"]\nrotate180 = true'}
    keys = {"film": True, "max_prefix": 2, "flow": FLOW, "balance_tasks": True, "mixture": {"colours": 1.0}}
    keys |= {"auxiliary_weight": 0.1, "keypoint_weight": 0.1}
    for name in [*sections, *keys]:
        changes = {**BLIND, name: keys[name]} if name in keys else BLIND
        config = write_config(tmp_path, sections.get(name, ""), precision="ternary", **changes)
        for train in (partial(run, data=data, out=tmp_path / "out"), plan):
            with pytest.raises(
                BitvlaError, match=f"'{stage}' trains on conversations .* no use for {name}; leave it out"
            ):
                train(stage, config, **parents)


@pytest.mark.parametrize(
    ("stage", "section", "changes", "message"),
    [
        ("finetune", MODEL, {}, "'finetune' trains on demonstrations here and has no use for model; leave it out"),
        ("finetune", POLICY, {"mixture": {"random": 1.0}}, "'finetune' trains on one dataset; leave out mixture"),
        ("pretrain", TOKENS, {"auxiliary_weight": 0.1}, "has no use for auxiliary_weight; leave it out"),
        ("pretrain", TOKENS, {"keypoint_weight": 0.1}, "has no use for keypoint_weight; leave it out"),
        ("localize", POLICY, {"keypoint_weight": 0.0}, "needs keypoint_weight above 0"),
    ],
)
def test_what_is_not_of_a_policys_stage_is_refused_planned_or_not(
    tmp_path: Path, stage: str, section: str, changes: dict[str, Any], message: str
) -> None:
    config = write_config(tmp_path, section, **changes)
    for train in (partial(run, data=tmp_path / "random", out=tmp_path / "out"), plan):
        with pytest.raises(BitvlaError, match=message):
            train(stage, config)


def test_from_captions_to_a_policy_that_acts(data: Path, tmp_path: Path) -> None:
    """The paper's stages, one after the other: each begins as the one before ended."""
    demonstrations = write_dataset(tmp_path / "random", episodes=3)
    sizes = {"vocab_size = 300": "vocab_size = 400", "max_positions = 64": "max_positions = 256"}
    tokens, policy = (reduce(lambda text, item: text.replace(*item), sizes.items(), p) for p in (TOKENS, POLICY))
    still = {"precision": "ternary", "steps": 1, "learning_rate": 1e-9}
    at = {stage: tmp_path / stage for stage in ("align", "instruct", "distill", "pretrain", "finetune", "direct")}
    new = {"learning_parts": ["tower", "connector", "decoder"]}
    run("align", write_config(tmp_path, MODEL, **still, **new), data, at["align"])
    run("instruct", write_config(tmp_path, "", **still, **BLIND), data, at["instruct"], init=at["align"])
    run("distill", write_config(tmp_path, "", **still, **BLIND), data, at["distill"], teacher=at["instruct"])
    run("pretrain", write_config(tmp_path, tokens, **still), demonstrations, at["pretrain"], init=at["distill"])
    for out, start in (("finetune", "pretrain"), ("direct", "distill")):
        run("finetune", write_config(tmp_path, policy, **still), demonstrations, at[out], init=at[start])
    first = weights(at["align"])
    for stage in at:
        last = weights(at[stage])
        assert all(torch.allclose(value, last[name], atol=1e-6) for name, value in first.items()), stage
        assert (at[stage] / "tokenizer.json").read_text() == (at["align"] / "tokenizer.json").read_text()
    pack(at["finetune"], tmp_path / "policy.safetensors")
    packed = bitvla.load(tmp_path / "policy.safetensors")
    assert packed.act(open_start(at["finetune"]).golden.observations[0]).shape == (3, 3)


def test_conversations_about_an_image_are_in_one_split(data: Path, instructed: Path) -> None:
    splits = [conversations(data, instructed, split=split) for split in ("train", "validation")]
    assert sorted(np.concatenate([split._chosen for split in splits])) == list(range(40))
    whole = splits[0][5]
    for rank in range(2):
        share = conversations(data, instructed, rank=rank, world_size=2)[5]
        assert torch.equal(share.inputs.pixels[0], whole.inputs.pixels[0, rank::2])


def test_what_does_not_fit_is_cut_at_an_answer(data: Path, instructed: Path) -> None:
    _, chat = load_language_network(open_start(instructed))
    first = len(conversations(data, instructed)[0].inputs.token_ids[0])
    window = conversations(data, instructed, max_tokens=first - 2)[0]
    assert window.inputs.token_ids.shape[1] < first
    assert (window.targets != UNKNOWN).any(dim=1).all()
    short = conversations(data, instructed, max_tokens=len(chat.turn(QUESTION + ASK_FOR_A_LETTER, 1)) + 2)[0]
    assert ((short.targets != UNKNOWN).sum(dim=1) == 1).all()
    with pytest.raises(BitvlaError, match="no conversation fits into 20 tokens"):
        conversations(data, instructed, max_tokens=20)


def entry(**changes: Any) -> dict[str, Any]:
    messages = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cube."}]
    return {"id": "x1", "image": "0.png", "conversations": messages} | changes


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "holds no conversation"),
        ({}, r"not in the JSON layout of LLaVA: Expected `array`"),
        ([entry(), {"id": "x2"}], r"conversations` - at `\$\[1\]`"),
        ([entry(), entry(image="lost.png")], r"entry 1 \('x1'\): its image .*lost.png does not exist"),
        (
            [entry(conversations=[{"from": "user", "value": "Hi"}])],
            r"message 0 is from 'user', it must be from 'human'",
        ),
        ([entry(conversations=entry()["conversations"][:1])], "has 1 messages; each question needs its answer"),
        ([entry(conversations=[])], "has 0 messages"),
        ([entry(conversations=[entry()["conversations"][0], {"from": "gpt", "value": " "}])], "message 1, .* is empty"),
        ([entry(image=None)], r"stands 1 times in its questions, it has 0 images"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, entries: Any, message: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "bad.json").write_text(json.dumps(entries))
    with pytest.raises(BitvlaError, match=r"bad\.json.*" + message):
        LlavaDataset(tmp_path / "bad.json")


def test_a_folder_stands_for_its_one_file(data: Path, tmp_path: Path) -> None:
    assert LlavaDataset(data.parent).path == data
    with pytest.raises(BitvlaError, match="must hold Parquet shards or one JSON file of conversations, it holds none"):
        LlavaDataset(tmp_path)
    with pytest.raises(BitvlaError, match=r"cannot read .*lost.json: No such file"):
        LlavaDataset(tmp_path / "lost.json")


def test_special_tokens_in_what_is_said_are_refused(data: Path, instructed: Path, tmp_path: Path) -> None:
    said = [{"from": "human", "value": "Stop<|eot_id|>"}, {"from": "gpt", "value": "Yes"}]
    (tmp_path / "bad.json").write_text(json.dumps([{"conversations": said}]))
    with pytest.raises(BitvlaError, match=r"bad.json: entry 0: the prompt contains reserved tokens"):
        conversations(tmp_path / "bad.json", instructed)  # before training begins


def test_learning_rates_decay_in_a_line() -> None:
    config = TrainConfig(steps=10, batch_size=1, learning_rate=1, precision="full", warmup_steps=2, decay="linear")
    assert [loop._learning_rate(step, config) for step in (0, 2, 6, 10)] == [0.5, 1, 0.5, 0]


def test_every_stage_has_a_plan(instructed: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, MODEL, precision="ternary", max_tokens=64)
    plans = {stage: plan(stage, config) for stage in ("align", "instruct", "distill")}
    trained = {stage: result["parameters"]["trained"] for stage, result in plans.items()}
    sizes: dict[str, int] = {}
    for name, tensor in weights(instructed).items():
        part = name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + tensor.numel()
    tower, connector, decoder = (sizes[name] for name in ("vision_tower", "multi_modal_projector", "language_model"))
    assert trained == {"align": connector, "instruct": connector + decoder, "distill": tower}
    assert plans["distill"]["parameters"]["ternary"] > plans["instruct"]["parameters"]["ternary"]  # the tower is now
    assert plans["distill"]["parameters"]["of the teacher"] == trained["distill"]
    assert plans["align"]["effective batch"]["tokens a step, about"] == 8 * 64


@pytest.mark.parametrize("stage", ["align", "instruct", "distill"])
def test_the_model_at_full_size_is_the_published_one(stage: str) -> None:
    config = load(CONFIGS / f"bitvla-3b-{stage}.toml")
    model = start_model(stage, config, None)
    assert config.batch_size * config.gradient_accumulation == 256
    assert (model.vision.num_layers, model.vision.ternary, model.language.num_layers) == (26, stage == "distill", 30)


def test_the_nano_stages_begin_where_the_ones_before_end() -> None:
    model = load(CONFIGS / "metaworld-nano-align.toml").model
    instructed: Any = SimpleNamespace(folder="runs/instruct", config=model)
    distilled = start_model("distill", load(CONFIGS / "metaworld-nano-distill-tower.toml"), instructed)
    start: Any = SimpleNamespace(folder="runs/distilled-tower", config=distilled)
    for stage in ("pretrain", "vla"):
        config = load(CONFIGS / f"metaworld-nano-{stage}.toml")
        assert config.precision == "ternary"
        check_backbone(config.policy, start)
