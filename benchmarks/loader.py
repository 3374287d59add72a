"""How many training windows a second the loader alone prepares: nothing is trained.

    python benchmarks/loader.py --config configs/metaworld-nano-localize.toml --data datasets/mt10 --workers 2

The first line includes decoding the videos, where that has not been done before; the second is what a run sees. With
`--cache-gb` groups of episodes are decoded meanwhile: let `--batches` be long enough for several.
"""

import argparse
import time
from pathlib import Path

from bitvla.data.lerobot import AS_STORED, LeRobotDataset, name_of
from bitvla.errors import BitvlaError
from bitvla.processing.prompt import Prompt
from bitvla.train.batches import Windows, batches
from bitvla.train.config import load, policy_config
from bitvla.train.policy import new_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="TOML file of a run with a [policy] section")
    parser.add_argument("--data", required=True, help="dataset: folder, address or id on the Hub")
    parser.add_argument("--cache-gb", type=float, help="disk for decoded pictures (default: as much as all need)")
    parser.add_argument("--workers", type=int, help="processes that prepare batches (default: as the file says)")
    parser.add_argument("--batches", type=int, default=200, help="to time (default: 200)")
    arguments = parser.parse_args()
    settings = load(arguments.config)
    if settings.policy is None:
        raise BitvlaError(f"{arguments.config} has no [policy] section; name the file of a run that begins anew")
    begin = time.perf_counter()
    conventions = settings.data.get(name_of(arguments.data), AS_STORED)
    cache_bytes = None if arguments.cache_gb is None else int(1e9 * arguments.cache_gb)
    dataset = LeRobotDataset(arguments.data, conventions, cache_bytes)
    config = policy_config(settings.policy, dataset, settings.precision)
    prompt = Prompt(config, new_tokenizer(config, dataset.task_strings))
    sizes = {"batch_size": settings.batch_size, "seed": settings.seed, "augmentation": settings.augmentation}
    windows = Windows(dataset, config, prompt, **sizes, balance_tasks=settings.balance_tasks)
    windows.prepare(0)
    print(f"opened and decoded in {time.perf_counter() - begin:.1f} s: {windows.num_frames} windows, {dataset.name}")
    workers = arguments.workers or settings.workers
    stream = batches(windows, range(arguments.batches + 1), workers)
    next(stream)  # the process has started
    begin = time.perf_counter()
    count = sum(1 for _ in stream)
    seconds = time.perf_counter() - begin
    rate = count * settings.batch_size / seconds
    print(f"{rate:.0f} windows/s of {len(config.processing.cameras)} views, {workers} workers: {count} batches of "
          f"{settings.batch_size} in {seconds:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
