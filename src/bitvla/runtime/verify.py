"""Is a policy file whole, and does this machine compute with it what it should? Named checks, each with one line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import bitvla._native as native
from bitvla.bundle import Bundle, check_finite, is_language_model, read, read_language_model, tensor_specs
from bitvla.config import PolicyConfig, check
from bitvla.errors import BitvlaError
from bitvla.quantization import unpack
from bitvla.runtime.language import LanguageModel
from bitvla.runtime.policy import Policy
from bitvla.runtime.selftest import Part, mismatches

# Ternary weights of the largest policy whose traces the scalar kernels replay, where there are others. They do about
# 10**9 multiply-adds a second: the full BitVLA would take half an hour.
SCALAR_WEIGHTS = 10**8


def verify(path: Path) -> dict[str, Any]:
    """Check a file on this machine: {"path", "passed", "checks": [{"check", "passed", "detail"}]}.

    Structure, digest, weights and statistics of the file; then every instruction set of this processor is compared
    with the scalar one on the policy's shapes, and must answer each golden trace with the same bits, on one thread
    and on all. Checks that need a readable file are left out where it is not, as is replaying with the scalar kernels
    for policies of more than `SCALAR_WEIGHTS`. A language model has neither statistics nor golden traces.
    """
    checks: list[dict[str, Any]] = []

    def passes(name: str, check: Callable[[], str]) -> bool:
        try:
            detail, passed = check(), True
        except (BitvlaError, ValueError) as error:
            detail, passed = str(error), False
        checks.append({"check": name, "passed": passed, "detail": detail})
        return passed

    before, threads = native.isa(), native.num_threads()
    try:
        if is_language_model(Path(path)):
            _verify_language_model(Path(path), passes)
        else:
            _verify(Path(path), passes, threads)
    finally:
        native.set_isa(before)
        native.set_num_threads(threads)
    return {"path": str(path), "passed": all(check["passed"] for check in checks), "checks": checks}


def _verify(path: Path, passes: Callable[[str, Callable[[], str]], bool], threads: int) -> None:
    if not passes("structure", lambda: _structure(read(path, digest=False))):
        return
    bundle = read(path, digest=False)
    passes("digest", lambda: f"SHA-256 {read(path, digest=True).sha256}")
    passes("weights", lambda: _weights(bundle))
    passes("statistics", lambda: _statistics(bundle))
    if not passes("load", lambda: _load(bundle)):
        return
    policy = Policy(bundle)
    for isa in native.available():
        passes(f"kernels {isa}", partial(_kernels, policy.network.parts, isa))
    for isa in _replaying(bundle.config):
        passes(f"golden traces {isa}", partial(_golden, policy, isa, threads))


def _verify_language_model(path: Path, passes: Callable[[str, Callable[[], str]], bool]) -> None:
    if not passes("structure", lambda: _structure(read_language_model(path, digest=False))):
        return
    bundle = read_language_model(path, digest=False)
    passes("digest", lambda: f"SHA-256 {read_language_model(path, digest=True).sha256}")
    passes("weights", lambda: _weights(bundle))
    if not passes("load", lambda: f"runs on {LanguageModel(bundle).isa} kernels"):
        return
    parts = LanguageModel(bundle).parts
    for isa in native.available():
        passes(f"kernels {isa}", partial(_kernels, parts, isa))


def _replaying(config: PolicyConfig) -> list[str]:
    """The instruction sets that replay golden traces in a bearable time."""
    weights = sum(math.prod(spec.shape) for spec in tensor_specs(config).values() if spec.kind == "ternary")
    available = list(native.available())
    return available if weights <= SCALAR_WEIGHTS else [isa for isa in available if isa != "scalar"] or available


def golden_traces(bundle: Bundle[PolicyConfig]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """The golden observations of a policy file, each with the chunk that must come out (without a prefix)."""
    for index, instruction in enumerate(bundle.document.golden):
        images = {
            camera.name: bundle.tensors[f"golden.{index}.image.{camera.name}"]
            for camera in bundle.config.processing.cameras
        }
        seen = {"images": images, "instruction": instruction}
        if bundle.config.action.state_dim:
            seen["state"] = bundle.tensors[f"golden.{index}.state"]
        yield seen, bundle.tensors[f"golden.{index}.chunk"]


def with_views(bundle: Bundle[PolicyConfig], views: int) -> Bundle[PolicyConfig]:
    """The policy with another number of cameras, its golden images repeated: to measure, for answers mean nothing."""
    config, tensors = bundle.config, dict(bundle.tensors)
    given = config.processing.cameras
    cameras = []
    for view in range(views):
        camera = given[view % len(given)]
        cameras.append(msgspec.structs.replace(camera, name=f"view {view + 1}"))
        for index in range(len(bundle.document.golden)):
            tensors[f"golden.{index}.image.view {view + 1}"] = bundle.tensors[f"golden.{index}.image.{camera.name}"]
    processing = msgspec.structs.replace(config.processing, cameras=tuple(cameras))
    config = check(msgspec.structs.replace(config, processing=processing))
    return dataclasses.replace(
        bundle, document=msgspec.structs.replace(bundle.document, config=config), tensors=tensors
    )


def _structure(bundle: Bundle[Any]) -> str:
    document = bundle.document
    return f"format {document.format}, {document.packing}, {len(bundle.tensors)} tensors as the configuration asks"


def _weights(bundle: Bundle[Any]) -> str:
    counts = np.zeros(3, dtype=np.int64)
    for name, spec in tensor_specs(bundle.config).items():
        tensor = bundle.tensors[name]
        if spec.kind == "ternary":
            try:
                codes = unpack(tensor, *spec.shape, packing=bundle.document.packing)
            except ValueError as error:
                raise BitvlaError(f"{name}: {error}") from None
            counts += np.bincount(codes.ravel().view(np.uint8) + np.uint8(1), minlength=3)
        else:
            check_finite(name, tensor)
    minus, zero, plus = 100 * counts / counts.sum()
    return f"{counts.sum():,} ternary weights: {minus:.1f} % -1, {zero:.1f} % 0, {plus:.1f} % +1; all others finite"


def _statistics(bundle: Bundle[PolicyConfig]) -> str:
    processing = bundle.config.processing  # their values were checked when the file was read
    state, action = processing.state.names, processing.action.names
    return f"{len(state)} state and {len(action)} action bounds, none missing or constant"


def _load(bundle: Bundle[PolicyConfig]) -> str:
    policy = Policy(bundle)
    cameras = ", ".join(camera.name for camera in bundle.config.processing.cameras)
    return f"cameras {cameras}; runs on {policy.isa} kernels"


def _kernels(parts: Sequence[Part], isa: str) -> str:
    wrong = mismatches(parts, isa)
    if wrong:
        raise BitvlaError(f"differ from the scalar kernels: {', '.join(wrong)}")
    return "the reference" if isa == "scalar" else "the same bits as the scalar kernels on the shapes of this file"


def _golden(policy: Policy, isa: str, threads: int) -> str:
    if not policy.bundle.document.golden:
        raise BitvlaError("the file holds no golden trace; pack it again")
    native.set_isa(isa)
    for count in sorted({1, threads}):
        native.set_num_threads(count)
        _replay(policy, count)
    return f"{len(policy.bundle.document.golden)} replayed, every chunk identical bit for bit"


def _replay(policy: Policy, threads: int) -> None:
    for index, (observation, expected) in enumerate(golden_traces(policy.bundle)):
        prefixes: list[Any] = [None, expected[: policy.max_prefix]]
        answers = [expected, policy.bundle.tensors.get(f"golden.{index}.continued")]
        for prefix, answer in zip(prefixes, answers, strict=True):
            if answer is None:
                continue
            chunk = policy.act(observation, prefix=prefix)
            if chunk.tobytes() != answer.tobytes():
                error = np.abs(chunk - answer).max()
                continued = "" if prefix is None else ", continued,"
                raise BitvlaError(f"trace {index}{continued} differs by up to {error:.3g} on {threads} threads")
