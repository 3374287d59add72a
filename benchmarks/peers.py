"""Other engines on the shapes of BitVLA and BitNet b1.58 2B-4T, side by side with bitvla. `peers.md` tells how.

    python benchmarks/peers.py policy.safetensors --language model.safetensors --files runs/peers \\
        --llama-bench PATH --bitnet-bench PATH --vla-bench PATH [--json]

"prompt" and "decode" are the decoder without the language head, on a prompt and token by token; "call" is a policy from
images to actions. Every measurement is a process of its own that warms up once; the engines take turns, and each figure
is the median over the rounds. Rates count the network's own multiply-adds, whatever an engine makes of them, or in
decoding the bytes of its weights. Shares are of what this machine reaches right before and right after: int8 dot
products on registers only, or plain reading of memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from kernels import STREAM_MEGABYTES, measure

from bitvla import _native as native
from bitvla.bundle import read_language_model
from bitvla.config import LanguageConfig, PolicyConfig
from bitvla.display import as_json, show
from bitvla.runtime.machine import processor
from bitvla.runtime.policy import Policy
from bitvla.runtime.verify import golden_traces
from bitvla.runtime.work import work

FOLDER = Path(__file__).parent
MEASURES = ("prompt", "decode", "call")
CEILING_SECONDS = 0.3


class Engine(NamedTuple):
    """One engine with one file: the command that measures it, and what its output says of the seconds."""

    name: str
    file: Path
    command: list[str]
    seconds: Callable[[str], float]


class Shape(NamedTuple):
    """What there is to do: images, tokens of the decoder in a call, those of text that vla.cpp needs for as many, and
    multiply-adds of a call and of a prompt through the decoder."""

    views: int
    length: int
    vla_tokens: int
    call_macs: int
    prompt_macs: int


def prompt_macs(language: LanguageConfig, tokens: int) -> int:
    """Multiply-adds of the decoder's layers for a prompt: products, and attention over the tokens so far."""
    hidden, keys = language.hidden_size, language.num_kv_heads * language.head_dim
    weights = hidden * (2 * hidden + 2 * keys + 3 * language.intermediate_size)
    return language.num_layers * (tokens * weights + 2 * hidden * tokens * (tokens + 1) // 2)


def vla_tokens(config: PolicyConfig, length: int) -> int:
    """Text tokens of vla.cpp for a sequence of `length`: it adds images, the state, the action slots and the stop."""
    return length - len(config.processing.cameras) * config.vision.num_patches - 1 - config.action.num_slots - 1


def shape_of(path: Path, prompt: int) -> Shape:
    policy = Policy.load(path)
    observation, _ = next(golden_traces(policy.bundle))
    config, length = policy.config, policy.plan(observation["instruction"]).length
    macs = sum(part.total for part in work(config, length).values())
    return Shape(
        len(config.processing.cameras), length, vla_tokens(config, length), macs, prompt_macs(config.language, prompt)
    )


def layer_bytes(path: Path) -> int:
    """Bytes of a language model's layers, which it reads for a token."""
    return sum(tensor.nbytes for name, tensor in read_language_model(path).tensors.items() if ".layers." in name)


def aside(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in another process: what it reads must not count as the memory of those measured."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def own_seconds(output: str) -> float:
    """Of `peers_own.py` and `peers_torch.py`."""
    return float(json.loads(output.splitlines()[-1])["seconds"])


def llama_seconds(output: str, each: bool) -> float:
    """Of `llama-bench -o json` with one test; `each`: a token of it."""
    (test,) = json.loads(output)
    return float(test["avg_ns"]) / 1e9 / (test["n_prompt"] + test["n_gen"] if each else 1)


def vla_seconds(output: str) -> float:
    """Of `vla-bench`."""
    found = re.search(r"p50 ([\d.]+) ms", output)
    if not found:
        raise ValueError("no p50 in it")
    return float(found[1]) / 1e3


def run(engine: Engine, threads: int, peaks: dict[str, int]) -> float:
    """Seconds by the engine itself, in a process of its own; its peak resident memory in bytes goes to `peaks`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "VLA_N_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(engine.command, stdout=output, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        try:
            if process.returncode:
                raise ValueError(f"exit code {process.returncode}")
            seconds = engine.seconds(output.read())
        except (ValueError, KeyError, IndexError) as error:
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise SystemExit(f"{engine.name} gave no figure ({error}): {last}\n  {' '.join(engine.command)}") from None
    peaks[engine.name] = max(peaks.get(engine.name, 0), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return seconds


def language_engines(arguments: argparse.Namespace, kind: str) -> list[Engine]:
    """Those of "prompt" or "decode"."""
    tokens, threads = getattr(arguments, kind), str(arguments.threads)
    engines = []
    for path in arguments.language:
        command = [sys.executable, str(FOLDER / "peers_own.py"), kind, str(path)]
        command += ["--tokens", str(tokens), "--threads", threads]
        engines.append(Engine(f"bitvla {path.stem}", path, command, own_seconds))
    for program, name, formats in [
        (arguments.llama_bench, "llama.cpp", ("TQ2_0", "TQ1_0")),
        (arguments.bitnet_bench, "bitnet.cpp", ("I2_S",)),
    ]:
        for form in formats if program else ():
            path = arguments.files / f"language-{form}.gguf"
            command = [str(program), "-m", str(path), "-t", threads, "-r", "1", "-o", "json"]
            if kind == "prompt":  # in one batch: faster than its 512 tokens at a time
                command += ["-p", str(tokens), "-n", "0", "-b", str(tokens), "-ub", str(tokens)]
            else:
                command += ["-p", "0", "-n", str(tokens)]
            engines.append(Engine(f"{name} {form}", path, command, partial(llama_seconds, each=kind == "decode")))
    return engines


def call_engines(arguments: argparse.Namespace, shape: Shape) -> list[Engine]:
    threads, engines = str(arguments.threads), []
    for path in arguments.policy:
        command = [sys.executable, str(FOLDER / "peers_own.py"), "call", str(path), "--threads", threads]
        engines.append(Engine(f"bitvla {path.stem}", path, command, own_seconds))
    if arguments.torch:
        command = [sys.executable, str(FOLDER / "peers_torch.py"), str(arguments.policy[0])]
        command += ["--length", str(shape.length), "--threads", threads]
        engines.append(Engine("torch int8, compiled", arguments.policy[0], command, own_seconds))
    if arguments.vla_bench:
        path = arguments.files / "policy-BF16.gguf"
        command = [str(arguments.vla_bench), "--ckpt", str(path), "--images", str(shape.views)]
        command += ["--tokens", str(shape.vla_tokens), "--warmup", "1", "--reps", "1", *arguments.vla_options.split()]
        engines.append(Engine("vla.cpp", path, command, vla_seconds))
    return engines


def rows(kind: str, engines: list[Engine], macs: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the engines in turns. `macs`: what one measurement does; in decoding, bytes count instead."""
    peaks: dict[str, int] = {}
    timers = {engine.name: partial(run, engine, arguments.threads, peaks) for engine in engines}
    if kind == "decode":
        unit, ceiling = "GB/s", partial(native.peak_bandwidth_gbs, CEILING_SECONDS, STREAM_MEGABYTES, arguments.threads)
    else:
        unit, ceiling = "GMAC/s", partial(native.peak_int8_gmacs, CEILING_SECONDS, arguments.threads)
    result = measure(timers, ceiling, 1.0, arguments.rounds)
    tokens = {"prompt": arguments.prompt, "decode": 1}.get(kind)
    table = []
    for engine in engines:
        figures, amount = result[engine.name], macs / 1e9
        if kind == "decode":
            own = engine.file in arguments.language
            amount = (aside(layer_bytes, engine.file) if own else engine.file.stat().st_size) / 1e9
        table.append(
            {
                "measure": kind,
                "engine": engine.name,
                "ms": figures["ms"],
                "tokens_per_s": tokens and 1e3 * tokens / figures["ms"],
                "rate": amount * figures["rate"],
                "unit": unit,
                "share": amount * figures["share"],
                "ceiling": figures["ceiling"],
                "peak_gb": peaks[engine.name] / 1e9,
            }
        )
    return table


def missing(arguments: argparse.Namespace) -> list[str]:
    """What will not be measured, and what it takes."""
    takes = {
        "bitvla's prompt and decode: give --language": arguments.language,
        "llama.cpp: give --llama-bench": arguments.llama_bench,
        "bitnet.cpp: give --bitnet-bench": arguments.bitnet_bench,
        "vla.cpp: give --vla-bench": arguments.vla_bench,
        "PyTorch's int8: install torch": arguments.torch,
    }
    return [f"not measured, {what}" for what, given in takes.items() if not given]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path, nargs="+", help="policy files of the same shape, as in several packings")
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    parser.add_argument("--language", type=Path, nargs="+", default=[], help="language models of bitvla")
    parser.add_argument("--files", type=Path, default=Path("runs/peers"), help="folder that peers_files.py wrote")
    parser.add_argument("--llama-bench", type=Path, default=shutil.which("llama-bench"), help="that of llama.cpp")
    parser.add_argument("--bitnet-bench", type=Path, help="llama-bench of bitnet.cpp")
    parser.add_argument("--vla-bench", type=Path, default=shutil.which("vla-bench"), help="that of vla.cpp")
    parser.add_argument("--vla-options", default="", help="more options for it, in one string")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument("--prompt", type=int, default=630, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=32, help="tokens to write")
    parser.add_argument("--threads", type=int, default=native.num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.torch = bool(importlib.util.find_spec("torch"))
    return arguments


def main() -> None:
    arguments = parse()
    shape = aside(shape_of, arguments.policy[0], arguments.prompt)
    engines = {kind: language_engines(arguments, kind) for kind in ("prompt", "decode")}
    engines["call"] = call_engines(arguments, shape)
    engines = {kind: engines[kind] for kind in arguments.only}
    for engine in (engine for some in engines.values() for engine in some):
        for path in (Path(engine.command[0]), engine.file):
            if not path.is_file():
                raise SystemExit(f"{engine.name} needs {path}, which is not there; see benchmarks/peers.md")
    print(*missing(arguments), sep="\n", file=sys.stderr)
    results = []
    for kind, some in engines.items():
        results += rows(kind, some, shape.call_macs if kind == "call" else shape.prompt_macs, arguments)
    if arguments.json:
        machine = {"processor": processor(), "instruction_set": native.isa(), "threads": arguments.threads}
        print(as_json({"machine": machine, "shape": shape._asdict(), "rounds": arguments.rounds, "results": results}))
    else:
        show({"results": results})


if __name__ == "__main__":
    main()
