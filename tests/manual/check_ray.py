"""An evaluation on a Ray cluster of two nodes, one worker killed and one node lost in the middle, against one without.

Run: python tests/manual/check_ray.py (needs `pip install 'bitvla[ray]'`, which is too large for every run of the tests)
"""

import os
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["PYTHONPATH"] = os.pathsep.join(entry or "." for entry in sys.path)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import msgspec
import pytest
from ray.cluster_utils import Cluster

from bitvla.errors import BitvlaError
from bitvla.evaluate.rollout import evaluate
from fakes import Line, Walker

EPISODES = 12  # of each of two tasks
MEASURED = {"chunk_ms": (), "seconds": None, "policy_peak_bytes": 0}  # no two runs have these in common


class Mortal(Line):
    """Kills its process, the worker's, in the fourth episode that was begun anywhere."""

    def __init__(self, counts: Path, image_size: int) -> None:
        super().__init__(image_size)
        self._counts = counts

    def reset(self, *args, **options) -> None:
        with self._counts.open("a+") as counts:
            counts.write("x")
        if len(self._counts.read_text()) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        super().reset(*args, **options)


def episodes(result):
    return msgspec.json.encode([msgspec.structs.replace(episode, **MEASURED) for episode in result.episodes])


def main():
    run = partial(evaluate, partial(Walker, seconds=0.02), suite="both", episodes=EPISODES)
    alone = run(env=Line, processes=1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    ended = []

    def on_episode(episode):
        ended.append(episode.job)
        if len(ended) == EPISODES:
            cluster.remove_node(node, allow_graceful=False)

    with tempfile.TemporaryDirectory() as folder:
        counts, out = Path(folder, "counts"), Path(folder, "result.json")
        far = run(env=partial(Mortal, counts), ray=cluster.address, out=out, on_episode=on_episode)
        begun = len(counts.read_text())
    cluster.shutdown()
    assert far.processes == 2
    assert begun > 2 * EPISODES, begun  # some were run again
    assert len(ended) == len(set(ended)) == 2 * EPISODES  # none was counted twice
    assert episodes(far) == episodes(alone)
    with pytest.raises(BitvlaError, match="ray start --head"):
        run(env=Line, ray="127.0.0.1:1")
    print(f"the same {2 * EPISODES} episodes, {begun} begun, with a worker killed and a node lost")


if __name__ == "__main__":
    main()
