"""How often the scripted experts succeed from the initial states of the evaluation. Nothing is rendered.

    python benchmarks/experts.py --env libero --suite libero_object --episodes 50 --processes 2

A line a task, with the seeds that failed; tasks that no expert can do are named with the reason.
"""

import argparse
import contextlib
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import numpy as np

from bitvla.evaluate.statistics import rate_of
from bitvla.sim import make_simulator
from bitvla.sim.base import GivenUpError

simulator_of = cache(make_simulator)  # one a process


def steps_to_success(env: str, task: str, seed: int) -> float:
    """Infinite where the expert does not get there in time."""
    simulator = simulator_of(env)
    simulator.reset(task, seed)
    act = simulator.expert()
    with contextlib.suppress(GivenUpError):
        return next((n for n in range(1, simulator.longest_demonstration(task) + 1) if simulator.step(act())), np.inf)
    return np.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="libero", help="simulator (default: libero)")
    parser.add_argument("--suite", required=True, help="a suite, or one task's name")
    parser.add_argument("--episodes", type=int, default=50, help="initial states a task, from seed 0 (default: 50)")
    parser.add_argument("--processes", type=int, default=1, help="simulators side by side (default: 1)")
    arguments = parser.parse_args()
    simulator, seeds, outcomes = simulator_of(arguments.env), range(arguments.episodes), []
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        running = {}
        for task in simulator.tasks(arguments.suite):
            if reason := simulator.cannot_demonstrate(task):
                print(f"{task}: left out: {reason}")
            else:  # in pieces, because changing the task costs seconds
                running[task] = pool.map(steps_to_success, [arguments.env] * len(seeds), [task] * len(seeds), seeds,
                                         chunksize=1 + len(seeds) // arguments.processes)  # fmt: skip
        for task, answers in running.items():
            steps = np.array(list(answers))
            solved = np.isfinite(steps)
            outcomes += solved.tolist()
            failed = f", failed: {np.flatnonzero(~solved).tolist()}" if not solved.all() else ""
            mean = f", {steps[solved].mean():.0f} steps" if solved.any() else ""
            print(f"{task}: {solved.sum()}/{solved.size}{mean}{failed}", flush=True)
    rate = rate_of(outcomes)
    print(f"all: {rate.successes}/{rate.total} = {rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}]")


if __name__ == "__main__":
    main()
