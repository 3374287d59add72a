"""How far the chunks of one policy file are from those of another of the same robot, on recorded observations.

    python benchmarks/actions.py policy.safetensors int8.safetensors --data datasets/mt10
    python benchmarks/actions.py policy.safetensors policy.safetensors --data datasets/mt10 --prune 0.25

In normalised units, in which the training range of an action is 2, over the part of each chunk that is played.
"""

import argparse

import numpy as np

import bitvla
from bitvla.data.lerobot import LeRobotDataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="policy file")
    parser.add_argument("second", help="policy file")
    parser.add_argument("--data", required=True, help="folder of a LeRobot dataset")
    parser.add_argument("--episodes", type=int, default=60, help="episodes, drawn from all (default: 60)")
    parser.add_argument("--prune", type=float, default=0.0, help="share of image tokens that the second does without")
    arguments = parser.parse_args()
    first, second = bitvla.load(arguments.first, threads=1), bitvla.load(arguments.second, 1, arguments.prune)
    processing, dataset = first.config.processing, LeRobotDataset(arguments.data)
    images = {camera.name: dataset.images(camera.name) for camera in processing.cameras}
    differences = []
    for episode in np.random.default_rng(0).permutation(dataset.num_episodes)[: arguments.episodes]:
        for frame in range(*dataset.episode_ranges[episode], processing.execute_horizon):
            seen = {
                "images": {name: frames[frame] for name, frames in images.items()},
                "state": dataset.state[frame],
                "instruction": dataset.task_strings[episode],
            }
            chunks = [policy.act(seen)[: processing.execute_horizon] for policy in (first, second)]
            differences.append(chunks[0] - chunks[1])
    action = processing.action
    half_range = np.where(action.mask, np.subtract(action.high, action.low) / 2, 1)
    values = np.abs(differences) / half_range
    print(f"{len(values)} chunks: mean {values.mean():.4f}, p99 {np.quantile(values, 0.99):.3f}, "
          f"largest {values.max():.3f}, identical {(values == 0).all()}")  # fmt: skip


if __name__ == "__main__":
    main()
