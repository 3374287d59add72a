"""LeRobotDataset v3: round trips, and everything broken is named before it can spoil a training."""

import json
import os
import shutil
from dataclasses import replace

import av
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitvla.data import lerobot
from bitvla.data.check import check
from bitvla.data.lerobot import Conventions, LeRobotDataset, write_statistics
from bitvla.errors import BitvlaError
from datasets import make_writer, random_episode, write_dataset


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "d", episodes=6, batch=4)


@pytest.fixture
def dataset(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def test_what_is_written_is_read(written):
    data = LeRobotDataset(written)
    episodes = [random_episode(i) for i in range(6)]
    assert (data.num_episodes, data.num_frames, data.fps, data.cameras) == (6, 72, 10.0, ["front"])
    for name in ("state", "action", "environment_state"):
        key = name if name == "action" else f"observation.{name}"
        assert np.array_equal(getattr(data, name), np.concatenate([episode.vectors[key] for episode in episodes]))
    points = np.concatenate([episode.vectors["observation.keypoints"] for episode in episodes])
    assert np.array_equal(data.keypoints, points.reshape(72, 1, 2, 2))
    assert data.task_strings == [episode.task for episode in episodes]
    assert data.episode_ranges == [(i * 12, i * 12 + 12) for i in range(6)]
    assert data.episodes["recovery"].tolist() == [True, False, False, False, False, True]


def test_an_episode_of_other_vectors_or_pictures_is_refused(tmp_path):
    writer, episode = make_writer(tmp_path / "d"), random_episode(0)
    vectors = {key: values for key, values in episode.vectors.items() if key != "observation.state"}
    with pytest.raises(BitvlaError, match=r"'observation\.state' of episode 0 has the shape None; .* needs \(12, 3\)"):
        writer.append([type(episode)(episode.images, vectors, episode.task)])
    with pytest.raises(BitvlaError, match=r"images\.front' of episode 1 has the shape \(12, 20, 20, 3\); .* 16, 16, 3"):
        writer.append([episode, random_episode(1, size=20)])  # which the encoder would stretch
    with pytest.raises(BitvlaError, match="pictures of 'front' in episode 0 are float32, not uint8"):
        writer.append([replace(episode, images={"front": np.float32(episode.images["front"])})])
    with pytest.raises(BitvlaError, match=r"episode 1 for the dataset .* has no frame"):
        writer.append([episode, random_episode(1, length=0)])
    assert writer.num_episodes == 0


def test_a_batch_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """A machine that goes down after the rename of info.json has all that it counts."""
    synced, fsync = set(), os.fsync

    def noted(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", noted)
    make_writer(tmp_path / "d").append([random_episode(0)])
    written = [path for path in (tmp_path / "d").rglob("*.*") if path.is_file()]
    assert len(written) == 6
    assert {path.stat().st_ino for path in written} <= synced


def test_images_are_the_frames_in_order(tmp_path):
    """Smooth pictures survive the video codec nearly unchanged, so a swapped frame or channel would show."""
    ramp = np.linspace(0, 200, 32, dtype=np.uint8)
    picture = np.stack([np.tile(ramp, (32, 1)), np.tile(ramp[:, None], (1, 32)), np.full((32, 32), 40, np.uint8)], -1)
    episodes = []
    for i in range(3):
        episode = random_episode(i, length=5)
        frames = np.stack([np.roll(picture, 3 * (5 * i + t), axis=0) for t in range(5)])
        episodes.append(type(episode)({"front": frames}, episode.vectors, episode.task))
    writer = make_writer(tmp_path / "d", size=32)
    writer.append(episodes[:2])
    writer.append(episodes[2:])
    images = np.stack(LeRobotDataset(tmp_path / "d").images("front"))
    expected = np.concatenate([episode.images["front"] for episode in episodes])
    assert images.shape == expected.shape
    assert np.abs(images.astype(int) - expected).mean() < 8
    shifted = np.abs(images[1:].astype(int) - expected[:-1]).mean()
    assert shifted > 12


def call_observation_image(dataset):
    """As the single camera of `lerobot/pusht` on the Hub."""
    old, new = "observation.images.front", "observation.image"
    (dataset / "videos" / old).rename(dataset / "videos" / new)
    for path in [dataset / "meta" / "info.json", dataset / "meta" / "stats.json"]:
        path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))
    for path in (dataset / "meta" / "episodes").rglob("*.parquet"):
        pd.read_parquet(path).rename(columns=lambda name: name.replace(old, new)).to_parquet(path)


def test_a_single_camera_may_be_called_observation_image(dataset):
    frames = np.stack(LeRobotDataset(dataset).images("front"))
    call_observation_image(dataset)
    data = LeRobotDataset(dataset)
    assert data.cameras == ["image"]
    assert np.array_equal(np.stack(data.images("image")), frames)
    assert check(dataset).passed
    edit_table(dataset, EPISODES, lambda table: lost_a_frame(table, "observation.image"))
    with pytest.raises(BitvlaError, match="fewer frames of episode 0 than its table"):
        LeRobotDataset(dataset)


@pytest.mark.parametrize("shape", [[16, 16, 1], [1, 16, 16], [3, 16, 16]])
def test_pictures_of_any_channels_are_read_as_colours(dataset, shape):
    edit_feature(dataset, "observation.images.front", shape)
    data = LeRobotDataset(dataset)
    assert data.shape("front") == data.images("front")[0].shape == (16, 16, 3)


def test_statistics_are_those_of_all_frames(written):
    data = LeRobotDataset(written)
    np.testing.assert_allclose(data.stats["action"]["q01"], np.quantile(data.action.astype(float), 0.01, axis=0))
    np.testing.assert_allclose(data.stats["observation.state"]["mean"], data.state.astype(float).mean(0))


@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_any_lengths_round_trip(tmp_path_factory, lengths):
    root = tmp_path_factory.mktemp("lengths") / "d"
    make_writer(root).append([random_episode(i, length) for i, length in enumerate(lengths)])
    data = LeRobotDataset(root)
    assert [end - begin for begin, end in data.episode_ranges] == lengths
    assert len(data.images("front")) == sum(lengths)


def test_an_interrupted_batch_leaves_the_dataset_as_it_was(dataset, monkeypatch):
    before = LeRobotDataset(dataset).action

    def full_disk(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lerobot, "_write_json", full_disk)
    with pytest.raises(OSError, match="No space"):
        make_writer(dataset).append([random_episode(6)])
    monkeypatch.undo()
    assert np.array_equal(LeRobotDataset(dataset).action, before)
    make_writer(dataset).append([random_episode(6)])
    assert LeRobotDataset(dataset).num_episodes == 7


def edit_info(root, **changes):
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_feature(root, key, shape):
    """Another shape of a feature, or None to have no such feature."""
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    feature = features.pop(key)
    edit_info(root, features=features if shape is None else features | {key: feature | {"shape": shape}})


EPISODES, TASKS = "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"


def edit_frames(root, edit):
    edit_table(root, "data/chunk-000/file-000.parquet", edit)


def edit_table(root, name, edit):
    path = root / name
    table = pd.read_parquet(path)
    edit(table).to_parquet(path)


def poisoned(table):
    table.at[30, "action"] = np.array([np.nan, 0, 0], np.float32)
    return table


def edit_frame(root, frame, column, value):
    edit_frames(root, lambda table: table.assign(**{column: table[column].where(table.index != frame, value)}))


def lost_a_frame(table, key="observation.images.front"):
    """The encoder did, of the first episode: the second one begins a frame early."""
    begin = f"videos/{key}/from_timestamp"
    return table.assign(**{begin: table[begin].where(table["episode_index"] != 1, table[begin] - 0.1)})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "meta" / "info.json").unlink(), "not a LeRobotDataset"),
        (lambda root: (root / "meta" / "info.json").write_text("{"), "not a LeRobotDataset"),
        (lambda root: edit_info(root, codebase_version="v2.1"), "v2.1, needed is v3.0"),
        (lambda root: edit_info(root, total_frames=71), "72 frames in its tables, info.json says 71"),
        (lambda root: edit_info(root, total_episodes=9), "lists 6 episodes, info.json says 9"),
        (lambda root: edit_info(root, total_episodes=0), "no episode"),
        (lambda root: (root / "data" / "chunk-000" / "file-001.parquet").unlink(), "file-001.parquet cannot be read"),
        (lambda root: (root / "data" / "chunk-000" / "file-000.parquet").write_bytes(b"PAR1"), "cannot be read"),
        (lambda root: edit_frames(root, poisoned), "'action' of episode 2 .* not finite"),
        (lambda root: edit_frames(root, lambda table: table.iloc[::-1]), "episode 0 .* is broken"),
        (lambda root: edit_frames(root, lambda table: table.drop(columns="action")), "no 'action'"),
        (
            lambda root: edit_frames(root, lambda table: table.drop(columns="task_index")),
            "lacks the column 'task_index'",
        ),
        (
            lambda root: edit_table(root, EPISODES, lambda table: table.drop(columns="length")),
            "lacks the column 'length'",
        ),
        (lambda root: edit_table(root, TASKS, lambda table: table[:1]), "no sentence for the task 1 of episode 1"),
        (
            lambda root: edit_table(root, TASKS, lambda table: table.reset_index(drop=True)),
            "no sentence for the task 0",
        ),
        (lambda root: edit_frame(root, 30, "frame_index", 7), "episode 2 .* frames are not numbered from 0 on"),
        (lambda root: edit_frame(root, 30, "task_index", 1), r"episode 2 .* has 2 tasks \(frame 6 .*; make each part"),
        (
            lambda root: edit_table(
                root, EPISODES, lambda table: table.assign(**{"data/file_index": [0.0, np.nan, 0, 0]})
            ),
            "lists no 'data/file_index' of episode 1",
        ),
        (lambda root: edit_table(root, EPISODES, lost_a_frame), "fewer frames of episode 0 than its table"),
        (lambda root: edit_info(root, total_episodes=5), "its episodes have 60 frames, its tables 72"),
        (lambda root: edit_info(root, fps=0), "has an fps of 0: write the rate"),
        (lambda root: edit_info(root, features={"action": {"shape": [3]}}), "missing required field `dtype`"),
        (lambda root: edit_info(root, video_path=None), "no video_path"),
        (lambda root: edit_feature(root, "observation.images.front", None), "no camera: .* called observation.images"),
        (lambda root: edit_feature(root, "observation.images.front", [16, 16]), r"shape \[16, 16\]; it must be height"),
        (lambda root: edit_feature(root, "observation.state", None), "has no 'observation.state'$"),
    ],
)
def test_a_broken_dataset_is_refused(dataset, break_it, message):
    break_it(dataset)
    with pytest.raises(BitvlaError, match=message):
        LeRobotDataset(dataset)


def test_one_value_may_be_a_plain_number(dataset):
    """As LeRobot stores a feature of the shape (1,)."""
    for name in ("data/chunk-000/file-000.parquet", "data/chunk-000/file-001.parquet"):
        edit_table(dataset, name, lambda table: table.assign(action=[row[0] for row in table["action"]]))
    edit_feature(dataset, "action", [1])
    assert np.array_equal(
        LeRobotDataset(dataset).action, np.concatenate([random_episode(i).vectors["action"][:, :1] for i in range(6)])
    )


def test_a_picture_that_never_reached_the_disk_is_decoded_again(dataset):
    before = LeRobotDataset(dataset).images("front")[3]
    for path in (dataset / ".cache").rglob("*.rgb"):
        path.write_bytes(path.read_bytes()[:-3000])  # as where the machine went down
    images = LeRobotDataset(dataset).images("front")
    assert np.array_equal(images[3], before)
    assert images[11].shape == (16, 16, 3)


def test_pictures_of_a_video_that_was_replaced_are_decoded_again(dataset, tmp_path):
    before = LeRobotDataset(dataset).images("front")[3]
    writer, film = make_writer(tmp_path / "other"), "videos/observation.images.front/chunk-000/file-000.mp4"
    writer.append([random_episode(i + 6) for i in range(4)])
    shutil.copy(tmp_path / "other" / film, dataset / film)
    after = LeRobotDataset(dataset).images("front")[3]
    assert np.array_equal(after, LeRobotDataset(tmp_path / "other").images("front")[3])
    assert not np.array_equal(after, before)
    (cached,) = (dataset / ".cache").rglob("*.rgb")
    LeRobotDataset(dataset)
    assert cached.exists()


def test_pictures_of_a_dataset_that_grew_make_room(dataset):
    def folders():
        return {path.name for path in (dataset / ".cache").iterdir()}

    (dataset / ".cache" / "huggingface").mkdir(parents=True)  # as a download leaves
    LeRobotDataset(dataset).images("front")[0]
    (old,) = folders() - {"huggingface"}
    LeRobotDataset(dataset, Conventions(rotate180=True)).images("front")[0]
    assert len(folders()) == 3  # others of the same data stay
    make_writer(dataset).append([random_episode(6)])
    LeRobotDataset(dataset).images("front")[0]
    (new,) = folders() - {"huggingface"}
    assert new != old
    write_statistics(dataset)
    LeRobotDataset(dataset)
    assert folders() == {"huggingface", new}


def test_files_beyond_the_first_chunk_are_kept_apart(tmp_path, monkeypatch):
    """By writers that are opened anew, as each run of a robot has one."""
    monkeypatch.setattr(lerobot, "_FILES_PER_CHUNK", 2)
    for i in range(4):
        make_writer(tmp_path / "d").append([random_episode(i)])
    episodes = [random_episode(i).vectors["observation.state"] for i in range(4)]
    assert np.array_equal(LeRobotDataset(tmp_path / "d").state, np.concatenate(episodes))


def test_a_truncated_video_is_refused_and_leaves_no_cache(dataset):
    video = dataset / "videos" / "observation.images.front" / "chunk-000" / "file-001.mp4"
    short = dataset / "videos" / "observation.images.front" / "chunk-000" / "file-000.mp4"
    shutil.copy(video, short)
    with pytest.raises(BitvlaError, match="has 0 of the 12 frames of episode 2: it is truncated"):
        LeRobotDataset(dataset).images("front")[24]
    video.write_bytes(video.read_bytes()[:200])
    shutil.copy(video, short)
    with pytest.raises(BitvlaError, match="cannot be decoded"):
        LeRobotDataset(dataset).images("front")[0]
    assert not list((dataset / ".cache").rglob("*-000000*"))
    with av.open(str(short), "w") as container:
        sound, samples = container.add_stream("aac", rate=8000), np.zeros((1, 1024), np.float32)
        samples = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
        samples.sample_rate = 8000
        container.mux([*sound.encode(samples), *sound.encode()])
    with pytest.raises(BitvlaError, match="holds no pictures"):
        LeRobotDataset(dataset).images("front")[0]
    with pytest.raises(BitvlaError, match="no camera 'wrist', it has front"):
        LeRobotDataset(dataset).images("wrist")


def test_pictures_of_a_dataset_that_cannot_be_written_to_are_kept_elsewhere(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert LeRobotDataset(dataset).images("front")[0].shape == (16, 16, 3)
    assert list((tmp_path / "caches").rglob("front-000000.rgb"))
    assert not (dataset / ".cache").exists()


def test_sentences_may_be_a_column(dataset):
    sentences = LeRobotDataset(dataset).task_strings
    edit_table(dataset, TASKS, lambda table: table.reset_index())
    assert LeRobotDataset(dataset).task_strings == sentences


@pytest.mark.parametrize("value", [None, float("nan"), "constant"])
def test_missing_or_constant_statistics_are_refused(dataset, value):
    path = dataset / "meta" / "stats.json"
    stats = json.loads(path.read_text())
    if value is None:
        del stats["action"]["q99"]
    else:
        stats["action"]["q99"][1] = stats["action"]["q01"][1] if value == "constant" else value
    path.write_text(json.dumps(stats))
    with pytest.raises(BitvlaError, match="action"):
        LeRobotDataset(dataset).stats  # noqa: B018


@pytest.mark.parametrize("content", ["[1]", "{", '{"action": {"q01": 1, "q99": null}}', None])
def test_unreadable_statistics_are_named(dataset, content):
    path = dataset / "meta" / "stats.json"
    path.write_text(content) if content else path.unlink()
    with pytest.raises(BitvlaError, match="run: bitvla data statistics"):
        LeRobotDataset(dataset).stats  # noqa: B018


@pytest.mark.parametrize("content", ["[1]", "{", "", None, '{"observation.images.front": {"min": [0]}}'])
def test_statistics_are_computed_where_none_can_be_read(dataset, content):
    """It is what `test_unreadable_statistics_are_named` tells to do."""
    path = dataset / "meta" / "stats.json"
    path.write_text(content) if content is not None else path.unlink()
    write_statistics(dataset)
    assert {"q01", "q10", "q50", "q90", "q99"} < LeRobotDataset(dataset).stats["action"].keys()
    assert ("observation.images.front" in LeRobotDataset(dataset).stats) == ("front" in str(content))


def test_statistics_of_uneven_columns_are_refused(dataset):
    """And those of a table in every frame, as lerobot's Array2D, have its shape."""
    edit_info(dataset, features=LeRobotDataset(dataset).features | {"force": {"dtype": "float32", "shape": [2, 3]}})
    for name in ("data/chunk-000/file-000.parquet", "data/chunk-000/file-001.parquet"):
        edit_table(dataset, name, lambda table: table.assign(force=[np.ones((2, 3)).tolist()] * len(table)))
    write_statistics(dataset)
    assert json.loads((dataset / "meta" / "stats.json").read_text())["force"]["q01"] == [[1.0] * 3] * 2
    edit_frames(dataset, lambda table: table.assign(force=[np.zeros(1 + i % 2) for i in range(len(table))]))
    with pytest.raises(BitvlaError, match="'force' has not the same number of values in every frame"):
        write_statistics(dataset)


def test_another_recording_cannot_be_appended_to(dataset):
    with pytest.raises(BitvlaError, match="other features"):
        make_writer(dataset, size=32)
