"""LeRobotDataset v3: round trips, and everything broken is named before it can spoil a training."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitvla.data.lerobot import LeRobotDataset
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


def test_an_episode_that_lacks_a_vector_is_refused(tmp_path):
    writer, episode = make_writer(tmp_path / "d"), random_episode(0)
    vectors = {key: values for key, values in episode.vectors.items() if key != "observation.state"}
    with pytest.raises(BitvlaError, match=r"episode 0 has the vectors action, .* holds action, .*observation\.state"):
        writer.append([type(episode)(episode.images, vectors, episode.task)])
    assert writer.num_episodes == 0


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
    from bitvla.data import lerobot

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
        (lambda root: edit_info(root, fps=0), "has an fps of 0: write the rate"),
        (lambda root: edit_info(root, features={"action": {"shape": [3]}}), "missing required field `dtype`"),
        (lambda root: edit_info(root, video_path=None), "no video_path"),
    ],
)
def test_a_broken_dataset_is_refused(dataset, break_it, message):
    break_it(dataset)
    with pytest.raises(BitvlaError, match=message):
        LeRobotDataset(dataset)


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


def test_another_recording_cannot_be_appended_to(dataset):
    with pytest.raises(BitvlaError, match="other features"):
        make_writer(dataset, size=32)
