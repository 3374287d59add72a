"""Hold our reader and writer against the real `lerobot` package (0.4.4).

A recorded dataset is opened by both, and every kind of value compared. Then lerobot writes two in the layout of its
LIBERO data (cameras `image` and `image2`, a state of 8, an action of 7; as videos, and as pictures in the tables), and
ours reads them, under other names of the cameras.

Not part of the test suite: lerobot pins an older PyTorch than training uses. In an environment of its own:

    pip install lerobot==0.4.4 && pip install --no-deps . && python tests/manual/check_lerobot.py DATASET

Where torchvision has no video reader, frames are decoded with PyAV here, at the time stamps that lerobot asks for;
tables, tasks, statistics and time stamps are read by lerobot either way.
"""

import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import torch

# Where torchvision's compiled operators do not load, it fails only because it describes them to the compiler.
describe = torch.library.register_fake
torch.library.register_fake = lambda *_, **__: lambda function: function
import torchvision  # noqa: E402

torch.library.register_fake = describe

from lerobot.datasets import lerobot_dataset as lerobot  # noqa: E402

from bitvla.data.lerobot import Conventions, LeRobotDataset  # noqa: E402


def decode(path, timestamps, tolerance_s, backend=None):
    """Frames float32 (n, 3, H, W) in [0, 1] nearest to `timestamps` in seconds."""
    with av.open(str(path)) as container:
        frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    times = np.array([time for time, _ in frames])
    chosen = [int(np.abs(times - wanted).argmin()) for wanted in timestamps]
    assert all(abs(times[i] - wanted) < tolerance_s for i, wanted in zip(chosen, timestamps, strict=True))
    return torch.stack([torch.from_numpy(frames[i][1]).permute(2, 0, 1) / 255 for i in chosen])


def write(root: Path, videos: bool, episodes: int = 3, length: int = 25) -> list[dict]:
    """A dataset of lerobot's own making, and the frames it was made of."""
    kind = {"dtype": "video" if videos else "image", "shape": (64, 64, 3), "names": ["height", "width", "channel"]}
    features = {
        "observation.images.image": kind,
        "observation.images.image2": kind,
        "observation.state": {"dtype": "float32", "shape": (8,), "names": {"motors": [f"s{i}" for i in range(8)]}},
        "action": {"dtype": "float32", "shape": (7,), "names": ["action"]},
    }
    dataset = lerobot.LeRobotDataset.create("local/check", fps=10, features=features, root=root, use_videos=videos)
    rng, frames = np.random.default_rng(0), []
    for episode in range(episodes):
        for step in range(length + episode):
            ramp = np.tile(np.arange(64, dtype=np.uint8) * 2, (64, 1))
            frames.append(
                {
                    "observation.images.image": np.stack([np.roll(ramp, 3 * step + 20 * episode, axis=1)] * 3, -1),
                    "observation.images.image2": np.stack([np.roll(ramp.T, 3 * step + 20 * episode, axis=0)] * 3, -1),
                    "observation.state": rng.normal(size=8).astype(np.float32),
                    "action": rng.normal(size=7).astype(np.float32),
                }
            )
            dataset.add_frame(frames[-1] | {"task": f"task {episode % 2}"})
        dataset.save_episode()
    dataset.finalize()
    return frames


def check_theirs(root: Path, videos: bool) -> None:
    frames = write(root, videos)
    ours = LeRobotDataset(root, Conventions(cameras={"full": "image", "wrist": "image2"}, control_hz=20))
    assert (ours.fps, ours.num_episodes, ours.num_frames) == (20.0, 3, len(frames))
    assert ours.task_strings == ["task 0", "task 1", "task 0"]
    assert np.array_equal(ours.state, [frame["observation.state"] for frame in frames])
    assert np.array_equal(ours.action, [frame["action"] for frame in frames])
    for camera, key in (("full", "image"), ("wrist", "image2")):
        stored = np.stack([frame[f"observation.images.{key}"] for frame in frames])
        off = np.abs(np.stack(ours.images(camera)).astype(int) - stored)
        # Lossy video moves the edge of the ramp a little; a frame too late would move it by three columns.
        assert np.median(off.reshape(len(frames), -1), axis=1).max() <= (3 if videos else 0), camera
    print(f"lerobot's {'videos' if videos else 'pictures in tables'}: {ours.num_frames} frames are read as written")


def main(root: Path) -> None:
    for videos in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            check_theirs(Path(folder) / "written", videos)
    if not hasattr(getattr(torchvision, "io", None), "VideoReader"):
        lerobot.decode_video_frames = decode
    theirs = lerobot.LeRobotDataset("local/check", root=root)
    ours = LeRobotDataset(root)
    assert len(theirs) == ours.num_frames
    assert theirs.num_episodes == ours.num_episodes
    assert theirs.meta.fps == ours.fps
    for index in np.linspace(0, ours.num_frames - 1, 25).astype(int):
        item = theirs[int(index)]
        assert np.array_equal(item["observation.state"].numpy(), ours.state[index])
        assert np.array_equal(item["action"].numpy(), ours.action[index])
        assert int(item["episode_index"]) == ours.episode_index[index]
        assert item["task"] == ours.task_strings[ours.episode_index[index]]
        for camera in ours.cameras:
            image = item[f"observation.images.{camera}"].permute(1, 2, 0).numpy() * 255
            assert np.abs(image - ours.images(camera)[index]).max() <= 1
    for key in ("action", "observation.state"):
        np.testing.assert_allclose(np.ravel(theirs.meta.stats[key]["mean"]), ours.stats[key]["mean"], rtol=1e-5)
    print(f"lerobot reads {ours.num_episodes} episodes, {ours.num_frames} frames: values, tasks and pictures agree")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
