"""The conventions of the published fine-tunes, each against values worked out by hand or written from their definition.

Token ids are those of the Llama 3 tokenizer. pytest tests/test_official_conventions.py
"""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from bitvla.bundle import to_float32
from bitvla.config import Camera, ImageProcessing, PolicyConfig, ProcessingConfig
from bitvla.convert import conventions
from bitvla.convert.make_checkpoint import make_checkpoint
from bitvla.convert.official import open_official
from bitvla.convert.pack import pack
from bitvla.processing.images import crop_resized, to_pixels
from bitvla.processing.prompt import Prompt
from bitvla.processing.vectors import normalize, robot_actions
from bitvla.runtime.policy import Policy

INSTRUCTION = "pick up the black bowl and place it on the plate"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conventions") / "checkpoint"
    make_checkpoint(path, reduced=True)
    return path


@pytest.fixture(scope="module")
def config(folder: Path) -> PolicyConfig:
    return open_official(folder).config


@pytest.fixture(scope="module")
def processing(config: PolicyConfig) -> ProcessingConfig:
    return config.processing


# The prompt.

SYSTEM = [
    2374, 25, 362, 6369, 1990, 264, 22999, 3823, 323, 459, 21075, 11478, 18328, 13,  # System: A chat between ...
    578, 18328, 6835, 11190, 11, 11944, 11, 323, 48887, 11503, 311, 279, 3823, 596, 4860, 13,  # The assistant gives ...
]  # fmt: skip
QUESTION = [
    3923, 1957, 1288, 279, 12585, 1935, 311,  # What action should the robot take to
    3820, 709, 279, 3776, 19763, 323, 2035, 433, 389, 279, 12235, 30,  # pick up the black bowl and place it on ...
]  # fmt: skip
BEGIN, STOP, END_OF_TURN, IMAGE, PROPRIO, SPACE, PLACEHOLDER = 128000, 128001, 128009, 128010, 128011, 220, 1


def expected_ids(views: int) -> list[int]:
    user, assistant = [1502, 25, SPACE], [72803, 25, SPACE]
    content = [IMAGE] * 256 * views + [PROPRIO] + QUESTION
    prompt = [BEGIN, *SYSTEM, END_OF_TURN, *user, *content, END_OF_TURN, *assistant]
    return prompt + [PLACEHOLDER] * 56 + [STOP]


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def prompt_of(config: PolicyConfig, tokenizer: Tokenizer, views: int) -> Prompt:
    cameras = tuple(Camera(name=name, height=256, width=256) for name in conventions.CAMERAS[views])
    processing = msgspec.structs.replace(config.processing, cameras=cameras)
    return Prompt(msgspec.structs.replace(config, processing=processing), tokenizer)


@pytest.mark.parametrize(("views", "length"), [(1, 372), (2, 628), (3, 884)])
def test_the_sequence_of_tokens(config: PolicyConfig, tokenizer: Tokenizer, views: int, length: int) -> None:
    prompt = prompt_of(config, tokenizer, views)
    ids = prompt.ids(INSTRUCTION)
    assert ids.tolist() == expected_ids(views)
    assert len(ids) == length
    first_placeholder = length - 57
    assert prompt.slot_states(length) == slice(first_placeholder - 1, first_placeholder + 55)
    assert ids[first_placeholder - 1] == SPACE, "the first state is that of the last token of the prompt"


def test_instructions_are_in_lower_case_and_on_one_line(config: PolicyConfig, tokenizer: Tokenizer) -> None:
    prompt = prompt_of(config, tokenizer, 1)
    assert prompt.ids("Pick up the\n Black BOWL and place it on the plate ").tolist() == expected_ids(1)


def test_any_text_encodes(tokenizer: Tokenizer) -> None:
    text = "put the ramekin on the Küchenbrett, 12 times\n\n  now!"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < BEGIN


def test_special_tokens_have_the_published_ids(tokenizer: Tokenizer) -> None:
    published = {
        "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|pad|>": 128002, "<|eot_id|>": 128009,
        "<|image_pad|>": 128010, "<proprio_pad>": 128011, "<action_0>": 128012, "<action_251>": 128263,
    }  # fmt: skip
    assert {token: tokenizer.token_to_id(token) for token in published} == published
    assert tokenizer.get_vocab_size() == 128264
    assert tokenizer.encode("What").ids == [BEGIN, 3923], "the tokenizer itself puts the beginning in front"


def test_the_third_person_image_comes_first(processing: ProcessingConfig) -> None:
    assert [camera.name for camera in processing.cameras] == ["full", "wrist"]
    assert conventions.CAMERAS[3] == ("full", "left_wrist", "right_wrist")


# What the decoder sees.


def test_placeholders_are_zero_and_everything_else_is_embedded(folder: Path, config: PolicyConfig) -> None:
    path = folder.parent / "policy.safetensors"
    pack(folder, path)
    policy = Policy.load(path)
    seen: dict[str, np.ndarray] = {}
    policy.network.record = lambda name, values: seen.setdefault(name, values)
    images = {name: np.full((256, 256, 3), 60 * i, np.uint8) for i, name in enumerate(("full", "wrist"), 1)}
    policy.act({"images": images, "state": np.zeros(8, np.float32), "instruction": INSTRUCTION})

    embedded, ids = seen["decoder.0"], np.array(expected_ids(2))
    table = to_float32(policy.bundle.tensors["language_model.model.embed_tokens.weight"])
    np.testing.assert_array_equal(embedded[571:627], 0)
    text = (ids != IMAGE) & (ids != PROPRIO) & (np.arange(628) != 627)
    text[571:627] = False
    np.testing.assert_array_equal(embedded[text], table[ids[text]])
    np.testing.assert_array_equal(embedded[627], table[STOP])
    np.testing.assert_array_equal(embedded[35 : 35 + 512], seen["connector"])
    assert not np.array_equal(embedded[35 : 35 + 256], embedded[35 + 256 : 35 + 512])
    assert not np.array_equal(embedded[547], table[PROPRIO])
    assert seen["answers"].shape == (56, config.language.hidden_size)


# State and actions.


def test_the_state_is_scaled_to_its_quantiles_and_clipped(processing: ProcessingConfig) -> None:
    """q01 and q99 of eef_x are -0.2727657300 and 0.1352936503, so 0 is at 2 * 0.27276573 / 0.40805938 - 1."""
    low, high = np.array(processing.state.low), np.array(processing.state.high)
    state = np.stack([low, high, (low + high) / 2, low - 1, high + 1, np.zeros(8)]).astype(np.float32)
    values = normalize(state, processing.state)
    for row, expected in enumerate((-1, 1, 0, -1, 1)):
        np.testing.assert_allclose(values[row], expected, atol=2e-6)
    assert values[5, 0] == pytest.approx(0.336892, abs=1e-6)


def test_actions_are_scaled_back_except_the_gripper(processing: ProcessingConfig) -> None:
    """Of x: 0.5 * (0.5 + 1) * (0.9375 + 0.7454732114) - 0.7454732114 = 0.5167566972; outputs are not clipped."""
    outputs = np.zeros((4, 7), np.float32)
    outputs[:, 0] = [-1, 1, 0.5, 1.2]
    outputs[:, 6] = [1, 0, 0.5, 0.7]
    actions = robot_actions(outputs, processing)
    np.testing.assert_allclose(actions[:, 0], [-0.7454732, 0.9375, 0.5167567, 1.1057973], atol=1e-6)
    np.testing.assert_allclose(actions[0, 1:6], [0.1071429, -0.0026786, -0.0016071, -0.0150000, -0.0192857], atol=1e-6)
    np.testing.assert_array_equal(actions[:, 6], [-1, 1, 0, -1])  # trained with 1 for open, LIBERO opens with -1


# Images.


def image_of(seed: int = 0) -> np.ndarray:
    """Smooth and noisy at once, so that neither rounding nor filtering is hidden."""
    rows, columns = np.mgrid[:256, :256]
    noise = np.random.default_rng(seed).integers(0, 40, (256, 256, 3))
    return (np.stack([rows, columns, 255 - rows], axis=-1) * 0.8 + noise).clip(0, 255).astype(np.uint8)


def lanczos3(values: np.ndarray, size: int) -> np.ndarray:
    """Antialiased Lanczos resampling along both axes in float64, from its definition."""
    scale = values.shape[0] / size
    centres = (np.arange(size) + 0.5) * scale
    x = (np.arange(values.shape[0]) + 0.5 - centres[:, None]) / max(scale, 1)
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("ir,rck,jc->ijk", weights, values.astype(np.float64), weights, optimize=True)


def crop_and_resize(values: np.ndarray, side: float) -> np.ndarray:
    """TensorFlow's operation of this name for a central box of the given side, from its documentation."""
    size = values.shape[0]
    points = (1 - side) / 2 * (size - 1) + np.arange(size) * side
    low = np.floor(points).astype(int)
    share = points - low
    rows = values[low] * (1 - share)[:, None, None] + values[low + 1] * share[:, None, None]
    return rows[:, low] * (1 - share)[None, :, None] + rows[:, low + 1] * share[None, :, None]


def test_the_image_chain_is_the_reference_one(processing: ProcessingConfig) -> None:
    """Turned by 180 degrees, through JPEG, Lanczos to 224, rounded, the central 90 % of the area, cut off."""
    image = image_of()
    buffer = io.BytesIO()
    Image.fromarray(image[::-1, ::-1]).save(buffer, "JPEG", quality=95)
    resized = np.clip(np.rint(lanczos3(np.asarray(Image.open(buffer)), 224)), 0, 255)
    cropped = crop_and_resize(resized / 255, 0.9**0.5)
    expected = np.floor(np.clip(cropped, 0, 1) * 255.5).astype(np.uint8)
    actual = crop_resized(image, processing.image, 224)
    assert actual.shape == (224, 224, 3)
    difference = np.abs(actual.astype(int) - expected)
    assert difference.max() <= 1
    assert np.mean(difference != 0) < 2e-4  # values that float32 and float64 round differently


def test_pillow_alone_rounds_differently(processing: ProcessingConfig) -> None:
    """What an approximation costs: at most two levels, nearly half a level brighter on average."""
    image = image_of()
    exact = crop_resized(image, processing.image, 224).astype(int)
    pillow = crop_resized(image, msgspec.structs.replace(processing.image, rounding="pillow"), 224).astype(int)
    assert np.abs(pillow - exact).max() <= 2
    assert 0.1 < np.mean(pillow - exact) < 0.6


def test_the_crop_samples_these_points() -> None:
    """The side is sqrt(0.9) = 0.948683, so point i of 224 lies at 223 * 0.0256585 + 0.948683 i: 5.7218, 6.6705, ..."""
    ramp = np.repeat(np.arange(224, dtype=np.uint8)[None, :, None], 224, axis=0).repeat(3, axis=2)
    row = crop_resized(ramp, ImageProcessing(rounding="tensorflow"), 224)[0, :, 0]
    # Times 255.5 / 255 and cut off: 5.7331, 6.6836, 100.7873, 217.7043.
    assert row[[0, 1, 100, 223]].tolist() == [5, 6, 100, 217]


def test_images_are_turned_by_180_degrees(processing: ProcessingConfig) -> None:
    image = np.zeros((256, 256, 3), np.uint8)
    image[:64, :64] = 255
    seen = crop_resized(image, processing.image, 224)
    assert seen[-30:, -30:].min() > 240
    assert seen[:100].max() < 15


def test_pixels_are_between_minus_one_and_one(processing: ProcessingConfig) -> None:
    pixels = to_pixels(np.array([[[0, 51, 255]]], np.uint8), processing.image)
    np.testing.assert_allclose(pixels, [[[-1, 51 / 127.5 - 1, 1]]], atol=1e-7)
