"""Datasets as they are published, and ones that are larger than the disk: read where they are, a part at a time."""

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from bitvla import progress
from bitvla.data.check import check
from bitvla.data.lerobot import Conventions, LeRobotDataset, write_statistics
from bitvla.data.pictures import Pictures
from bitvla.errors import BitvlaError
from bitvla.train import batches
from bitvla.train.loop import run
from datasets import write_dataset
from training import POLICY, losses_of, windows, write_config

EPISODE = 12 * 16 * 16 * 3  # decoded bytes of one of ours
CACHE = 10 * EPISODE
MAPPING = Conventions(cameras={"front": "image2"}, control_hz=20)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "random")


@pytest.fixture
def far(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a copy of `data` in fsspec's memory; what is decoded of it goes to a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    shared = MemoryFileSystem._open

    def open_apart(self: MemoryFileSystem, path: str, mode: str = "rb", **options: Any) -> Any:
        """Every reader has a position of its own, as in a store that is really far away."""
        file = shared(self, path, mode, **options)
        return io.BytesIO(file.getvalue()) if mode == "rb" else file

    monkeypatch.setattr(MemoryFileSystem, "_open", open_apart)
    memory = fsspec.filesystem("memory")
    for path in data.rglob("*.*"):
        if path.is_file() and ".cache" not in path.parts:
            memory.pipe(f"/bucket/random/{path.relative_to(data)}", path.read_bytes())
    yield "memory://bucket/random"
    memory.rm("/bucket", recursive=True)


def write_published(data: Path, out: Path) -> Path:
    """`data` as `HuggingFaceVLA/libero` is laid out: pictures as PNG in the tables, two cameras, no quantiles."""
    source = LeRobotDataset(data)
    info = json.loads((data / "meta" / "info.json").read_text())
    feature = {"dtype": "image", "shape": [16, 16, 3], "names": ["height", "width", "channel"], "fps": 20.0}
    hidden = ("observation.environment_state", "observation.keypoints", "observation.images.front")
    features = {key: value for key, value in info["features"].items() if key not in hidden}
    features["observation.state"]["names"] = {"motors": ["x", "y", "z"]}
    features["action"]["names"] = ["action"]
    features |= {"observation.images.image": feature, "observation.images.image2": feature}
    (out / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    (out / "meta" / "info.json").write_text(json.dumps(info | {"features": features, "video_path": None}))
    stats = json.loads((data / "meta" / "stats.json").read_text())
    kept = {
        key: {name: value for name, value in stats[key].items() if name[0] != "q"} for key in features if key in stats
    }
    (out / "meta" / "stats.json").write_text(json.dumps(kept))
    tasks = pd.read_parquet(data / "meta" / "tasks.parquet")
    tasks.rename_axis(None).to_parquet(out / "meta" / "tasks.parquet")
    begin = 0
    for path in sorted((data / "data").rglob("*.parquet")):
        table = pd.read_parquet(path).drop(columns=list(hidden[:2]))
        frames = [source.images("front")[i] for i in range(begin, begin + len(table))]
        begin += len(table)
        table["observation.images.image"] = [{"bytes": png(0 * frame), "path": None} for frame in frames]
        table["observation.images.image2"] = [{"bytes": png(frame[::-1, ::-1]), "path": None} for frame in frames]
        target = out / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(target, row_group_size=30)
        episodes = data / "meta" / "episodes" / path.relative_to(data / "data")
        rows = pd.read_parquet(episodes)
        rows = rows[[column for column in rows if not column.startswith(("videos", "stats"))]]
        rows.to_parquet(out / episodes.relative_to(data))
    return out


def png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def published(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(data, tmp_path_factory.mktemp("published") / "libero")


def test_published_layout_is_read_as_the_configuration_says(data, published):
    """Cameras under the robot's names, pictures as they were taken, at the rate of the actions."""
    ours = LeRobotDataset(data)
    theirs = LeRobotDataset(published, Conventions(cameras={"front": "image2"}, rotate180=True, control_hz=20))
    assert (theirs.cameras, theirs.fps) == (["front"], 20.0)
    assert np.array_equal(theirs.action, ours.action)
    assert theirs.task_strings == ours.task_strings
    for frame in (0, 35, 359):  # also across row groups and files
        assert np.array_equal(theirs.images("front")[frame], ours.images("front")[frame])
    assert np.array_equal(LeRobotDataset(published, MAPPING).images("front")[35], ours.images("front")[35][::-1, ::-1])
    assert LeRobotDataset(published).cameras == ["image", "image2"]


def test_published_data_train_once_they_have_quantiles(published, tmp_path):
    policy = POLICY.replace(
        "[policy]", "[data.libero]\ncameras = { front = 'image2' }\nrotate180 = true\n\n[policy]", 1
    )
    config = write_config(tmp_path, policy, keypoint_weight=0, auxiliary_weight=0, steps=1)
    copy = shutil.copytree(published, tmp_path / "libero")
    with pytest.raises(BitvlaError, match=r"lacks the quantiles q01 and q99 of 'observation.state'; run: bitvla data"):
        run("finetune", config, copy, tmp_path / "out")
    write_statistics(copy)
    run("finetune", config, copy, tmp_path / "out")
    cameras = json.loads((tmp_path / "out" / "config.json").read_text())["processing"]["cameras"]
    assert cameras == [{"name": "front", "height": 16, "width": 16}]


def test_published_data_are_checked(published):
    found = check(published)
    assert [camera.name for camera in found.cameras] == ["image", "image2"]
    assert "statistics" in {finding.check for finding in found.findings}


def grey16(stored: dict[str, Any]) -> dict[str, Any]:
    return {"bytes": png(np.full((16, 16), 128 << 8, np.uint16)), "path": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grey16, None),
        (lambda stored: {"bytes": None, "path": "images/7.png"}, "lacks a picture of episode 0"),
        (lambda stored: None, "lacks a picture of episode 0"),
        (lambda stored: {"bytes": stored["bytes"][:50], "path": None}, "cannot be read as an image"),
        (lambda stored: {"bytes": png(np.zeros((8, 9, 3), np.uint8)), "path": None}, "of 8 x 9 pixels in episode 0"),
    ],
)
def test_pictures_in_the_tables_are_read_or_named(published, tmp_path, change, message):
    """Greys of 16 bits keep their range; what cannot be read is also found by the check."""
    root, key = shutil.copytree(published, tmp_path / "libero"), "observation.images.image2"
    path = min((root / "data").rglob("*.parquet"))
    table = pd.read_parquet(path)
    table.at[3, key] = change(table.at[3, key])
    table.to_parquet(path)
    images = LeRobotDataset(root).images("image2")
    if message is None:
        assert (images[3] == 128).all()
        return
    with pytest.raises(BitvlaError, match=message):
        images[3]
    assert message in next(finding.value for finding in check(root).findings if finding.check == "video")


@pytest.mark.parametrize(
    ("conventions", "message"),
    [
        (
            Conventions(cameras={"front": "imgae"}),
            r"data.libero.cameras names 'imgae', .* has image, image2; did you mean 'image'",
        ),
        (Conventions(cameras={"front": "observation.images.image"}), "cameras names 'observation.images.image'"),
        (Conventions(control_hz=0), "data.libero.control_hz must be positive, it is 0"),
    ],
)
def test_conventions_that_cannot_be_are_refused(published, conventions, message):
    with pytest.raises(BitvlaError, match=message):
        LeRobotDataset(published, conventions)


def test_conventions_of_data_that_are_not_given_are_refused(data, tmp_path):
    policy = POLICY.replace("[policy]", "[data.randon]\nrotate180 = true\n\n[policy]", 1)
    with pytest.raises(BitvlaError, match=r"describes the data 'randon', which is no --data.*random"):
        run("finetune", write_config(tmp_path, policy), data, tmp_path / "out")


def test_another_size_of_actions_is_refused(data, tmp_path):
    with pytest.raises(BitvlaError, match=r"random has vectors of 3, policy\.action\.dim is 4; change it"):
        windows(data, tmp_path, POLICY.replace(" dim = 3", " dim = 4"))


def test_far_data_give_the_same_batches(data, far, tmp_path):
    near, there = windows(data, tmp_path), windows(LeRobotDataset(far), tmp_path)
    for step in (0, 7):
        assert torch.equal(near[step].inputs.pixels, there[step].inputs.pixels)
        assert torch.equal(near[step].actions, there[step].actions)
    assert check(far).frames == 360


def test_a_bounded_cache_gives_the_same_batches_and_keeps_its_bound(data, far, tmp_path):
    """Every frame once an epoch, in groups of episodes; on disk never more than was allowed."""
    near, there = (windows(LeRobotDataset(root, cache_bytes=CACHE), tmp_path) for root in (data, far))
    steps = there.num_frames // 8
    seen = []
    for step in range(steps):
        frames = there.indices(step)
        seen += frames.tolist()
        if step % 9 == 0:
            assert torch.equal(near[step].inputs.pixels, there[step].inputs.pixels)
            rest(there)  # the loader deletes and writes while one counts
            assert on_disk(tmp_path / "caches") <= CACHE
    assert len(set(seen)) == len(seen)
    epoch = there._epoch(0)
    assert len(epoch.ends) > 10
    for frames, episodes in zip(np.split(epoch.frames, epoch.ends[:-1]), epoch.episodes, strict=True):
        assert set(there._episode[frames]) == set(episodes)
        assert len(episodes) * EPISODE <= CACHE // 4
    assert there._epoch(1).frames.tolist() != epoch.frames.tolist()
    rest(there)


def rest(windows: batches.Windows) -> None:
    if windows._loader is not None:
        windows._loader.join()


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.rgb"))


def test_what_a_killed_process_left_makes_room(tmp_path):
    frame = np.zeros((2, 2, 3), np.uint8)
    pictures = Pictures(
        lambda camera, episode: iter([frame]), folder=tmp_path, shapes={"front": frame.shape}, lengths=[1], limit=100
    )
    old, new = (tmp_path / f"front-000007.{pid}-1.tmp" for pid in (1, 2))
    for path in (old, new):
        path.write_bytes(bytes(100))
    os.utime(old, (0, 0))
    pictures.load(["front"], [0])
    assert new.exists()  # someone may be writing it
    assert not old.exists()


def test_decoding_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0)
    frame = np.zeros((2, 2, 3), np.uint8)
    shapes = {"front": frame.shape}
    pictures = Pictures(lambda camera, episode: iter([frame]), folder=tmp_path, shapes=shapes, lengths=[1, 1])
    for _ in range(2):
        pictures.load(["front"], range(2), "decoding front")
    assert [line[:18] for line in capsys.readouterr().err.splitlines()] == ["decoding front 1/2", "decoding front 2/2"]


def test_the_next_group_is_decoded_ahead(data, tmp_path):
    dataset = LeRobotDataset(data, cache_bytes=CACHE)
    ahead = windows(dataset, tmp_path)
    ahead.prepare(0)
    ahead.load_ahead(0)
    ahead._loader.join()
    wanted = [*ahead._epoch(0).episodes[0], *ahead._epoch(0).episodes[1]]
    assert all(Path(dataset.pictures._path("front", episode)).exists() for episode in wanted)


def test_a_mixture_draws_from_the_group_in_use(data, tmp_path):
    part = windows(LeRobotDataset(data, cache_bytes=CACHE), tmp_path)
    epoch, drawn = part._epoch(0), set()
    for position in range(part.num_frames):
        for place in (0.0, 0.5, 0.999):
            (frame,) = part._at(position, place)
            assert part._episode[frame] in epoch.episodes[epoch.group(position)]
            drawn.add(part._episode[frame])
    assert drawn == set(part._episode[part._frames])


def test_a_mixture_draws_the_same_in_passes_of_any_size(data, tmp_path):
    part = windows(LeRobotDataset(data, cache_bytes=CACHE), tmp_path)

    def drawn(batch_size: int) -> list[tuple[int, float]]:
        mixture = batches.Mixture([part], {}, part._config, batch_size=batch_size, seed=3)
        return [
            (position, place) for step in range(64 // batch_size) for _, position, place, _ in mixture._chosen(step)
        ]

    assert drawn(64) == drawn(16)


def test_a_run_streams_in_bounded_space(data, far, tmp_path):
    """Its loader is another process; a run that is resumed must not get another order of the frames."""
    config = write_config(tmp_path, keypoint_weight=0, auxiliary_weight=0)
    for source, name in ((data, "near"), (far, "far")):
        run("finetune", config, source, tmp_path / name, cache_bytes=CACHE)
    assert losses_of(tmp_path / "near") == losses_of(tmp_path / "far")
    assert 0 < on_disk(tmp_path / "caches") <= CACHE
    with pytest.raises(BitvlaError, match="another configuration, data or start"):
        run("finetune", config, far, tmp_path / "far", cache_bytes=CACHE + EPISODE)
    with pytest.raises(BitvlaError, match=r"too small for random: its share is 0\.06 MB, .* at least 1 MB"):
        run("finetune", config, far, tmp_path / "small", cache_bytes=7 * EPISODE)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("info.json", "info.json cannot be read .403 Forbidden."),
        ("file-000.parquet", "file-000.parquet cannot be read: 403 Forbidden"),
        ("stats.json", "stats.json cannot be read .403 Forbidden."),
        ("file-000.mp4", "file-000.mp4 cannot be decoded: 403 Forbidden"),
    ],
)
def test_what_a_service_says_is_one_line(far, monkeypatch, lost, message):
    """Not every one raises an OSError."""
    usual = MemoryFileSystem._open

    def refuse(self: MemoryFileSystem, path: str, mode: str = "rb", **options: Any) -> Any:
        if path.endswith(lost):
            raise RuntimeError("403 Forbidden\nsee the log")
        return usual(self, path, mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", refuse)
    with pytest.raises(BitvlaError, match=message):
        LeRobotDataset(far).images("front")[0]


def test_a_truncated_video_ends_a_streaming_run_with_one_line(far, tmp_path):
    memory, name = fsspec.filesystem("memory"), "/bucket/random/videos/observation.images.front/chunk-000/file-000.mp4"
    memory.pipe(name, memory.cat(name)[:5000])
    with pytest.raises(BitvlaError, match=r"file-000.mp4 (cannot be decoded|has \d+ of the 12 frames)") as error:
        list(batches.batches(windows(LeRobotDataset(far, cache_bytes=CACHE), tmp_path), range(30)))
    assert "Traceback" not in str(error.value)


def test_a_loader_that_is_killed_ends_a_run_with_one_line(data, tmp_path, monkeypatch):
    real = batches.Windows.__getitem__

    def killed(windows, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(windows, step)

    monkeypatch.setattr(batches.Windows, "__getitem__", killed)
    with pytest.raises(BitvlaError, match=r"ended from outside \(DataLoader worker .*\), .* fewer workers"):
        run("finetune", write_config(tmp_path), data, tmp_path / "out")


def test_fsspec_keeps_what_was_fetched(far, tmp_path, monkeypatch):
    """By the address alone, as fsspec chains file systems; where, its own configuration says."""
    monkeypatch.setitem(fsspec.config.conf, "simplecache", {"cache_storage": str(tmp_path / "kept")})
    data = LeRobotDataset(f"simplecache::{far}")
    assert (data.name, data.images("front")[0].shape) == ("random", (16, 16, 3))
    assert len(list((tmp_path / "kept").iterdir())) >= 5  # tables and a video


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://nothing/here", "not a LeRobotDataset"),
        ("gopher://bucket/data", "gopher://bucket/data cannot be reached"),
        ("somebody/data", "pip install huggingface_hub"),
        ("no-folder", "not a LeRobotDataset"),
    ],
)
def test_data_that_are_not_there_are_refused(address, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BitvlaError, match=message):
        LeRobotDataset(address)


def test_hub_ids_are_fetched(data, monkeypatch):
    asked = []
    fetch = lambda name, **options: asked.append((name, options)) or str(data)  # noqa: E731
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fetch))
    dataset = LeRobotDataset("somebody/libero")
    assert (dataset.num_episodes, dataset.name) == (30, "libero")
    assert asked == [("somebody/libero", {"repo_type": "dataset"})]
