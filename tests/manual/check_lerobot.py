"""Open a recorded dataset with the real `lerobot` package (0.4.4) and compare every kind of value with our reader.

Not part of the test suite: lerobot pins an older PyTorch than training uses. In an environment of its own:

    pip install lerobot==0.4.4 && pip install --no-deps . && python tests/manual/check_lerobot.py DATASET

Where torchvision has no video reader, frames are decoded with PyAV here, at the time stamps that lerobot asks for;
tables, tasks, statistics and time stamps are read by lerobot either way.
"""

import sys
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

from bitvla.data.lerobot import LeRobotDataset  # noqa: E402


def decode(path, timestamps, tolerance_s, backend=None):
    """Frames float32 (n, 3, H, W) in [0, 1] nearest to `timestamps` in seconds."""
    with av.open(str(path)) as container:
        frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    times = np.array([time for time, _ in frames])
    chosen = [int(np.abs(times - wanted).argmin()) for wanted in timestamps]
    assert all(abs(times[i] - wanted) < tolerance_s for i, wanted in zip(chosen, timestamps, strict=True))
    return torch.stack([torch.from_numpy(frames[i][1]).permute(2, 0, 1) / 255 for i in chosen])


def main(root: Path) -> None:
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
