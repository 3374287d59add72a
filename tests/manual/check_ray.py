"""An evaluation on a Ray cluster of two nodes, one worker killed and one node lost in the middle, against one without.

Run: python tests/manual/check_ray.py (needs `pip install 'bitvla[ray]'`, which is too large for every run of the tests)
"""

import os
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["PYTHONPATH"] = os.pathsep.join(entry or "." for entry in sys.path)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import msgspec
import pytest
import ray
from ray.cluster_utils import Cluster

from bitvla.errors import BitvlaError
from bitvla.evaluate.rollout import evaluate
from fakes import Line, Walker

EPISODES = 10  # of each of two tasks
MEASURED = {"chunk_ms": (), "seconds": None, "policy_peak_bytes": 0}  # no two runs have these in common


class Mortal(Line):
    """Writes down what was begun. Kills its process in "left 3"; on the node `lost`, hangs in the first of "right"."""

    def __init__(self, folder: Path, lost: str, image_size: int) -> None:
        super().__init__(image_size)
        self._begun, self._hung, self._lost = folder / "begun", folder / "hung", lost

    def reset(self, task, seed, *args) -> None:
        with self._begun.open("a") as begun:
            begun.write(f"{task} {seed}\n")
        if (task, seed) == ("left", 3) and self._begun.read_text().count("left 3\n") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "right" and ray.get_runtime_context().get_node_id() == self._lost:
            self._hung.write_text(f"{task} {seed}")
            time.sleep(600)
        while (task, seed) == ("right", 6) and not self._hung.exists():
            time.sleep(0.1)  # the other node may need long to start its worker
        super().reset(task, seed, *args)


def episodes(result):
    return msgspec.json.encode([msgspec.structs.replace(episode, **MEASURED) for episode in result.episodes])


def main():
    run = partial(evaluate, Walker, suite="both", episodes=EPISODES)
    alone = run(env=Line, processes=1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    ended = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def on_episode(episode):
            ended.append(episode.job)
            if (folder / "hung").exists() and node in cluster.worker_nodes:
                cluster.remove_node(node, allow_graceful=False)

        env = partial(Mortal, folder, node.node_id)
        far = run(env=env, ray=cluster.address, out=folder / "result.json", on_episode=on_episode)
        begun = Counter((folder / "begun").read_text().splitlines())
        hung = (folder / "hung").read_text()
    cluster.shutdown()
    assert far.processes == 2
    del begun["left 0"]  # what every worker begins with, to show that it can
    assert {job for job, times in begun.items() if times > 1} == {"left 3", hung}  # these, and no other, were run again
    assert len(ended) == len(set(ended)) == 2 * EPISODES  # and none was counted twice
    assert episodes(far) == episodes(alone)
    with pytest.raises(BitvlaError, match="ray start --head"):
        run(env=Line, ray="127.0.0.1:1")
    print(f"the same {2 * EPISODES} episodes, with a worker killed in 'left 3' and a node lost in '{hung}'")


if __name__ == "__main__":
    main()
