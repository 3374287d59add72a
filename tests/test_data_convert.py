"""LIBERO's HDF5 and RLDS's TFRecords become the dataset they hold, whole, or are refused by name."""

import io
import json
import struct

import h5py
import numpy as np
import pytest
from PIL import Image

from bitvla.cli import main
from bitvla.data import rlds
from bitvla.data.convert import convert, moving
from bitvla.data.lerobot import LeRobotDataset
from bitvla.errors import BitvlaError

SENTENCE = "pick up the black bowl"


def actions(length):
    """Moves in every step but the second and the last; in the third the gripper closes without a motion."""
    values = np.random.default_rng(length).uniform(0.1, 1, (length, 7)).astype(np.float32)
    values[:, 6] = np.where(np.arange(length) < 2, -1, 1)
    values[[1, 2, -1], :6] = 0
    return values


def picture(number, size=16):
    """Light at the top left, so that it tells how it is turned, and darker with every number."""
    frame = np.zeros((size, size, 3), np.uint8)
    frame[: size // 2, : size // 2] = 250 - 12 * number
    return frame


def shows(frame, number):
    """Whether a frame that was compressed is the picture of that number, and upright."""
    light, dark = frame[2:6, 2:6].mean(), frame[10:14, 10:14].mean()
    return abs(light - (250 - 12 * number)) < 6 and dark < 10


def write_hdf5(folder, name="bowl_demo.hdf5", lengths=(6, 8)):
    """A file in LIBERO's layout; its demonstrations are numbered without leading zeros."""
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / name, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"problem_name": "p", "language_instruction": SENTENCE})
        for number, length in reversed(list(zip((2, 10), lengths, strict=True))):
            demo = data.create_group(f"demo_{number}")
            demo["actions"] = actions(length).astype(np.float64)
            obs = demo.create_group("obs")
            obs["ee_states"] = np.arange(length * 6, dtype=np.float64).reshape(length, 6)
            obs["gripper_states"] = np.full((length, 2), number, np.float64)
            obs["agentview_rgb"] = np.stack([picture(step) for step in range(length)])
            obs["eye_in_hand_rgb"] = np.stack([picture(10 + step) for step in range(length)])
    return folder


def tfrecord(data):
    length = struct.pack("<Q", len(data))
    checksums = (struct.pack("<I", rlds._checksum(part)) for part in (length, data))
    return length + next(checksums) + data + next(checksums)


def example(**features):
    """A `tf.train.Example`; "__" in a name stands for "/"."""
    message = rlds._EXAMPLE()
    for key, values in features.items():
        entry = message.features.feature.add(key=key.replace("__", "/"))
        kind = "float_list" if values and isinstance(values[0], float) else "bytes_list"
        getattr(entry.value, kind).value.extend(values)
    return message.SerializeToString()


def jpeg(frame):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_rlds(folder, lengths=(6, 8), **changes):
    """A TFDS folder with a record an episode, as `modified_libero_rlds` has them."""
    version = folder / "libero_spatial_no_noops" / "1.0.0"
    version.mkdir(parents=True, exist_ok=True)
    for shard, length in enumerate(lengths):
        frames = [picture(step) for step in range(length)]
        features = {
            "steps__observation__image": [jpeg(frame[::-1, ::-1]) for frame in frames],
            "steps__observation__wrist_image": [jpeg(frame) for frame in frames],
            "steps__observation__state": np.arange(length * 8, dtype=np.float32).tolist(),
            "steps__action": actions(length).ravel().tolist(),
            "steps__language_instruction": [SENTENCE.encode()] * length,
        } | changes
        name = f"libero_spatial-train.tfrecord-{shard:05d}-of-{len(lengths):05d}"
        (version / name).write_bytes(tfrecord(example(**{k: v for k, v in features.items() if v is not None})))
    return folder


def test_libero_hdf5_becomes_a_dataset(tmp_path):
    out = tmp_path / "out"
    assert convert(write_hdf5(tmp_path / "bowl"), out)["episodes"] == 2
    data = LeRobotDataset(out)
    assert (data.cameras, data.fps, data.task_strings) == (["full", "wrist"], 20.0, [SENTENCE, SENTENCE])
    assert data.episode_ranges == [(0, 6), (6, 14)]  # demo_2 before demo_10
    np.testing.assert_array_equal(data.action, np.concatenate([actions(6), actions(8)]))
    assert data.state[7].tolist() == [6, 7, 8, 9, 10, 11, 10, 10]
    for camera, first in (("full", 0), ("wrist", 10)):
        for frame, step in ((0, 0), (6, 0), (13, 7)):
            assert shows(data.images(camera)[frame], first + step), (camera, frame)
    assert data.features["observation.state"]["names"][0] == "eef_x"
    assert data.episodes["source"].tolist() == ["bowl_demo.hdf5:demo_2", "bowl_demo.hdf5:demo_10"]


def test_no_ops_are_dropped_as_openvla_oft_does(tmp_path):
    assert moving(actions(6)).tolist() == [0, 2, 3, 4]  # the third step moves the gripper alone
    assert moving(np.zeros((3, 7), np.float32)).tolist() == []  # nor does a first step without motion count
    summary = convert(write_hdf5(tmp_path / "bowl"), tmp_path / "out", drop_no_ops=True)
    assert summary["no_ops_dropped_now"] == 4
    data = LeRobotDataset(tmp_path / "out")
    assert data.episode_ranges == [(0, 4), (4, 10)]
    assert shows(data.images("full")[1], 2)


def test_rlds_becomes_a_dataset_turned_back(tmp_path):
    convert(write_rlds(tmp_path / "rlds"), tmp_path / "out", rotate180=True)
    data = LeRobotDataset(tmp_path / "out")
    np.testing.assert_array_equal(data.action, np.concatenate([actions(6), actions(8)]))
    assert data.state.shape == (14, 8)
    assert data.state[7].tolist() == list(range(8, 16))
    assert shows(data.images("full")[13], 7)
    assert shows(data.images("wrist")[13][::-1, ::-1], 7)
    assert json.loads((tmp_path / "out" / "meta" / "conversion.json").read_text())["rotate180"] is True


def test_cameras_are_named_by_the_caller(tmp_path):
    convert(write_rlds(tmp_path / "rlds"), tmp_path / "out", cameras={"front": "image"}, fps=5)
    data = LeRobotDataset(tmp_path / "out")
    assert (data.cameras, data.fps) == (["front"], 5.0)


def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("bitvla.data.convert._BATCH_BYTES", 1)
    source = write_hdf5(tmp_path / "bowl")
    read = []

    def stop(done, total, last):
        read.append((done, total, last))
        if len(read) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=stop)
    assert LeRobotDataset(tmp_path / "out").num_episodes == 1
    assert convert(source, tmp_path / "out", progress=stop)["converted_now"] == 1
    assert read == [(1, 2, "bowl_demo.hdf5:demo_2"), (2, 2, "bowl_demo.hdf5:demo_10")]
    convert(source, tmp_path / "whole")
    whole, parts = (LeRobotDataset(tmp_path / name) for name in ("whole", "out"))
    assert np.array_equal(whole.action, parts.action)
    assert convert(source, tmp_path / "out")["converted_now"] == 0
    with pytest.raises(BitvlaError, match="holds a conversion with other settings"):
        convert(source, tmp_path / "out", drop_no_ops=True)


def cut(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def edit_hdf5(path, edit):
    with h5py.File(path, "a") as file:
        edit(file["data"]["demo_10"])


def set_nan(demo):
    demo["actions"][3, 2] = np.nan


def shorten(demo):
    values = demo["actions"][:5]
    del demo["actions"]
    demo["actions"] = values


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, r"bowl_demo.hdf5 is truncated or no file of LIBERO"),
        (lambda path: h5py.File(path, "w").create_group("data").file.close(), "bowl_demo.hdf5 holds no demonstration"),
        (lambda path: h5py.File(path, "w").create_dataset("data", data=[1.0]).file.close(), "no file of LIBERO"),
        (lambda path: path.write_bytes(b"no"), r"bowl_demo.hdf5 is truncated or no file of LIBERO"),
        (lambda path: edit_hdf5(path, set_nan), r"'action' of bowl_demo.hdf5:demo_10 is not finite"),
        (lambda path: edit_hdf5(path, lambda demo: demo["obs"].pop("agentview_rgb")),
         "demo_10 has no camera 'agentview_rgb', it has eye_in_hand_rgb"),
        (lambda path: edit_hdf5(path, lambda demo: demo["obs"].pop("ee_states")), "ee_states"),
        (lambda path: edit_hdf5(path, shorten), "demo_10 is half-written: it has .*'action': 5"),
    ],
)  # fmt: skip
def test_a_damaged_hdf5_file_is_refused(tmp_path, spoil, message):
    source = write_hdf5(tmp_path / "bowl")
    spoil(source / "bowl_demo.hdf5")
    with pytest.raises(BitvlaError, match=message):
        convert(source, tmp_path / "out")


def grey(values, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def test_grey_pictures_of_16_bits_keep_their_range(tmp_path):
    values = np.full((16, 16), 128 << 8, np.uint16)
    convert(write_rlds(tmp_path / "rlds", lengths=(6,), steps__observation__image=[grey(values)] * 6), tmp_path / "out")
    assert abs(LeRobotDataset(tmp_path / "out").images("full")[0].mean() - 128) < 3


def test_notes_of_the_hub_are_no_records(tmp_path):
    """`hf download --local-dir` leaves some, of nearly the same names."""
    source = write_rlds(tmp_path / "rlds")
    notes = source / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for path in source.rglob("*.tfrecord*"):
        (notes / f"{path.name}.metadata").write_text("etag")
    assert convert(source, tmp_path / "out")["episodes"] == 2


def test_a_part_of_the_records_is_refused(tmp_path):
    source = write_rlds(tmp_path / "rlds")
    first, second = sorted(source.rglob("*.tfrecord*"))
    second.unlink()
    with pytest.raises(BitvlaError, match=r"lacks some of the 2 files libero_spatial-train.tfrecord-\*: fetch them"):
        convert(source, tmp_path / "out")
    assert convert(first, tmp_path / "out")["episodes"] == 1


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("changes", "spoil", "message"),
    [
        ({}, cut, "is truncated or damaged; copy it again"),
        ({}, flip, "is truncated or damaged; copy it again"),
        ({"steps__observation__image": None}, None, "has no 'steps/observation/image', it has .*wrist_image"),
        ({"steps__action": [0.5] * 41}, None, "'steps/action' in .* has 41 numbers for 6 steps"),
        ({}, lambda path: path.write_bytes(b""), "00000-of-00001 holds no demonstration; copy it again"),
        ({"steps__observation__image": [b"no picture"] * 6}, None, "step 0 of 'image' in .* its format is not known"),
        ({"steps__observation__image": [grey(np.zeros((n, 8), np.uint8)) for n in range(3, 9)]}, None, "several sizes"),
        ({"steps__observation__image": []}, None, "'image' in .* has no pictures"),
        ({"steps__observation__state": [float("nan")] * 48}, None, "'observation.state' of .*:0 is not finite"),
        ({"steps__language_instruction": [b" "] * 6}, None, "tfrecord-00000-of-00001:0 has no instruction"),
        ({"steps__language_instruction": []}, None, "tfrecord-00000-of-00001:0 has no instruction"),
    ],
)
def test_damaged_records_are_refused(tmp_path, changes, spoil, message):
    source = write_rlds(tmp_path / "rlds", lengths=(6,), **changes)
    if spoil is not None:
        spoil(next(source.rglob("*.tfrecord*")))
    with pytest.raises(BitvlaError, match=message):
        convert(source, tmp_path / "out")


def test_a_disk_that_was_full_at_first_is_gone_on_with(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    source = write_hdf5(tmp_path / "bowl")
    with pytest.raises(BitvlaError, match="No space left"):
        convert(source, tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "out" / "meta" / ".conversion.json.7.tmp").touch()  # as of a process that was killed
    assert convert(source, tmp_path / "out")["episodes"] == 2


def test_a_source_that_changed_is_not_gone_on_with(tmp_path):
    """More of it is found in another order."""
    source = write_hdf5(tmp_path / "source", "m_demo.hdf5")
    convert(source, tmp_path / "out")
    write_hdf5(source, "a_demo.hdf5")
    with pytest.raises(BitvlaError, match="no longer begins with the 2 demonstrations that"):
        convert(source, tmp_path / "out")


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(BitvlaError, match=r"out cannot be locked \(Function not implemented\); choose"):
        convert(write_hdf5(tmp_path / "bowl"), tmp_path / "out")


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(BitvlaError, match="nowhere does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(BitvlaError, match="holds neither HDF5 files"):
        convert(tmp_path, tmp_path / "out")
    write_hdf5(tmp_path / "both")
    with pytest.raises(BitvlaError, match="holds both HDF5 files"):
        convert(write_rlds(tmp_path / "both"), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(BitvlaError, match="is not empty and holds no conversion"):
        convert(write_hdf5(tmp_path / "bowl"), tmp_path / "mine")


def test_the_command_converts_and_counts_again(tmp_path, capsys):
    source, out = write_hdf5(tmp_path / "bowl"), str(tmp_path / "out")
    options = ["--camera", "eye=eye_in_hand_rgb", "--fps", "10"]
    assert main(["data", "convert", str(source), out, *options, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["episodes"], summary["fps"]) == (2, 10)
    (tmp_path / "out" / "meta" / "stats.json").write_text("{}")
    with pytest.raises(BitvlaError, match="run: bitvla data statistics"):
        LeRobotDataset(out).stats  # noqa: B018
    assert main(["data", "statistics", out]) == 0
    data = LeRobotDataset(out)
    np.testing.assert_allclose(data.stats["action"]["q99"], np.quantile(data.action.astype(float), 0.99, axis=0))
    with pytest.raises(SystemExit) as stop:
        main(["data", "convert", "a", "b", "--camera", "eye"])
    assert stop.value.code == 2
