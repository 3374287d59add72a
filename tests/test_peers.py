"""The comparison with other engines: what they print, the arithmetic of shapes, and a whole run with programs that only
print.

pytest tests/test_peers.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bitvla.config import ActionConfig, LanguageConfig, VisionConfig
from bitvla.convert.make_checkpoint import make_checkpoint
from bitvla.convert.pack import pack
from checkpoints import pack_random, tiny_config

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import peers

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# What `llama-bench -o json` and `vla-bench` print, shortened, with round figures.
LLAMA = """[
  {
    "model_type": "bitnet ?B (guessed) TQ2_0 - 2.06 bpw ternary",
    "n_prompt": 0,
    "n_gen": 4,
    "avg_ns": 200000000,
    "stddev_ns": 0,
    "samples_ns": [ 200000000 ]
  }
]
"""
VLA = """vla: arch = bitvla
vla(bitvla): weights resident in 5.17 GiB (BF16); image_id=128010
policy-BF16.gguf: min 1500.0 ms  p50 1500.0 ms  p90 1500.0 ms  vision 99.5 ms  (2 views, 224x224, 58 tokens, 1 reps)
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_random(tmp_path_factory.mktemp("policy"), tiny_config())


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    make_checkpoint(folder / "checkpoint", kind="language", reduced=True)
    pack(folder / "checkpoint", folder / "model.safetensors")
    return folder / "model.safetensors"


def program(path: Path, output: str, code: int = 0) -> Path:
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\necho only a test >&2\nexit {code}\n")
    path.chmod(0o755)
    return path


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # what is compiled takes a minute and computes the same
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_outputs_are_understood() -> None:
    assert peers.llama_seconds(LLAMA, each=False) == 0.2
    assert peers.llama_seconds(LLAMA, each=True) == 0.05
    assert peers.vla_seconds(VLA) == 1.5
    assert peers.own_seconds('a warning\n{"seconds": 0.25}\n') == 0.25


def test_a_prompt_counts_products_and_causal_attention() -> None:
    weights, attention = 2_084_044_800, 30 * 2 * 2560  # of BitNet b1.58 2B-4T: a token, and a token and a key
    assert peers.prompt_macs(LanguageConfig(), 1) == weights + attention
    assert peers.prompt_macs(LanguageConfig(), 3) == 3 * weights + 6 * attention


def test_vla_cpp_gets_a_sequence_of_the_same_length() -> None:
    """Its sequence: text, the patches of each image, one token of the state, the action slots, the stop."""
    config = msgspec.structs.replace(tiny_config(), vision=VisionConfig(), action=ActionConfig())
    assert peers.vla_tokens(config, 58 + 2 * 256 + 1 + 56 + 1) == 58


def test_engines_are_measured_side_by_side(policy: Path, language: Path, tmp_path: Path) -> None:
    for name in ("language-TQ2_0.gguf", "language-TQ1_0.gguf", "policy-BF16.gguf"):
        (tmp_path / name).write_bytes(bytes(10**6))
    bench, vla = program(tmp_path / "llama-bench", LLAMA), program(tmp_path / "vla-bench", VLA)
    command = [BENCHMARKS / "peers.py", policy, "--language", language, "--files", tmp_path]
    command += ["--llama-bench", bench, "--vla-bench", vla, "--prompt", 6, "--decode", 4, "--threads", 1]
    done = run(*command, "--rounds", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert "not measured, bitnet.cpp: give --bitnet-bench" in done.stderr
    results = {(row["measure"], row["engine"]): row for row in json.loads(done.stdout)["results"]}
    assert [engine for measure, engine in results if measure == "call"] == [
        "bitvla policy",
        "torch int8, compiled",
        "vla.cpp",
    ]
    for row in results.values():
        assert row["ms"] > 0
        assert row["peak_gb"] > 0
        assert row["share"] > 0
    prompt, decode = results["prompt", "llama.cpp TQ2_0"], results["decode", "llama.cpp TQ2_0"]
    assert (prompt["ms"], prompt["tokens_per_s"], prompt["unit"]) == (200, 30, "GMAC/s")
    assert prompt["rate"] == pytest.approx(peers.prompt_macs(tiny_config().language, 6) / 0.2e9)
    assert (decode["ms"], decode["rate"], decode["unit"]) == (50, pytest.approx(1e-3 / 0.05), "GB/s")
    assert results["call", "vla.cpp"]["ms"] == 1500


def test_what_an_engine_says_when_it_fails_is_shown(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "policy-BF16.gguf").touch()
    vla = program(tmp_path / "vla-bench", "", code=1)
    command = [BENCHMARKS / "peers.py", policy, "--files", tmp_path, "--vla-bench", vla, "--only", "call"]
    done = run(*command, "--rounds", 1, "--threads", 1)
    assert done.returncode == 1
    assert "vla.cpp gave no figure (exit code 1): only a test" in done.stderr
    (tmp_path / "policy-BF16.gguf").unlink()
    done = run(*command)
    assert done.stderr.strip().endswith("policy-BF16.gguf, which is not there; see benchmarks/peers.md")


def test_files_of_peers_hold_ternary_weights_of_the_same_shapes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    import peers_files

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2}
    config = tiny_config(language=LanguageConfig(vocab_size=300, **sizes))
    names = {}
    for kind, size in [("TQ2_0", 66), ("TQ1_0", 54), ("I2_S", 64)]:
        peers_files.write(
            tmp_path / kind, "bitnet", partial(peers_files.add_language_model, config=config.language, kind=kind)
        )
        if kind == "I2_S":  # the package cannot read bitnet.cpp's type
            continue
        names = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / kind).tensors}
        down = names["blk.0.ffn_down.weight"]
        assert tuple(down.shape) == (512, 256)
        assert down.n_bytes == 512 * 256 // 256 * size
        values = np.unique(gguf.dequantize(down.data, down.tensor_type))
        np.testing.assert_allclose(values, [-peers_files.SCALE, 0, peers_files.SCALE], rtol=1e-3)
    bytes_of = {kind: (tmp_path / kind).stat().st_size for kind in ("TQ2_0", "I2_S")}
    weights = peers.prompt_macs(config.language, 1) - 2 * 256
    assert abs(bytes_of["TQ2_0"] - bytes_of["I2_S"] - weights / 256 * 2) < 1000
    peers_files.write(tmp_path / "policy", "bitvla", partial(peers_files.add_policy, config=config))
    tensors = {tensor.name: tuple(tensor.shape) for tensor in gguf.GGUFReader(tmp_path / "policy").tensors}
    assert tensors["vit.blk.1.fc2.weight"] == (72, 40)
    assert tensors["lm.blk.0.ffn_gate.weight"] == (256, 512)
    assert tensors["aex.head.fc1.weight"] == (2 * 256, 56)
