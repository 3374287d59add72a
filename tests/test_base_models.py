"""The published base models: vision-language ones answer questions about images, the pre-trained one acts by tokens.

Both against PyTorch: the blocks of transformers with our fake quantisation, no cache, the whole sequence at once.
pytest tests/test_base_models.py
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BitNetConfig, BitNetForCausalLM

import bitvla
import bitvla._native as native
from bitvla import BitvlaError
from bitvla.bundle import LANGUAGE_HEAD, read, read_language_model
from bitvla.cli import main
from bitvla.config import LanguageConfig, VisionConfig
from bitvla.convert import conventions
from bitvla.convert.make_checkpoint import LIBERO_SPATIAL, make_checkpoint
from bitvla.convert.pack import pack
from bitvla.model.network import Connector, VisionTower
from bitvla.model.ternary import make_ternary
from bitvla.processing.images import crop_resized
from bitvla.runtime.language import Conversation, LanguageModel, Sampler
from bitvla.runtime.network import TILE, Cache
from bitvla.runtime.policy import Policy
from bitvla.runtime.verify import verify

SHARD = "model-00001-of-00001.safetensors"
TOWERS = {"ternary tower": "vision-language", "full-precision tower": "vision-language-bf16-tower"}
QUESTION = "What is on the table?"
INSTRUCTION = "Pick up the black bowl and place it on the plate"
IMAGE, SPACE, NEW_LINE = 128010, 220, 198
SYSTEM = [
    128000, 2374, 25, 362, 6369, 1990, 264, 22999, 3823, 323, 459, 21075, 11478, 18328, 13,
    578, 18328, 6835, 11190, 11, 11944, 11, 323, 48887, 11503, 311, 279, 3823, 596, 4860, 13, 128009,
]  # fmt: skip
ASSISTANT = [128009, 72803, 25, SPACE]


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reduced checkpoint of each kind, and what it packs into, that no test changes."""
    folder = tmp_path_factory.mktemp("base")
    for kind in (*TOWERS.values(), "pretrained"):
        make_checkpoint(folder / kind, kind=kind, reduced=True)
        options: dict[str, Any] = {"control_hz": 5.0} if kind == "pretrained" else {}
        pack(folder / kind, folder / f"{kind}.safetensors", **options)
    return folder


@pytest.fixture
def model(checkpoints: Path) -> LanguageModel:
    return LanguageModel.load(checkpoints / "vision-language.safetensors")


@pytest.fixture
def policy(checkpoints: Path) -> Policy:
    return bitvla.load(checkpoints / "pretrained.safetensors")


def picture(seed: int = 0, height: int = 300, width: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def observation(seed: int = 0) -> dict[str, Any]:
    return {"images": {"full": picture(seed, 224, 224)}, "instruction": INSTRUCTION}


def copied(checkpoints: Path, kind: str, to: Path) -> Path:
    """A copy to change. Its files are links, so a test replaces what it changes."""
    return Path(shutil.copytree(checkpoints / kind, to / kind, copy_function=os.link))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.unlink()
    path.write_text(json.dumps(content))


# Against PyTorch.


def pytorch_logits(folder: Path, images: list[np.ndarray], ids: list[int], *, ternary: bool = True) -> np.ndarray:
    """Logits (tokens, V) in float32; images go through Pillow and SigLIP's normalisation, and in as embeddings."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.float() for name, tensor in load_file(folder / SHARD).items()}
    text, seen = config["text_config"], config["vision_config"]

    def part(module: torch.nn.Module, prefix: str) -> torch.nn.Module:
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        module.load_state_dict(state)
        return module.float().eval()

    vision = VisionConfig(
        hidden_size=seen["hidden_size"], intermediate_size=seen["intermediate_size"],
        num_layers=seen["num_hidden_layers"], num_heads=seen["num_attention_heads"],
    )  # fmt: skip
    language = LanguageConfig(hidden_size=text["hidden_size"], num_heads=text["num_attention_heads"])
    tower = part(VisionTower(vision), "vision_tower.")
    if ternary:
        make_ternary(tower)
    connector = part(Connector(vision, language), "multi_modal_projector.")
    decoder = BitNetForCausalLM(BitNetConfig(**text | {"torch_dtype": "float32", "tie_word_embeddings": False}))
    part(decoder, "language_model.")
    make_ternary(decoder.model)
    resized = [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in images]
    pixels = torch.from_numpy(np.stack(resized).transpose(0, 3, 1, 2) / np.float32(127.5) - np.float32(1))
    sequence = torch.tensor([ids])
    with torch.no_grad():
        embeddings = decoder.model.embed_tokens(sequence)
        embeddings[sequence == IMAGE] = connector(tower(pixels)[-1].flatten(0, 1))
        return decoder(inputs_embeds=embeddings).logits[0].numpy()


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Sums in another order flip an int8 code here and there, and every later token sees hundreds of image tokens: a
    hundredth after these layers (docs/parity.md), where another image gives a third. Each layer alone, and to float32's
    precision, is compared in test_official_parity.py."""
    errors = np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)
    print(np.sort(errors))
    assert errors.max() < 0.05


@pytest.mark.parametrize("tower", TOWERS)
def test_logits_of_a_question_about_two_images(checkpoints: Path, tower: str) -> None:
    model = LanguageModel.load(checkpoints / f"{TOWERS[tower]}.safetensors")
    conversation, images = Conversation(model), [picture(1), picture(2, 224, 224)]
    list(conversation.say(QUESTION, images=images, max_tokens=6))
    expected = pytorch_logits(
        checkpoints / TOWERS[tower], images, conversation.ids[:-1], ternary=tower == "ternary tower"
    )
    prompt = len(conversation.ids) - 6
    cache, features = Cache(model.config.language, len(conversation.ids)), model.see(images)
    steps = [model.logits(conversation.ids[:prompt], cache, features).copy()]
    steps += [model.logits([token], cache).copy() for token in conversation.ids[prompt:-1]]
    close(np.stack(steps), expected[prompt - 1 :])
    assert conversation.ids[prompt:] == [int(np.argmax(logits)) for logits in steps]
    # The image matters, and so does its place.
    others = pytorch_logits(
        checkpoints / TOWERS[tower], images[::-1], conversation.ids[:-1], ternary=tower == "ternary tower"
    )
    assert np.abs(others[-1] - expected[-1]).max() > 0.1 * np.abs(expected[-1]).max()


@pytest.mark.parametrize("seed", [0, 1])
def test_discrete_actions(checkpoints: Path, policy: Policy, seed: int) -> None:
    """Seven tokens, each the likeliest of the last 256, then OpenVLA's bins and the statistics."""
    states: dict[str, np.ndarray] = {}
    policy.network.record = states.__setitem__
    action = policy.act(observation(seed))
    logits = np.concatenate([states[f"logits.{index}"] for index in range(7)])
    tokens = 128012 + logits.argmax(-1)
    prompt = prompt_ids()
    image = observation(seed)["images"]["full"]
    expected = pytorch_logits(checkpoints / "pretrained", [image], [*prompt, *map(int, tokens[:-1])])
    close(logits, expected[len(prompt) - 1 :, 128012:])
    bins = np.linspace(-1, 1, 256)
    values = ((bins[:-1] + bins[1:]) / 2)[np.clip(128268 - tokens - 1, 0, 254)]
    low, high = (np.array(LIBERO_SPATIAL["action"][key]) for key in ("q01", "q99"))
    robot = np.where(LIBERO_SPATIAL["action"]["mask"], (values + 1) / 2 * (high - low + 1e-8) + low, values)
    np.testing.assert_allclose(action, [robot], rtol=1e-5, atol=1e-6)


# Conventions.


def prompt_ids() -> list[int]:
    words = [
        3923, 1957, 1288, 279, 12585, 1935, 311,  # What action should the robot take to
        3820, 709, 279, 3776, 19763, 323, 2035, 433, 389, 279, 12235, 30,  # pick up the black bowl and place it on ...
    ]  # fmt: skip
    return [*SYSTEM, 35075, 25, SPACE, *[IMAGE] * 256, NEW_LINE, *words, *ASSISTANT]


def test_the_prompt_of_the_pretrained_model(policy: Policy) -> None:
    assert policy._read_prompt().ids(INSTRUCTION).tolist() == prompt_ids()


def test_the_prompt_of_a_question(model: LanguageModel) -> None:
    """The image comes first, a line break stays after it, and a later turn has none."""
    conversation = Conversation(model)
    list(conversation.say(QUESTION, images=[picture()], max_tokens=1))
    rest = [*model.chat.encode(" is"), 389, 279, 2007, 30]
    words = [3923, *rest]
    assert conversation.ids[:-1] == [*SYSTEM, 35075, 25, SPACE, *[IMAGE] * 256, NEW_LINE, *words, *ASSISTANT]
    before = list(conversation.ids)
    list(conversation.say(QUESTION, images=[picture(), picture(1)], max_tokens=1))
    pictures = [*[IMAGE] * 256, SPACE, *[IMAGE] * 256]
    assert conversation.ids[len(before) : -1] == [128009, 35075, 25, SPACE, *pictures, NEW_LINE, *words, *ASSISTANT]
    before = list(conversation.ids)
    list(conversation.say(QUESTION, max_tokens=1))
    assert conversation.ids[len(before) : -1] == [128009, 35075, 25, *model.chat.encode(" What"), *rest, *ASSISTANT]


def test_files_say_what_their_model_does(checkpoints: Path) -> None:
    for tower, kind in TOWERS.items():
        config = read_language_model(checkpoints / f"{kind}.safetensors").config
        assert not config.language.bidirectional
        assert not config.tied
        assert config.vision is not None
        assert config.vision.ternary == (tower == "ternary tower")
        assert config.chat.image_token == "<|image_pad|>"
    bundle = read(checkpoints / "pretrained.safetensors")
    assert not bundle.config.language.bidirectional
    assert (bundle.config.action.bins, bundle.config.action.dim, bundle.config.language.vocab_size) == (256, 7, 128268)
    assert bundle.config.processing.control_hz == 5
    head = load_file(checkpoints / "pretrained" / SHARD)[LANGUAGE_HEAD]
    np.testing.assert_array_equal(bundle.tensors[LANGUAGE_HEAD], head[128012:].view(torch.uint16).numpy())


def test_images_go_through_siglips_processor() -> None:
    image = picture(3, 500, 200)
    expected = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(crop_resized(image, conventions.SIGLIP, 224), np.asarray(expected))


@pytest.mark.parametrize("kind", [*TOWERS.values(), "pretrained"])
def test_packed_base_models_verify(checkpoints: Path, kind: str) -> None:
    result = verify(checkpoints / f"{kind}.safetensors")
    assert result["passed"], result
    assert {f"kernels {isa}" for isa in native.available()} <= {check["check"] for check in result["checks"]}


def test_the_head_and_the_tower_may_be_int8(checkpoints: Path, tmp_path: Path) -> None:
    """Smaller, and still nearly the same: rows of 80 weights in int8 are within half a percent of their largest."""
    pack(checkpoints / "vision-language-bf16-tower", tmp_path / "int8", matrix_dtype="I8")
    exact, small = (
        LanguageModel.load(path) for path in (checkpoints / "vision-language-bf16-tower.safetensors", tmp_path / "int8")
    )
    ids = exact.chat.encode("What is on the plate?")
    one, other = (model.logits(ids, Cache(model.config.language, len(ids))) for model in (exact, small))
    assert 0 < np.abs(one - other).max() < 0.05 * np.abs(one).max()
    one, other = (model.see([picture()]) for model in (exact, small))
    assert 0 < np.abs(one - other).max() < 0.1 * np.abs(one).max()


# Image tokens and the cache.


def test_an_interrupted_reading_goes_on(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block is in the cache, the second is not, and the images of both are still needed."""
    whole = Conversation(model)
    images = [picture(1), picture(2), picture(3)]
    expected = "".join(whole.say(QUESTION, images=images, max_tokens=3))
    stopped, run, calls = Conversation(model), model.decoder.run, iter([False, True])

    def once(*args: Any, **options: Any) -> Any:
        if next(calls, False):
            raise KeyboardInterrupt
        return run(*args, **options)

    monkeypatch.setattr(model.decoder, "run", once)
    with pytest.raises(KeyboardInterrupt):
        list(stopped.say(QUESTION, images=images, max_tokens=3))
    assert stopped._cache.length == 512
    assert "".join(stopped._answer(3, Sampler())) == expected
    assert_read_alike(stopped, whole)


def assert_read_alike(actual: Conversation, expected: Conversation) -> None:
    read = slice(0, expected._cache.length // TILE)  # whole tiles of keys, and as many values
    for one, other in zip(actual._cache.by_head(), expected._cache.by_head(), strict=True):
        np.testing.assert_array_equal(one[:, :, read], other[:, :, read])


@pytest.mark.parametrize(
    ("question", "seeds", "images"),
    [
        ("Is the cup red?", (1, 2), 0),
        (QUESTION, (1, 2), 0),
        (QUESTION, (1, 3), 1),
        (QUESTION, (3, 2), 2),
        ("Why?", (), 0),
    ],
    ids=["another question", "the same", "another second image", "another first image", "no image"],
)
def test_what_two_conversations_begin_with_is_read_once(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, question: str, seeds: tuple[int, ...], images: int
) -> None:
    """Answer and keys are those of a conversation that read everything, bit for bit; `images` pass the tower."""
    first, whole = Conversation(model), Conversation(model)
    list(first.say(QUESTION, images=[picture(1), picture(2)], max_tokens=3))
    shown = [picture(seed) for seed in seeds]
    expected = "".join(whole.say(question, images=shown, max_tokens=3))
    second = Conversation(model, after=first)
    answer = second.say(question, images=shown, max_tokens=3)
    known, seen, see = second._cache.length, [], model.see
    pairs = zip(what_was_read(first, (1, 2)), what_was_read(second, seeds)[:-1], strict=False)
    assert 0 < known == len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    monkeypatch.setattr(model, "see", lambda images: seen.append(len(images)) or see(images))
    assert "".join(answer) == expected
    assert sum(seen) == images
    assert_read_alike(second, whole)


def what_was_read(conversation: Conversation, seeds: tuple[int, ...]) -> list[tuple[int, int]]:
    """The tokens, each with the seed of the image that it is a part of, if any."""
    patches = iter(np.repeat(seeds, 256).tolist())
    return [(token, next(patches) if token == IMAGE else 0) for token in conversation.ids]


@pytest.mark.parametrize("isa", native.available())
def test_instruction_sets_give_the_same_bits(checkpoints: Path, isa: str) -> None:
    for kind in TOWERS.values():
        model = LanguageModel.load(checkpoints / f"{kind}.safetensors")
        expected = model.see([picture()])
        native.set_isa(isa)
        np.testing.assert_array_equal(model.see([picture()]), expected)


# What is refused.


def test_a_language_model_sees_no_images(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", kind="language", reduced=True)
    pack(tmp_path / "checkpoint", tmp_path / "model.safetensors")
    with pytest.raises(BitvlaError, match="no vision tower, so it sees no images"):
        LanguageModel.load(tmp_path / "model.safetensors").generate(QUESTION, images=[picture()])


def test_image_tokens_cannot_be_smuggled_in(model: LanguageModel) -> None:
    with pytest.raises(BitvlaError, match="reserved tokens"):
        model.generate("What is <|image_pad|>?", images=[picture()])


def test_more_images_than_the_context_holds_are_refused(model: LanguageModel) -> None:
    with pytest.raises(BitvlaError, match="tokens, the model was built for 4096"):
        model.generate(QUESTION, images=[picture()] * 16)


WRONG_PRETRAINED: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "no control rate": (lambda folder: None, {"control_hz": None}, "give the one of .* with --control-hz"),
    "two views": (lambda folder: None, {"views": 2}, "sees one image, not 2"),
    "another key": (lambda folder: None, {"statistics": "bridge"}, "config.json has no statistics of 'bridge', only"),
    "no file": (lambda folder: None, {"statistics": "gone.json"}, "gone.json is missing"),
    "no statistics": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.pop("norm_stats")),
        {},
        "has no statistics to bring its actions into a robot's units: give --statistics FILE",
    ),
    "several data sets": (
        lambda folder: edit_json(folder / "config.json", lambda config: config["norm_stats"].update(other={})),
        {},
        "has the statistics of libero_spatial_no_noops, other; choose with --statistics KEY",
    ),
    "constant action": (
        lambda folder: edit_json(
            folder / "config.json",
            lambda config: config["norm_stats"]["libero_spatial_no_noops"]["action"].update(q99=[0] * 7, q01=[0] * 7),
        ),
        {},
        "action statistics of 'action_0' are missing or constant",
    ),
    "no actions": (
        lambda folder: edit_json(
            folder / "config.json", lambda config: config["norm_stats"]["libero_spatial_no_noops"].pop("action")
        ),
        {},
        "lacks q01 or q99 of libero_spatial_no_noops.action",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_PRETRAINED)
def test_what_is_not_known_is_refused(checkpoints: Path, tmp_path: Path, name: str) -> None:
    edit, options, message = WRONG_PRETRAINED[name]
    folder = copied(checkpoints, "pretrained", tmp_path)
    edit(folder)
    with pytest.raises(BitvlaError, match=message):
        pack(folder, tmp_path / "out", **{"control_hz": 5.0} | options)
    assert not (tmp_path / "out").exists()


def test_statistics_of_a_file(checkpoints: Path, tmp_path: Path) -> None:
    """A robot of the user's own: other bounds, other dimensions."""
    table = {"action": {"q01": [-2, 0], "q99": [2, 1], "mask": [True, False]}}
    (tmp_path / "mine.json").write_text(json.dumps({"mine": table}))
    out = tmp_path / "out"
    pack(checkpoints / "pretrained", out, statistics=str(tmp_path / "mine.json"), control_hz=10)
    policy = bitvla.load(out)
    assert policy.config.name == "bitvla-pretrained-mine"
    action = policy.act(observation())
    assert action.shape == (1, 2)
    assert abs(action[0, 1]) <= 1


@pytest.mark.parametrize("options", [{"views": 1}, {"statistics": "a"}, {"control_hz": 5.0}])
def test_what_does_not_act_takes_no_conventions_of_a_robot(
    checkpoints: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(BitvlaError, match="does not act"):
        pack(checkpoints / "vision-language", tmp_path / "out", **options)


def test_the_image_token_is_the_tokenizers(checkpoints: Path, tmp_path: Path) -> None:
    """As published, before the official code renames its tokens: config.json says which one stands for images."""
    folder = copied(checkpoints, "vision-language", tmp_path)
    edit_json(folder / "config.json", lambda config: config.update(image_token_index=128260))
    edit_json(
        folder / "tokenizer.json",
        lambda tokenizer: [
            token.update(content={128010: "<|reserved_special_token_5|>", 128260: "<image>"}[token["id"]])
            for token in tokenizer["added_tokens"]
            if token["id"] in (128010, 128260)
        ],
    )
    pack(folder, tmp_path / "out")
    renamed = LanguageModel.load(tmp_path / "out")
    assert (renamed.config.chat.image_token, renamed.chat.image_id) == ("<image>", 128260)
    published = LanguageModel.load(checkpoints / "vision-language.safetensors")
    texts = ["".join(model.generate(QUESTION, images=[picture()], max_tokens=4)) for model in (renamed, published)]
    assert texts[0] == texts[1]
    edit_json(folder / "config.json", lambda config: config.update(image_token_index=5))
    with pytest.raises(BitvlaError, match=r"neither <.image_pad.> nor a special token with the id image_token_index"):
        pack(folder, tmp_path / "out")


# The command.


def test_chat_about_an_image(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = str(checkpoints / "vision-language.safetensors"), tmp_path / "picture.png"
    Image.fromarray(picture(4)).save(path)
    command = ["chat", model, "--prompt", QUESTION, "--image", str(path), "--max-tokens", "3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["answer"] + "\n" == printed
    assert record["prompt_tokens"] == 32 + 3 + 256 + 1 + len(LanguageModel.load(Path(model)).chat.encode(QUESTION)) + 4
    expected = LanguageModel.load(Path(model)).generate(QUESTION, images=[picture(4)], max_tokens=3)
    assert record["answer"] == "".join(expected)
    path.write_bytes(b"no image")
    assert main(command) == 1
    assert "picture.png cannot be read as an image" in capsys.readouterr().err
