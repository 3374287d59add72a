"""Images, prompt, state and actions: what goes in comes out as the network was trained on, or is refused.

pytest tests/test_processing.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from tokenizers import Tokenizer

from bitvla import BitvlaError
from bitvla.config import Camera, ImageProcessing, PolicyConfig, Statistics, check
from bitvla.processing.images import crop_resized, read_image, to_patches, to_pixels
from bitvla.processing.observation import check_observation
from bitvla.processing.prompt import SLOT_ID, Prompt, train_tokenizer
from bitvla.processing.vectors import check_prefix, network_actions, normalize, robot_actions, unnormalize
from checkpoints import INSTRUCTIONS, flow_config, processing_config, tiny_config

CONFIG = tiny_config()
SPECIALS = ["<|image_pad|>", "<|pad|>", "<proprio_pad>", "<|end_of_text|>"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(INSTRUCTIONS, 300, SPECIALS)


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> Prompt:
    return Prompt(CONFIG, tokenizer)


# State and actions.

bounds = st.tuples(st.floats(-1e3, 1e3, width=32), st.floats(0.0625, 1e3, width=32)).map(lambda b: (b[0], b[0] + b[1]))


def statistics(pairs: list[tuple[float, float]], mask: list[bool]) -> Statistics:
    size = len(pairs)
    return Statistics(
        names=tuple("xyzw"[:size]),
        units=("m",) * size,
        low=tuple(low for low, _ in pairs),
        high=tuple(high for _, high in pairs),
        mask=tuple(mask),
    )


@given(st.lists(st.tuples(bounds, st.booleans()), min_size=1, max_size=4), st.data())
def test_unnormalize_inverts_normalize(columns: list[tuple[tuple[float, float], bool]], data: st.DataObject) -> None:
    table = statistics([pair for pair, _ in columns], [used for _, used in columns])
    fractions = data.draw(arrays(np.float32, len(columns), elements=st.floats(0, 1, width=32)))
    low, high = np.array(table.low), np.array(table.high)
    values = (low + fractions * (high - low)).astype(np.float32)
    mapped = normalize(values, table)
    used = np.array(table.mask)
    assert (np.abs(mapped[used]) <= 1).all()
    np.testing.assert_array_equal(mapped[~used], values[~used])
    # float32 keeps about 7 digits of the larger of offset and span
    tolerance = 4 * 2.0**-23 * (np.abs(low) + np.abs(high))
    assert (np.abs(unnormalize(mapped, table) - values) <= tolerance + 1e-6).all()


def test_normalize_maps_the_bounds_and_clips() -> None:
    table = statistics([(-2, 2), (0, 10), (0, 1)], [True, True, False])
    values = np.array([[-2, 0, -5], [0, 5, 5], [99, -99, 99]], np.float32)
    expected = [[-1, -1, -5], [0, 0, 5], [1, -1, 99]]
    np.testing.assert_allclose(normalize(values, table), expected, atol=1e-6)


def test_actions_beyond_the_bounds_are_not_clipped() -> None:
    table = statistics([(-2, 2)], [True])
    np.testing.assert_allclose(unnormalize(np.array([1.5], np.float32), table), [3], atol=1e-5)


@pytest.mark.parametrize("gripper", ["as_is", "libero"])
def test_decided_actions_become_what_the_network_gives(gripper: Any) -> None:
    """In the robot's units and conventions there, and back to the network's."""
    processing = processing_config(CONFIG.processing.cameras, 3, 4, 1, gripper=gripper)
    outputs = np.random.default_rng(0).uniform(-1, 1, (50, 4)).astype(np.float32)
    if gripper == "libero":
        outputs[:, -1] = outputs[:, -1] > 0  # the robot's gripper knows no third state
    np.testing.assert_allclose(network_actions(robot_actions(outputs, processing), processing), outputs, atol=1e-6)


@pytest.mark.parametrize(
    ("prefix", "most", "message"),
    [
        (np.zeros((1, 4)), 0, "prefix of 1 actions is given, the policy takes up to 0: it was not trained"),
        (np.zeros((3, 4)), 2, "prefix of 3 actions is given, the policy takes up to 2$"),
        (np.zeros((2, 3)), 2, r"shape \(2, 3\); the policy needs \(n, 4\)"),
        (np.zeros(4), 2, r"shape \(4,\)"),
        (np.full((1, 4), np.nan), 2, "not finite"),
        ("now", 2, "not an array"),
        ([["1", "2", "3", "4"]], 2, "not an array"),
        ([[10**400] * 4], 2, "not an array"),
    ],
)
def test_a_prefix_that_cannot_be_continued_is_refused(prefix: Any, most: int, message: str) -> None:
    config = tiny_config(action=msgspec.structs.replace(tiny_config().action, max_prefix=most))
    with pytest.raises(BitvlaError, match=message):
        check_prefix(prefix, config)
    assert check_prefix(None, config).shape == (0, 4)


def test_the_gripper_convention_of_libero() -> None:
    """Trained in [0, 1] with 1 open; LIBERO closes with +1 and opens with -1."""
    processing = processing_config(CONFIG.processing.cameras, 3, 4, 1, gripper="libero")
    outputs = np.zeros((3, 4), np.float32)
    outputs[:, 3] = [0.9, 0.1, 0.5]
    actions = robot_actions(outputs, processing)
    np.testing.assert_array_equal(actions[:, 3], [-1, 1, 0])
    np.testing.assert_array_equal(actions[:, :3], unnormalize(outputs, processing.action)[:, :3])
    plain = processing_config(CONFIG.processing.cameras, 3, 4, 1)
    np.testing.assert_array_equal(robot_actions(outputs, plain), unnormalize(outputs, plain.action))


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1e-7), (float("nan"), 1.0), (0.0, float("inf"))]
)
def test_statistics_that_cannot_normalise_are_refused(low: float, high: float) -> None:
    spoiled = msgspec.structs.replace(CONFIG.processing.state, low=(low, 0.0, 0.0), high=(high, 1.0, 1.0))
    processing = msgspec.structs.replace(CONFIG.processing, state=spoiled)
    with pytest.raises(BitvlaError, match="state statistics of 's0' are missing or constant"):
        check(msgspec.structs.replace(CONFIG, processing=processing))


# Images.


def image_of(*values: int) -> np.ndarray:
    return np.random.default_rng(values).integers(0, 256, (*values, 3), dtype=np.uint8)


def test_pixels_are_centred() -> None:
    pixels = to_pixels(np.array([[[0, 127, 255]]], np.uint8), ImageProcessing())
    np.testing.assert_allclose(pixels, [[[-1, 127 / 127.5 - 1, 1]]], atol=1e-6)
    assert pixels.dtype == np.float32


def test_patches_are_the_operands_of_a_convolution() -> None:
    pixels = np.random.default_rng(0).standard_normal((6, 6, 3), dtype=np.float32)
    kernel = np.random.default_rng(1).standard_normal((2, 3, 2, 2), dtype=np.float32)
    products = to_patches(pixels, 2) @ kernel.reshape(2, -1).T
    for row in range(3):
        for column in range(3):
            window = pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = np.einsum("ijc,ocij->o", window, kernel)
            np.testing.assert_allclose(products[3 * row + column], expected, rtol=1e-4, atol=1e-5)


def test_grey_images_of_16_bits_are_scaled_and_others_of_more_refused(tmp_path: Path) -> None:
    grey = image_of(4, 4)[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    np.testing.assert_array_equal(read_image(tmp_path / "16.png"), np.repeat(grey[..., None], 3, axis=2))
    for dtype in (np.int32, np.float32):
        Image.fromarray(grey.astype(dtype)).save(tmp_path / "32.tif")
        with pytest.raises(
            BitvlaError, match=r"32\.tif cannot be read as an image: its values have 32 bits .*; save it"
        ):
            read_image(tmp_path / "32.tif")


def test_the_whole_image_is_only_resized() -> None:
    image = image_of(20, 20)
    np.testing.assert_array_equal(crop_resized(image, ImageProcessing(crop_area=1.0), 20), image)


def test_the_crop_is_central_and_of_the_given_area() -> None:
    """Of a horizontal ramp, the crop's ends are where the area says."""
    ramp = np.repeat(np.linspace(0, 250, 100)[None, :, None], 100, axis=0).repeat(3, axis=2).astype(np.uint8)
    cropped = crop_resized(ramp, ImageProcessing(crop_area=0.25), 50)
    assert cropped[:, 0].mean() == pytest.approx(250 * 25.5 / 99, abs=2)
    assert cropped[:, -1].mean() == pytest.approx(250 * 73.5 / 99, abs=2)
    assert crop_resized(ramp, ImageProcessing(crop_area=0.25), 50, (0, 0.5))[:, 0].mean() < 3


def test_rotation_comes_first() -> None:
    image = image_of(24, 24)
    rotated = crop_resized(image[::-1, ::-1], ImageProcessing(), 12, (0.2, 0.7))
    processing = ImageProcessing(rotate180=True)
    np.testing.assert_array_equal(crop_resized(image, processing, 12, (0.2, 0.7)), rotated)


def test_lanczos_and_jpeg_change_the_image_a_little() -> None:
    smooth = np.asarray(Image.fromarray(image_of(4, 4)).resize((64, 64), Image.Resampling.BICUBIC))
    plain = crop_resized(smooth, ImageProcessing(), 28).astype(int)
    for processing in (ImageProcessing(resize="lanczos"), ImageProcessing(jpeg_quality=95)):
        other = crop_resized(smooth, processing, 28).astype(int)
        assert 0 < np.abs(other - plain).mean() < 8


@given(st.sampled_from([np.float32, np.int64, bool]), st.integers(1, 40), st.integers(1, 40), st.integers(1, 4))
def test_images_of_other_kinds_are_refused(dtype: type, height: int, width: int, channels: int) -> None:
    images = {camera.name: np.zeros((camera.height, camera.width, 3), np.uint8) for camera in CONFIG.processing.cameras}
    good = {"images": images, "state": np.zeros(3), "instruction": "open"}
    assert check_observation(good, CONFIG).instruction == "open"
    with pytest.raises(BitvlaError, match="dtype"):
        check_observation(good | {"images": images | {"corner": np.zeros((36, 32, 3), dtype)}}, CONFIG)
    assume((height, width, channels) != (36, 32, 3))
    with pytest.raises(BitvlaError, match="shape"):
        check_observation(good | {"images": images | {"corner": np.zeros((height, width, channels), np.uint8)}}, CONFIG)


def test_images_come_in_the_order_of_the_policy() -> None:
    images = {name: np.full((size[0], size[1], 3), size[0], np.uint8) for name, size in
              {"wrist": (30, 30), "corner": (36, 32)}.items()}  # fmt: skip
    seen = check_observation({"images": images, "state": [0, 0, 0], "instruction": ""}, CONFIG)
    assert [image[0, 0, 0] for image in seen.images] == [36, 30]


# Prompt.


def test_the_sequence_has_a_place_for_everything(prompt: Prompt) -> None:
    ids = prompt.ids("Open  the\tdrawer")
    slots = CONFIG.action.num_slots
    assert (ids == prompt.image_id).sum() == 2 * CONFIG.vision.num_patches
    assert (ids == prompt.proprio_id).sum() == 1
    assert ids[-1] == prompt.stop_id
    assert (ids[-1 - slots : -1] == SLOT_ID).all()
    np.testing.assert_array_equal(ids, prompt.ids("open the drawer"))
    assert prompt.slot_states(len(ids)) == slice(len(ids) - 2 - slots, len(ids) - 2)


@given(st.text(max_size=12))
def test_any_text_encodes_or_is_refused(text: str) -> None:
    prompt = Prompt(CONFIG, train_tokenizer(INSTRUCTIONS, 300, SPECIALS))
    try:
        ids = prompt.ids(text)
    except BitvlaError as error:
        assert not text.strip() or "shorten" in str(error) or "reserved" in str(error)  # noqa: PT017
        return
    assert ids.min() >= 0
    assert ids.max() < CONFIG.language.vocab_size
    assert (ids == prompt.image_id).sum() == 2 * CONFIG.vision.num_patches


@pytest.mark.parametrize("instruction", ["", "   ", "\n\t"])
def test_an_empty_instruction_is_refused(prompt: Prompt, instruction: object) -> None:
    with pytest.raises(BitvlaError, match="instruction is empty"):
        prompt.ids(instruction)  # type: ignore[arg-type]


def test_the_longest_instruction_is_accepted_and_no_longer_one(prompt: Prompt) -> None:
    limit = CONFIG.processing.prompt.max_instruction_tokens
    prompt.ids("q" * limit)
    with pytest.raises(BitvlaError, match=f"{limit + 1} tokens, the policy was trained for at most {limit}"):
        prompt.ids("q" * (limit + 1))


def test_an_instruction_without_end_is_not_counted_in_tokens(prompt: Prompt) -> None:
    """It would take the one worker of a server for a minute, and every robot with it."""
    with pytest.raises(BitvlaError, match="20000 characters"):
        prompt.ids("x" * 20_000)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<proprio_pad>", "<|IMAGE_PAD|>", "<|end_of_text|>", "<|pad|>"])
def test_special_tokens_cannot_be_smuggled_in(prompt: Prompt, token: str) -> None:
    with pytest.raises(BitvlaError, match="reserved tokens"):
        prompt.ids(f"open {token} the drawer")


def prompt_with(tokenizer: Tokenizer, config: PolicyConfig = CONFIG) -> Prompt:
    return Prompt(config, tokenizer)


def test_foreign_tokenizers_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BitvlaError, match=r"lacks the special token <\|image_pad\|>"):
        prompt_with(train_tokenizer(INSTRUCTIONS, 300, ["<|pad|>"]))
    small = msgspec.structs.replace(CONFIG, language=msgspec.structs.replace(CONFIG.language, vocab_size=100))
    with pytest.raises(BitvlaError, match="only 100 rows"):
        prompt_with(tokenizer, small)
    with pytest.raises(BitvlaError, match="has id 1"):
        prompt_with(train_tokenizer(INSTRUCTIONS, 300, ["<|pad|>", "<|image_pad|>", *SPECIALS[2:]]))


# Configurations.


@pytest.mark.parametrize(
    ("cameras", "message"),
    [
        ((), "at least one camera"),
        ((Camera(name="a", height=8, width=8),) * 2, "names one camera twice"),
        ((Camera(name="a", height=0, width=8),), "camera 'a'.height is 0"),
    ],
)
def test_impossible_cameras_are_refused(cameras: tuple[Camera, ...], message: str) -> None:
    with pytest.raises(BitvlaError, match=message):
        check(msgspec.structs.replace(CONFIG, processing=processing_config(cameras, 3, 4, 1)))


@pytest.mark.parametrize(
    ("section", "sizes", "message"),
    [
        ("language", {"hidden_size": 2048, "num_heads": 4}, r"language\.hidden_size 2048 .* more than 256"),
        ("vision", {"hidden_size": 514, "num_heads": 2}, r"vision\.hidden_size 514 .* more than 256"),
        ("flow", {"hidden_size": 258, "num_heads": 1}, r"action\.flow\.hidden_size 258 .* more than 256"),
        ("language", {"intermediate_size": (1 << 18) + 1}, r"language\.intermediate_size is 262145; .* 1 to 262144"),
        ("language", {"max_positions": (1 << 20) + 1}, r"language\.max_positions is 1048577; .* 1 to 1048576"),
    ],
)
def test_sizes_that_the_kernels_do_not_take_are_refused(section: str, sizes: dict[str, int], message: str) -> None:
    """Before training: packing would be too late."""
    changes = sizes if section == "flow" else {section: msgspec.structs.replace(getattr(CONFIG, section), **sizes)}
    with pytest.raises(BitvlaError, match=message):
        (flow_config if section == "flow" else tiny_config)(**changes)


@pytest.mark.parametrize(
    "template", ["{images}{instruction}", "{images}{images}<proprio_pad>{instruction}", "<proprio_pad>{instruction}",
                 "{images}<|image_pad|><proprio_pad>{instruction}", "{images}<proprio_pad><proprio_pad>{instruction}"],
)  # fmt: skip
def test_impossible_templates_are_refused(template: str) -> None:
    prompt = msgspec.structs.replace(CONFIG.processing.prompt, template=template)
    processing = msgspec.structs.replace(CONFIG.processing, prompt=prompt)
    with pytest.raises(BitvlaError, match=r"processing\.prompt\.template"):
        check(msgspec.structs.replace(CONFIG, processing=processing))
