"""Packed equals trained; and what packing refuses.

pytest tests/test_pack.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bitvla
from bitvla import BitvlaError
from bitvla.bundle import read, read_language_model, tensor_specs, to_float32
from bitvla.convert.make_checkpoint import make_checkpoint
from bitvla.convert.pack import PARITY_BOUND, pack
from bitvla.processing.vectors import normalize, unnormalize
from bitvla.quantization import ternarize, unpack
from checkpoints import observation, random_weights, tiny_config, write_golden, write_random_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "checkpoint", tiny_config())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "policy.safetensors"


@pytest.mark.parametrize(("packing", "matrix_dtype"), [("2bit", "F32"), ("2bit", "BF16"), ("base3", "I8")])
def test_packed_equals_trained(checkpoint: Path, out: Path, packing: Any, matrix_dtype: Any) -> None:
    """Ternary codes and scales are identical, vectors too, matrices identical or within half a step."""
    pack(checkpoint, out, packing=packing, matrix_dtype=matrix_dtype)
    weights, tensors = random_weights(tiny_config()), read(out).tensors
    for name, spec in tensor_specs(tiny_config()).items():
        if spec.kind == "ternary":
            codes, scale = ternarize(weights[name])
            np.testing.assert_array_equal(unpack(tensors[name], *spec.shape, packing=packing), codes)
            assert tensors[f"{name}_scale"][0] == scale
        elif spec.kind == "matrix" and matrix_dtype == "I8":
            scale = tensors[f"{name}_scale"][:, None]
            np.testing.assert_allclose(tensors[name] * scale, weights[name], rtol=0, atol=0.5001 * scale.max())
        elif spec.kind in ("matrix", "embedding") and matrix_dtype != "F32":
            np.testing.assert_allclose(to_float32(tensors[name]), weights[name], rtol=2.0**-8, atol=0)
        else:
            np.testing.assert_array_equal(tensors[name], weights[name])


def test_small_policies_are_exact_and_large_ones_half(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(checkpoint, out)
    assert read(out).document.matrix_dtype == "F32"
    monkeypatch.setattr("bitvla.convert.pack.EXACT_UP_TO", 1000)
    pack(checkpoint, out)
    assert read(out).document.matrix_dtype == "BF16"


def test_too_little_memory_is_named(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("bitvla.convert.pack.pack_codes", fail)
    with pytest.raises(BitvlaError, match=r"no memory for packing .*checkpoint, which takes 0\.\d MB; raise the limit"):
        pack(checkpoint, out)
    assert not out.exists()


def test_packing_twice_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack(checkpoint, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_file_remembers_where_it_comes_from(checkpoint: Path, out: Path) -> None:
    summary = pack(checkpoint, out)
    document = read(out).document
    assert document.provenance["stage"] == "random"
    assert document.provenance["packed"]["bitvla"] == bitvla.__version__
    assert len(document.provenance["packed"]["checkpoint_sha256"]) == 64
    assert document.golden == ("open the drawer", "push the button")
    assert summary == {
        "path": str(out), "sha256": read(out).sha256, "file_bytes": out.stat().st_size,
        "golden": 2, "compared_with_pytorch": 0, "mean_error": None, "max_error": None,
    }  # fmt: skip


def test_progress_counts_every_tensor(checkpoint: Path, out: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    pack(checkpoint, out, progress=lambda *step: steps.append(step))
    names = list(tensor_specs(tiny_config()))
    assert steps == [(index + 1, len(names), name) for index, name in enumerate(names)]


# PyTorch's own answers.


def golden_with_chunks(checkpoint: Path, out: Path, shift: float) -> None:
    """Give the checkpoint chunks that differ by `shift`, in normalised units, from what the packed policy answers."""
    pack(checkpoint, out)
    policy, statistics = bitvla.load(out), tiny_config().processing.action
    seen = [observation(tiny_config(), seed) for seed in (7, 8)]
    for one in seen:
        actions = normalize(policy.act(one), statistics)
        one["chunk"] = unnormalize(actions - shift * np.sign(actions), statistics)
    write_golden(checkpoint, tiny_config(), seen)
    out.unlink()


def test_the_distance_from_pytorch_is_measured(checkpoint: Path, out: Path) -> None:
    golden_with_chunks(checkpoint, out, PARITY_BOUND / 2)
    summary = pack(checkpoint, out)
    assert summary["compared_with_pytorch"] == 2
    assert summary["mean_error"] == pytest.approx(PARITY_BOUND / 2, rel=1e-3)
    assert summary["max_error"] == pytest.approx(PARITY_BOUND / 2, rel=1e-3)


@pytest.mark.parametrize("shift", [PARITY_BOUND * 1.5, float("nan")])
def test_a_policy_far_from_pytorch_is_not_written(checkpoint: Path, out: Path, shift: float) -> None:
    golden_with_chunks(checkpoint, out, shift)
    out.write_bytes(b"old")
    with pytest.raises(BitvlaError, match="differs from PyTorch"):
        pack(checkpoint, out)
    assert out.read_bytes() == b"old"


def test_a_chunk_of_another_shape_is_named(checkpoint: Path, out: Path) -> None:
    seen = observation(tiny_config()) | {"chunk": np.zeros((3, 4), np.float32)}
    write_golden(checkpoint, tiny_config(), [seen])
    with pytest.raises(BitvlaError, match=r"golden chunk 0 has shape \(3, 4\), the policy answers \(5, 4\)"):
        pack(checkpoint, out)


def test_full_precision_is_rounded_on_request_only(tmp_path: Path, out: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "full", tiny_config(precision="full"))
    with pytest.raises(BitvlaError, match="trained in full precision"):
        pack(checkpoint, out)
    assert not out.exists()
    pack(checkpoint, out, round_full_precision=True)
    policy = read(out)
    assert policy.config.precision == "ternary"
    assert policy.document.provenance["packed"]["rounded_after_training"] is True


def test_a_tower_in_full_precision_is_rounded_on_request(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", kind="vision-language-bf16-tower", reduced=True)
    for name in ("kept", "rounded"):
        pack(tmp_path / "model", tmp_path / name, round_full_precision=name == "rounded")
    kept, rounded = (read_language_model(tmp_path / name) for name in ("kept", "rounded"))
    assert (kept.config.vision.ternary, rounded.config.vision.ternary) == (False, True)
    assert rounded.document.provenance["packed"]["rounded_after_training"] is True
    with pytest.raises(BitvlaError, match="is ternary, there is nothing to round; leave out --round"):
        pack(write_random_checkpoint(tmp_path / "policy", tiny_config()), tmp_path / "out", round_full_precision=True)


# What is refused.


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def edit_weights(checkpoint: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    edit(weights)
    save_file(weights, checkpoint / "model.safetensors")


def spoil_golden(checkpoint: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    seen = observation(tiny_config())
    edit(seen)
    write_golden(checkpoint, tiny_config(), [seen])


def statistics(config: dict[str, Any], kind: str) -> dict[str, Any]:
    return config["processing"][kind]


Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"
NORM = "language_model.model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    **{
        name: (lambda folder, name=name: (folder / name).unlink(), rf"{name} is missing")
        for name in ("config.json", "model.safetensors", "tokenizer.json", "golden.safetensors", "provenance.json")
    },
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "not an object": (lambda folder: (folder / "provenance.json").write_text("[]"), "does not hold a JSON object"),
    "unknown field": (
        lambda folder: edit_json(folder / "config.json", lambda config: config["vision"].update(depth=3)),
        "unknown field `depth`",
    ),
    "impossible size": (
        lambda folder: edit_json(folder / "config.json", lambda config: config["vision"].update(num_heads=7)),
        "vision.hidden_size 40 is not a multiple of vision.num_heads 7",
    ),
    "zero size": (
        lambda folder: edit_json(folder / "config.json", lambda config: config["language"].update(num_kv_heads=0)),
        "language.num_kv_heads is 0",
    ),
    "constant statistics": (
        lambda folder: edit_json(
            folder / "config.json",
            lambda config: statistics(config, "action").update(high=statistics(config, "action")["low"]),
        ),
        "action statistics of 'a0' are missing or constant",
    ),
    "missing statistics": (
        lambda folder: edit_json(folder / "config.json", lambda config: statistics(config, "state").update(low=[])),
        "state statistics hold",
    ),
    "no statistics": (
        lambda folder: edit_json(folder / "config.json", lambda config: config["processing"].pop("state")),
        "missing required field `state`",
    ),
    "truncated weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1]),
        "model.safetensors cannot be read",
    ),
    "NaN weight": (
        lambda folder: edit_weights(folder, lambda weights: np.put(weights[Q_PROJ], 5, np.nan)),
        "q_proj.weight has values that are not finite",
    ),
    "infinite norm": (
        lambda folder: edit_weights(folder, lambda weights: np.put(weights[NORM], 0, np.inf)),
        "norm.weight has values that are not finite",
    ),
    "missing tensor": (
        lambda folder: edit_weights(folder, lambda weights: weights.pop(NORM)),
        f"lacks the tensor {NORM}",
    ),
    "unknown tensor": (
        lambda folder: edit_weights(folder, lambda weights: weights.update(lm_head=weights[NORM])),
        "unknown tensor lm_head",
    ),
    "wrong shape": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({Q_PROJ: weights[Q_PROJ][:, :40].copy()})),
        r"is F32 \[48, 40\], the policy needs F32 \[48, 48\]",
    ),
    "wrong dtype": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({NORM: weights[NORM].astype(np.float16)})),
        r"norm.weight is F16 \[48\], the policy needs F32",
    ),
    "foreign tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer is damaged"),
    "no golden": (lambda folder: write_golden(folder, tiny_config(), []), "holds no golden observation"),
    "golden without instructions": (
        lambda folder: save_file({"0.state": np.zeros(3, np.float32)}, folder / "golden.safetensors"),
        "lacks its list of instructions",
    ),
    "golden without a camera": (
        lambda folder: spoil_golden(folder, lambda seen: seen["images"].pop("wrist")),
        "lacks the tensor 0.image.wrist",
    ),
    "golden of another size": (
        lambda folder: spoil_golden(folder, lambda seen: seen["images"].update(wrist=np.zeros((9, 9, 3), np.uint8))),
        r"'wrist' has shape \(9, 9, 3\)",
    ),
    "golden state": (
        lambda folder: spoil_golden(folder, lambda seen: seen.update(state=np.full(3, np.nan, np.float32))),
        "'s0' is nan",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused(checkpoint: Path, out: Path, name: str) -> None:
    spoil, message = BROKEN[name]
    spoil(checkpoint)
    out.write_bytes(b"old")
    with pytest.raises(BitvlaError, match=message) as caught:
        pack(checkpoint, out)
    assert "\n" not in str(caught.value)
    assert out.read_bytes() == b"old"


def test_a_path_that_is_no_checkpoint_is_named(tmp_path: Path, out: Path) -> None:
    with pytest.raises(BitvlaError, match="is a folder: name a file in it"):  # before any work
        pack(tmp_path / "gone", tmp_path)
    with pytest.raises(BitvlaError, match="gone is not a checkpoint folder"):
        pack(tmp_path / "gone", out)


def test_a_config_read_back_is_the_same(checkpoint: Path, out: Path) -> None:
    pack(checkpoint, out)
    assert msgspec.to_builtins(read(out).config) == msgspec.to_builtins(tiny_config())
