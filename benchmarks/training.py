"""How long a step of training takes in ternary and in full precision, side by side.

    python benchmarks/training.py --config configs/metaworld-nano-teacher.toml --data datasets/mt10 --init runs/tower

Runs of the same steps on the same data take turns, so that what else the machine does slows both; the first steps,
which compile, are not counted. The last line is the median over the pairs of runs, lowest and highest beside it.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from bitvla.train.loop import run


def seconds_a_step(settings: list[str], precision: str, data: str, init: Path | None, counted: int) -> float:
    """Median over the steps that were counted, of a run that begins anew."""
    changed = {"precision": precision, "steps": 10 + counted, "log_every": 5, "validation_batches": 0}
    lines = [f"{key} = {json.dumps(value)}" for key, value in changed.items()]
    lines += [line for line in settings if line.split(" = ")[0] not in changed]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.toml"
        config.write_text("\n".join(lines))
        run("finetune", config, data, Path(folder) / "run", init=init)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["steps_per_second"] for row in rows if row["step"] > 10 and "steps_per_second" in row]
    return float(1 / np.median(speeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="TOML file of a finetune run")
    parser.add_argument("--data", required=True, help="dataset: folder, address or id on the Hub")
    parser.add_argument("--init", type=Path, help="checkpoint to begin from, where the file has no [policy] section")
    parser.add_argument("--steps", type=int, default=40, help="counted in each run (default: 40)")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each precision (default: 3)")
    arguments = parser.parse_args()
    settings = arguments.config.read_text().splitlines()
    ratios = []
    for number in range(arguments.pairs):
        full, ternary = (
            seconds_a_step(settings, precision, arguments.data, arguments.init, arguments.steps)
            for precision in ("full", "ternary")
        )
        ratios.append(ternary / full)
        print(f"pair {number}: full {full:.3f} s, ternary {ternary:.3f} s a step, ratio {ratios[-1]:.3f}", flush=True)
    print(f"ternary / full: {np.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")


if __name__ == "__main__":
    main()
