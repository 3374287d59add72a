"""bitvla's own part of `peers.py`, a process for each measurement, after one to warm up; prints one line of JSON.

python benchmarks/peers_own.py prompt model.safetensors --tokens 630 --threads 2
python benchmarks/peers_own.py decode model.safetensors --tokens 32 --threads 2
python benchmarks/peers_own.py call policy.safetensors --threads 2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import bitvla
from bitvla.runtime.bench import token_times
from bitvla.runtime.language import LanguageModel
from bitvla.runtime.network import Cache
from bitvla.runtime.verify import golden_traces


def prompt(path: Path, tokens: int, threads: int) -> float:
    """Seconds of the decoder for a prompt, without the language head."""
    model = LanguageModel.load(path, threads)
    for _ in range(2):
        model.logits([0] * tokens, Cache(model.config.language, tokens))
    return model.timings["decoder"] / 1e3


def decode(path: Path, tokens: int, threads: int) -> float:
    """Seconds of the decoder for a token, the mean, without the language head."""
    return float(token_times(LanguageModel.load(path, threads), tokens)[:, 0].mean()) / 1e3


def call(path: Path, tokens: int, threads: int) -> float:
    """Seconds from a golden trace's observation to its chunk."""
    policy = bitvla.load(path, threads)
    observation, _ = next(golden_traces(policy.bundle))
    for _ in range(2):
        policy.act(observation)
    return sum(policy.timings.values()) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = {"prompt": prompt, "decode": decode, "call": call}
    parser.add_argument("measure", choices=measures)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    seconds = measures[arguments.measure](arguments.file, arguments.tokens, arguments.threads)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
