"""The packed policy against a slow NumPy network, kernel by kernel and layer by layer; and what it refuses.

pytest tests/test_runtime.py
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

import bitvla
import bitvla._native as native
from bitvla import BitvlaError, bundle
from bitvla.bundle import to_float32
from bitvla.config import PolicyConfig
from bitvla.processing.vectors import normalize
from bitvla.quantization import STEPS, Packing, quantize_activations, unpack
from bitvla.runtime import network as network_module
from bitvla.runtime import selftest
from bitvla.runtime.policy import PARTS, Policy
from bitvla.runtime.pruning import most_different
from checkpoints import flow_config, observation, pack_random, random_weights, tiny_config, token_config, with_prompt
from reference_network import ReferenceNetwork, attention, gelu, gelu_tanh
from serving import NANO
from serving import observation as serving_observation


def changed(**sections: dict[str, Any]) -> PolicyConfig:
    config = tiny_config()
    return msgspec.structs.replace(
        config, **{name: msgspec.structs.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


CONFIGS = {
    "bidirectional": tiny_config(),
    "causal": changed(language={"bidirectional": False}),
    "one kv head, deep head": changed(language={"num_kv_heads": 1}, action={"head_blocks": 2, "slots_per_step": 1}),
    "full-precision tower": changed(vision={"ternary": False}),
    "FiLM": changed(vision={"film": True}),
    "no blocks, one layer": changed(language={"num_layers": 1, "num_kv_heads": 4}, action={"head_blocks": 0}),
    "flow": flow_config(),
}

BEGINS_ALIKE = "<|begin_of_text|>look {images}{instruction}"


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_random(tmp_path_factory.mktemp("policy"), tiny_config())


@pytest.fixture
def policy(policy_file: Path) -> Policy:
    return bitvla.load(policy_file)


# The network.


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", [1, 2])
def test_layers_match_the_reference(tmp_path: Path, name: str, seed: int) -> None:
    """Each layer is given the runtime's own input. Where float sums round differently, an int8 code may flip and move
    some values a little; the median of the errors is what a wrong formula cannot keep small."""
    config = CONFIGS[name]
    policy = bitvla.load(pack_random(tmp_path, config, seed=seed, matrix_dtype="F32"))
    seen = observation(config, seed)
    states: dict[str, NDArray[np.float32]] = {}
    policy.network.record = states.__setitem__
    policy.act(seen)
    reference = ReferenceNetwork(config, random_weights(config, seed))
    patches, (plan,), (state,), _ = policy._preprocess([seen], [None])
    ids = policy._prompt.ids(seen["instruction"])
    vision, decoder = config.vision.num_layers, config.language.num_layers
    expected = {"vision.0": reference.patch_embedding(patches), "connector": reference.connector(states["vision.2"])}
    special = policy._prompt.image_id, policy._prompt.proprio_id
    told = reference.told(ids, *special)
    expected |= {f"vision.{i + 1}": reference.vision_layer(i, states[f"vision.{i}"], told) for i in range(vision)}
    expected["decoder.0"] = reference.embed(ids, *special, states["connector"], state)
    expected |= {f"decoder.{i + 1}": reference.decoder_layer(i, states[f"decoder.{i}"]) for i in range(decoder)}
    expected[f"decoder.{decoder}"] = expected[f"decoder.{decoder}"][plan.answers]  # the runtime computes only these
    expected["answers"] = reference.final_norm(states[f"decoder.{decoder}"])
    assert states.keys() == expected.keys()
    for key, value in expected.items():
        error = np.abs(states[key] - value) / np.abs(value).max()
        assert np.median(error) < 1e-5, key
        assert error.max() < 0.05, key
    np.testing.assert_allclose(
        policy.network.act(states["answers"]), reference.head(states["answers"])[None], atol=1e-5
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_chunk_matches_the_reference(tmp_path: Path, name: str) -> None:
    """The whole forward pass, nothing shared on the way: flipped codes add up, wrong wiring would add up to ~1."""
    config = CONFIGS[name]
    policy = bitvla.load(pack_random(tmp_path, config, matrix_dtype="F32"))
    reference = ReferenceNetwork(config, random_weights(config))
    for seed in range(4):
        seen = observation(config, seed)
        patches, (plan,), (state,), _ = policy._preprocess([seen], [None])
        ids = policy._prompt.ids(seen["instruction"])
        special = policy._prompt.image_id, policy._prompt.proprio_id
        expected = reference.run(patches, ids, *special, plan.answers, state)["actions"]
        actual = normalize(policy.act(seen), config.processing.action)
        scale = np.abs(expected).max()
        assert np.abs(actual - normalize_outputs(expected, config)).mean() < 0.03 * scale


def normalize_outputs(actions: NDArray[np.float32], config: PolicyConfig) -> NDArray[np.float32]:
    """What normalising a chunk in the robot's units gives back: clipped where statistics apply."""
    return np.where(config.processing.action.mask, np.clip(actions, -1, 1), actions)


class CheckedNative:
    """The native module, with every call of the forward pass compared with NumPy on the very same inputs."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        check, kernel = getattr(type(self), f"check_{name}"), getattr(native, name)

        def call(*args: Any, **options: Any) -> None:
            before = [value.copy() if isinstance(value, np.ndarray) else value for value in args]
            kernel(*args, **options)
            check(args, before, **options)
            self.calls[name] = self.calls.get(name, 0) + 1

        return call

    @staticmethod
    def check_quantize(args: Any, before: Any) -> None:
        x, codes, scales, sums = args
        expected, scale = quantize_activations(x)
        np.testing.assert_array_equal(codes[:, : x.shape[1]], expected)
        np.testing.assert_array_equal(codes[:, x.shape[1] :], 0)
        np.testing.assert_array_equal(scales, scale)
        np.testing.assert_array_equal(sums, expected.sum(-1, dtype=np.int32))

    @staticmethod
    def check_codes(expected: NDArray[np.float64], codes: Any, scales: Any, sums: Any) -> None:
        """Codes of a fused kernel: off by one only where the value lies on the border between two codes."""
        beta = np.maximum(np.abs(expected).max(-1, keepdims=True), 1e-5)
        np.testing.assert_allclose(scales, beta[:, 0] / 127, rtol=1e-5)
        assert np.abs(codes[:, : expected.shape[1]] - 127 * expected / beta).max() <= 0.5 + 2e-3
        np.testing.assert_array_equal(codes[:, expected.shape[1] :], 0)
        np.testing.assert_array_equal(sums, codes.sum(-1, dtype=np.int32))

    @classmethod
    def check_layer_norm_quantize(cls, args: Any, before: Any) -> None:
        x, weight, bias, eps, *quantized = args
        cls.check_codes(layer_norm(x, weight, bias, eps), *quantized)

    @classmethod
    def check_rms_norm_quantize(cls, args: Any, before: Any) -> None:
        x, weight, eps, *quantized = args
        cls.check_codes(rms_norm(x, weight, eps), *quantized)

    @classmethod
    def check_relu2_gate_norm_quantize(cls, args: Any, before: Any) -> None:
        gate, up, weight, eps, *quantized = args
        cls.check_codes(rms_norm(np.maximum(gate.astype(np.float64), 0) ** 2 * up, weight, eps), *quantized)

    @classmethod
    def check_gelu_quantize(cls, args: Any, before: Any) -> None:
        x, approximate, *quantized = args
        assert approximate  # SigLIP's
        cls.check_codes(gelu_tanh(x).astype(np.float64), *quantized)

    @staticmethod
    def check_gelu(args: Any, before: Any) -> None:
        # Connector and proprio projector use the exact one, a tower in full precision SigLIP's.
        exact = gelu_tanh if args[1] else gelu
        np.testing.assert_allclose(args[2], exact(before[0]), rtol=1e-5, atol=1e-6)

    @staticmethod
    def check_relu(args: Any, before: Any) -> None:
        np.testing.assert_array_equal(args[1], np.maximum(before[0], 0))

    @staticmethod
    def check_layer_norm(args: Any, before: Any) -> None:
        np.testing.assert_allclose(args[-1], layer_norm(*before[:4]), rtol=1e-5, atol=1e-5)

    @staticmethod
    def check_rms_norm(args: Any, before: Any) -> None:
        np.testing.assert_allclose(args[-1], rms_norm(*before[:3]), rtol=1e-5, atol=1e-5)

    @staticmethod
    def check_ternary_linear(args: Any, before: Any, accumulate: bool, packing: Packing) -> None:
        codes, scales, _, packed, rows, columns, scale, bias, out = args
        exact = codes[:, :columns].astype(np.int64) @ unpack(packed, rows, columns, packing=packing).astype(np.int64).T
        accumulators = np.zeros(exact.shape, np.int32)
        native.ternary_matmul(codes, args[2], packed, rows, columns, accumulators, packing=packing)
        np.testing.assert_array_equal(accumulators, exact)
        terms = [exact * (scale * scales[:, None].astype(np.float64)), bias, before[-1] if accumulate else None]
        expected = sum(term for term in terms if term is not None)
        largest = sum(np.abs(term) for term in terms if term is not None)  # three roundings, each of at most the sum
        assert (np.abs(out - expected) <= 2.0**-22 * largest).all()

    @staticmethod
    def check_linear(args: Any, before: Any, row_scales: Any, accumulate: bool) -> None:
        x, weight, bias, out = args
        bias = (0 if bias is None else bias) + (before[-1] if accumulate else 0)
        w = to_float32(weight).astype(np.float64) * (1 if row_scales is None else row_scales[:, None])
        bound = np.abs(x) @ np.abs(w).T + np.abs(bias)
        steps = x.shape[1] / 16 + 8  # sixteen running sums, then their sum
        assert (np.abs(out - (x @ w.T + bias)) <= 2.0**-23 * steps * bound).all()

    @staticmethod
    def check_attention(args: Any, before: Any, packed: int | None = None) -> None:
        q, k, v, heads, kv_heads, scale, causal, out = args
        assert scale == (q.shape[1] // heads) ** -0.5
        q, k, v = (part.astype(np.float64) for part in before[:3])  # the answers may lie where the queries were
        if packed is not None:
            dim = q.shape[1] // heads
            k = k.reshape(kv_heads, -1, dim, 16).transpose(1, 3, 0, 2).reshape(-1, kv_heads * dim)[:packed]
            v = v.reshape(kv_heads, -1, v.shape[1])[:, :packed, :dim].transpose(1, 0, 2).reshape(packed, -1)
        expected = attention(q, k, v, heads, kv_heads, causal)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5 * np.abs(v).max())

    @staticmethod
    def check_append(args: Any, before: Any) -> None:
        k, v, start, kv_heads, packed_k, packed_v = args
        dim = k.shape[1] // kv_heads
        keys = packed_k.reshape(kv_heads, -1, dim, 16).transpose(1, 3, 0, 2).reshape(-1, kv_heads * dim)
        values = packed_v.reshape(kv_heads, -1, packed_v.shape[1])[:, :, :dim].transpose(1, 0, 2)
        np.testing.assert_array_equal(keys[start : start + len(k)], k)
        np.testing.assert_array_equal(values[start : start + len(k)].reshape(len(k), -1), v)

    @staticmethod
    def check_rope(args: Any, before: Any) -> None:
        x, cos, sin, start, heads = args
        first, second = np.split(before[0].reshape(len(x), heads, -1), 2, axis=-1)
        c, s = (table[start : start + len(x), None] for table in (cos, sin))
        expected = np.concatenate([first * c - second * s, second * c + first * s], axis=-1)
        np.testing.assert_allclose(x, expected.reshape(x.shape), atol=1e-6 * np.abs(before[0]).max())


def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> NDArray[np.float64]:
    centred = x - x.mean(-1, keepdims=True, dtype=np.float64)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def rms_norm(x: Any, weight: Any, eps: float) -> NDArray[np.float64]:
    x = np.asarray(x, dtype=np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("packing", "matrix_dtype"), [("2bit", "F32"), ("2bit", "BF16"), ("base3", "I8")])
def test_every_kernel_call_matches_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, packing: str, matrix_dtype: str
) -> None:
    policy = bitvla.load(pack_random(tmp_path, CONFIGS[name], packing=packing, matrix_dtype=matrix_dtype))
    checked = CheckedNative()
    monkeypatch.setattr(network_module, "native", checked)
    policy.act(observation(CONFIGS[name], 3))
    tower = policy.config.vision.num_layers * 6 if policy.config.vision.ternary else 0
    assert checked.calls["ternary_linear"] == tower + policy.config.language.num_layers * 7


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pruned_sequence_matches_the_reference(tmp_path: Path, name: str) -> None:
    """Of each image a quarter of the tokens is left out, those that the others resemble; the rest keeps its places."""
    config = CONFIGS[name]
    policy = bitvla.load(pack_random(tmp_path, config, matrix_dtype="F32"), prune=0.25)
    seen = observation(config, 1)
    states: dict[str, NDArray[np.float32]] = {}
    policy.network.record = states.__setitem__
    policy.act(seen)
    reference = ReferenceNetwork(config, random_weights(config))
    _, (plan,), (state,), _ = policy._preprocess([seen], [None])
    kept = np.concatenate([most_different(image, 12) for image in np.split(states["connector"], 2)])
    assert kept.sum() == 24
    places = np.setdiff1d(np.arange(plan.length), plan.image_positions[~kept])
    special = policy._prompt.image_id, policy._prompt.proprio_id
    whole = reference.embed(policy._prompt.ids(seen["instruction"]), *special, states["connector"], state)
    np.testing.assert_allclose(states["decoder.0"], whole[places], rtol=1e-5, atol=1e-6)
    layers = config.language.num_layers
    for index in range(layers):
        expected = reference.decoder_layer(index, states[f"decoder.{index}"], places)
        if index == layers - 1:
            expected = expected[np.isin(places, np.arange(plan.length)[plan.answers])]
        error = np.abs(states[f"decoder.{index + 1}"] - expected) / np.abs(expected).max()
        assert np.median(error) < 1e-5
        assert error.max() < 0.05


def test_no_token_left_out_is_far_from_those_kept() -> None:
    random = np.random.default_rng(0)
    groups = random.permutation(np.repeat(np.arange(6), [1, 2, 3, 4, 5, 6]))
    tokens = (10 * np.eye(6, 40)[groups] + 0.1 * random.standard_normal((21, 40))).astype(np.float32)
    for count in range(1, 22):
        kept = most_different(tokens, count)
        assert kept.sum() == count
        assert len(set(groups[kept])) == min(count, 6)
    assert most_different(np.zeros((4, 8), np.float32), 3).sum() == 3


def test_every_machine_prunes_alike(policy_file: Path) -> None:
    policy = bitvla.load(policy_file, prune=0.5)
    chunks = set()
    for isa in native.available():
        for threads in (1, 2):
            native.set_isa(isa)
            native.set_num_threads(threads)
            chunks.add(policy.act(observation(policy.config, 5)).tobytes())
    assert len(chunks) == 1
    assert bitvla.load(policy_file).act(observation(policy.config, 5)).tobytes() not in chunks


def test_a_prompt_may_end_with_its_images(tmp_path: Path) -> None:
    """The first action slot is read one place before it, at the last image token: that one stays."""
    config = with_prompt(tiny_config(), "{instruction}<proprio_pad>{images}")
    policy = bitvla.load(pack_random(tmp_path, config), prune=0.9)
    seen = observation(config)
    patches, (plan,), _, _ = policy._preprocess([seen], [None])
    pruned, features = policy.network._prune(plan, policy.network.see(patches, [plan]))
    assert pruned.rotary_positions[pruned.answers.start] == plan.answers.start == plan.image_positions[-1]
    assert len(features) == len(pruned.image_positions) in (4, 5)  # two of 16 of each image, and the last
    assert np.isfinite(policy.act(seen)).all()


@pytest.mark.parametrize("share", [-0.1, 1, float("nan")])
def test_what_cannot_be_pruned_is_refused(policy_file: Path, tmp_path: Path, share: float) -> None:
    with pytest.raises(BitvlaError, match="give the share of image tokens to leave out"):
        bitvla.load(policy_file, prune=share)
    with pytest.raises(BitvlaError, match="this one writes its actions as tokens"):
        bitvla.load(pack_random(tmp_path, token_config()), prune=0.5)


def test_what_every_prompt_begins_with_is_read_once(tmp_path: Path) -> None:
    """Only where nothing that changes stands before it; logits are those of a policy that reads everything."""
    for name, template, fixed in (
        ("alike", BEGINS_ALIKE, True),
        ("not", "{instruction}{images}<|end_of_text|>", False),
    ):
        config = with_prompt(token_config(), template)
        path = pack_random(tmp_path / name, config)
        policy, states, logits = bitvla.load(path), {}, []
        policy.network.record = states.__setitem__
        seen = [observation(config, seed) for seed in (0, 1, 0)]
        plans = [policy.plan(one["instruction"]) for one in seen]
        for index, (one, plan) in enumerate(zip(seen, plans, strict=True)):
            assert (plan.fixed > 0) == fixed
            everything, expected = bitvla.load(path), {}
            everything.network.record = expected.__setitem__
            np.testing.assert_array_equal(policy.act(one), everything.act(one))
            np.testing.assert_array_equal(states["logits.3"], expected["logits.3"])
            assert len(states["decoder.0"]) == plan.length - (plan.fixed if index else 0)
            logits.append(expected["logits.3"])
        for unread in (2, 0):  # caches of the batch that have read nothing yet
            policy.act_batch(seen)
            np.testing.assert_array_equal(states["logits.3"], np.concatenate(logits))
            assert len(states["decoder.0"]) == sum(plan.length - plan.fixed for plan in plans) + unread * plan.fixed


@pytest.mark.parametrize("seed", [1, 2])
def test_an_action_is_written_token_by_token(tmp_path: Path, seed: int) -> None:
    """With its cache the runtime gives the logits of a pass over the whole sequence, takes the likeliest token, and
    maps it to a value and to the robot's units."""
    config = token_config()
    policy = bitvla.load(pack_random(tmp_path, config, seed=seed, matrix_dtype="F32"))
    states: dict[str, NDArray[np.float32]] = {}
    policy.network.record = states.__setitem__
    chunk = policy.act(observation(config, seed))
    logits = np.concatenate([states[f"logits.{index}"] for index in range(config.action.dim)])
    tokens = logits.argmax(-1)
    expected = ReferenceNetwork(config, random_weights(config, seed)).token_logits(states["decoder.0"], tokens)
    error = np.abs(logits - expected) / np.abs(expected).max()
    print(np.sort(error.max(-1)), tokens)
    assert np.median(error) < 1e-5
    assert error.max() < 0.05
    # Nine tokens are the centres of eight bins, from high to low; the first two are the same.
    centres = np.array([7, 7, 5, 3, 1, -1, -3, -5, -7]) / 8
    bounds = config.processing.action
    values = [
        (centre + 1) / 2 * (high - low) + low if mask else centre
        for centre, low, high, mask in zip(centres[tokens], bounds.low, bounds.high, bounds.mask, strict=True)
    ]
    np.testing.assert_allclose(chunk, [values], rtol=1e-6)
    states.clear()
    np.testing.assert_array_equal(policy.act(observation(config, seed)), chunk)  # nothing is left of the first call


def test_a_policy_without_a_state_refuses_one(tmp_path: Path) -> None:
    policy = bitvla.load(pack_random(tmp_path, token_config()))
    with pytest.raises(BitvlaError, match="unknown entry 'state'; the policy takes images, instruction"):
        policy.act(observation(policy.config) | {"state": np.zeros(0, np.float32)})


@pytest.mark.parametrize("name", CONFIGS)
def test_packings_give_the_same_bits(tmp_path: Path, name: str) -> None:
    seen, config = observation(CONFIGS[name], 3), CONFIGS[name]
    plain, dense = (bitvla.load(pack_random(tmp_path / packing, config, packing=packing)) for packing in STEPS)
    assert plain.act(seen).tobytes() == dense.act(seen).tobytes()
    assert dense.info()["memory"]["decoder"] < plain.info()["memory"]["decoder"]


def test_instruction_sets_and_threads_give_the_same_bits(policy: Policy) -> None:
    chunks = set()
    for isa in native.available():
        for threads in (1, 2, 3):
            native.set_isa(isa)
            native.set_num_threads(threads)
            chunks.add(policy.act(observation(policy.config, 5)).tobytes())
    assert len(chunks) == 1


def test_calls_do_not_disturb_each_other(policy: Policy, policy_file: Path) -> None:
    """Sequence lengths alternate, so buffers grow, shrink and are used again."""
    seen = [observation(policy.config, seed) for seed in range(4)]
    for index, text in enumerate(["open", "open the drawer and then push the red button", "a", "reach " * 8]):
        seen[index]["instruction"] = text
    first = [policy.act(one) for one in seen]
    copies = [chunk.copy() for chunk in first]
    again = [policy.act(one) for one in reversed(seen)][::-1]
    fresh = [bitvla.load(policy_file).act(one) for one in seen]
    np.testing.assert_array_equal(first, copies)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, fresh)
    assert len({chunk.tobytes() for chunk in first}) == 4


def test_threads_of_the_caller_wait_for_each_other(policy: Policy) -> None:
    seen = [observation(policy.config, seed) for seed in range(3)]
    alone = [policy.act(one) for one in seen]
    with ThreadPoolExecutor(len(seen)) as callers:
        together = list(callers.map(policy.act, seen * 40))
    np.testing.assert_array_equal(together, alone * 40)


def test_a_prefix_may_lie_in_memory_as_it_likes(tmp_path: Path) -> None:
    policy = bitvla.load(pack_random(tmp_path, BATCHED["decided actions"]))
    seen, prefix = observation(policy.config), np.full((3, 4), 0.25)
    np.testing.assert_array_equal(policy.act(seen, np.asfortranarray(prefix)), policy.act(seen, prefix))


BATCHED = CONFIGS | {"action tokens": token_config(), "decided actions": changed(action={"max_prefix": 3})}
BATCHED["flow, decided actions"] = tiny_config(action=msgspec.structs.replace(flow_config().action, max_prefix=3))
BATCHED["a prompt that begins alike"] = with_prompt(token_config(), BEGINS_ALIKE)
TEXTS = ["open the drawer", "a", "push the red button and then the other one", "reach", "open it"]


@pytest.mark.parametrize(
    ("name", "prune"), [*((name, 0.0) for name in BATCHED), ("causal", 0.4), ("decided actions", 0.4)]
)
def test_a_batch_answers_what_each_observation_gets_alone(tmp_path: Path, name: str, prune: float) -> None:
    """Bit for bit, instructions of different lengths, whatever else is in the batch, on one thread and on several."""
    config = BATCHED[name]
    load = partial(bitvla.load, pack_random(tmp_path, config), prune=prune)
    policy, random = load(), np.random.default_rng(0)
    seen = [observation(config, seed) | {"instruction": text} for seed, text in enumerate(TEXTS)]
    dim, most = config.action.dim, config.action.max_prefix
    prefixes = [random.normal(size=(count, dim)) if count else None for count in np.arange(len(seen)) % (most + 1)]
    native.set_num_threads(1)
    alone = [load().act(*given).tobytes() for given in zip(seen, prefixes, strict=True)]
    assert len(set(alone)) >= 4  # action tokens may be the same by chance
    for threads, order in [(1, [0]), (1, [4, 3, 2, 1, 0]), (3, [0, 1, 2, 3, 4]), (1, [1, 1]), (1, [2, 0, 3]), (1, [3])]:
        native.set_num_threads(threads)
        chunks = policy.act_batch([seen[i] for i in order], [prefixes[i] for i in order])
        assert chunks.shape == (len(order), config.action.horizon, dim)
        assert [chunk.tobytes() for chunk in chunks] == [alone[i] for i in order]


def test_a_batch_of_the_shipped_policy() -> None:
    policy = bitvla.load(NANO, threads=1)
    seen = [serving_observation(seed) for seed in range(3)]
    prefixes = [None, policy.act(seen[0])[:3], policy.act(seen[0])[:1]]
    alone = [policy.act(*given).tobytes() for given in zip(seen, prefixes, strict=True)]
    assert [chunk.tobytes() for chunk in policy.act_batch(seen, prefixes)] == alone


def test_a_batch_that_cannot_be_answered_is_refused(policy: Policy) -> None:
    good = observation(policy.config)
    with pytest.raises(BitvlaError, match="observation 1 of the batch: the observation lacks the entry 'state'"):
        policy.act_batch([good, without(good, "state"), good])
    with pytest.raises(BitvlaError, match=r"observation 2 of the batch: .* was not trained to continue"):
        policy.act_batch([good] * 3, [None, None, np.zeros((1, 4))])
    for wrong in (([],), ([], []), ([good], [None, None])):
        with pytest.raises(BitvlaError, match="at least one observation, and a prefix or None for each"):
            policy.act_batch(*wrong)
    assert policy.act_batch([good])[0].tobytes() == policy.act(good).tobytes()


def test_steady_state_allocates_nothing_large(policy: Policy) -> None:
    """Buffers are those of the largest batch so far."""
    seen = [observation(policy.config, seed) for seed in range(3)]
    policy.act_batch(seen)
    before = {name: flat.ctypes.data for name, flat in policy.network.workspace._flat.items()}
    for count in (1, 3, 2):
        policy.act_batch(seen[:count])
    assert {name: flat.ctypes.data for name, flat in policy.network.workspace._flat.items()} == before


def test_chunk_is_in_the_robots_units(policy: Policy) -> None:
    chunk = policy.act(observation(policy.config))
    action = policy.config.action
    assert chunk.shape == (action.horizon, action.dim)
    assert chunk.dtype == np.float32
    assert policy.timings.keys() == set(PARTS)
    assert all(time > 0 for time in policy.timings.values())


def test_info_is_plain_data(policy: Policy) -> None:
    info = json.loads(json.dumps(policy.info()))
    assert [camera["name"] for camera in info["cameras"]] == ["corner", "wrist"]
    assert info["control_hz"] == 20
    assert info["instruction_set"] in native.available()
    assert info["memory"]["vision"] > 0


# What is refused.


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


BAD_OBSERVATIONS = {
    "not a dictionary": (lambda seen: [1, 2], r"observation is a list"),
    "no images": (lambda seen: without(seen, "images"), r"lacks the entry 'images'"),
    "no state": (lambda seen: without(seen, "state"), r"lacks the entry 'state'"),
    "unknown entry": (lambda seen: seen | {"force": 1}, r"unknown entry 'force'"),
    "missing camera": (lambda seen: seen | {"images": without(seen["images"], "wrist")}, r"lacks the camera 'wrist'"),
    "extra camera": (
        lambda seen: seen | {"images": seen["images"] | {"top": seen["images"]["wrist"]}},
        r"unknown camera 'top'",
    ),
    "images as a list": (lambda seen: seen | {"images": list(seen["images"].values())}, r"is a list"),
    "float image": (lambda seen: with_image(seen, np.zeros((30, 30, 3), np.float32)), r"'wrist' has dtype float32"),
    "wrong size": (lambda seen: with_image(seen, np.zeros((31, 30, 3), np.uint8)), r"'wrist' has shape \(31, 30, 3\)"),
    "channels first": (lambda seen: with_image(seen, np.zeros((3, 30, 30), np.uint8)), r"shape \(3, 30, 30\)"),
    "one channel": (lambda seen: with_image(seen, np.zeros((30, 30, 1), np.uint8)), r"shape \(30, 30, 1\)"),
    "no image": (lambda seen: with_image(seen, None), r"'wrist' is a NoneType"),
    "nan state": (lambda seen: seen | {"state": [0.0, np.nan, 0.0]}, r"'s1' is nan"),
    "infinite state": (lambda seen: seen | {"state": [0.0, 0.0, np.inf]}, r"'s2' is inf"),
    "short state": (lambda seen: seen | {"state": [0.0]}, r"shape \(1,\)"),
    "text state": (lambda seen: seen | {"state": "closed"}, r"state is not a vector of numbers: 'closed'"),
    "numbers as text": (lambda seen: seen | {"state": ["0.1"] * 3}, r"not a vector of numbers"),
    "complex state": (lambda seen: seen | {"state": np.ones(3, complex)}, r"not a vector of numbers"),
    "times": (lambda seen: seen | {"state": np.zeros(3, "m8[s]")}, r"not a vector of numbers"),
    "huge state": (lambda seen: seen | {"state": [10**400] * 3}, r"not a vector of numbers"),
    "objects as a state": (lambda seen: seen | {"state": np.array([object()] * 99)}, r"not a vector of numbers"),
    "a state that is no array": (lambda seen: seen | {"state": NoArray()}, r"not a vector of numbers"),
    "empty instruction": (lambda seen: seen | {"instruction": " \n"}, r"instruction is empty"),
    "no text": (lambda seen: seen | {"instruction": None}, r"instruction is None, not a text"),
    "bytes": (lambda seen: seen | {"instruction": b"open"}, r"instruction is b'open', not a text"),
    "unhashable text": (lambda seen: seen | {"instruction": ["open"]}, r"instruction is \['open'\], not a text"),
    "half a character": (lambda seen: seen | {"instruction": "open \udcff"}, r"'open \\udcff' cannot become tokens"),
    "long instruction": (lambda seen: seen | {"instruction": "push the button " * 99}, r"shorten it"),
    "special token": (lambda seen: seen | {"instruction": "open <|image_pad|>"}, r"reserved tokens"),
}


class NoArray:
    """As a tensor of PyTorch that needs a gradient, or lies on a GPU."""

    def __array__(self, *_: Any, **__: Any) -> NDArray[Any]:
        raise RuntimeError("call detach() first\nor cpu()")


def with_image(seen: dict[str, Any], image: Any) -> dict[str, Any]:
    return seen | {"images": seen["images"] | {"wrist": image}}


@pytest.mark.parametrize("name", BAD_OBSERVATIONS)
def test_bad_observations_are_refused(policy: Policy, name: str) -> None:
    spoil, message = BAD_OBSERVATIONS[name]
    good = observation(policy.config)
    with pytest.raises(BitvlaError, match=message) as caught:
        policy.act(spoil(good))
    assert "\n" not in str(caught.value)
    policy.act(good)  # and the policy goes on


def test_a_sequence_beyond_the_rotary_table_is_refused(tmp_path: Path) -> None:
    policy = bitvla.load(pack_random(tmp_path, changed(language={"max_positions": 60})))
    with pytest.raises(BitvlaError, match="built for 60"):
        policy.act(observation(policy.config) | {"instruction": "x y z " * 4})


def test_an_answer_that_is_not_finite_is_refused(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy.network, "act", lambda *_: np.full((1, 5, 4), np.nan, np.float32))
    with pytest.raises(BitvlaError, match="not finite"):
        policy.act(observation(policy.config))


@pytest.mark.parametrize("mapped", [False, True])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no digest is computed: quantised, it would move the robot. The embedding's are, when they are read."""
    if mapped:
        monkeypatch.setattr(bundle, "READ_AT_LOAD", 0)
    path = pack_random(tmp_path, tiny_config(), matrix_dtype="BF16")
    good = bundle.read(path)
    document = msgspec.structs.replace(good.document, tokenizer=good.tokenizer())
    for name, value in (
        ("language_model.model.norm.weight", np.nan),
        ("vision_tower.vision_model.embeddings.position_embedding.weight", -np.inf),
        ("multi_modal_projector.linear_1.weight", 0x7F80),  # infinity in bfloat16
        ("multi_modal_projector.linear_1.weight", 0xFF80),
        ("action_head.model.fc2.weight", 0xFFC0),  # NaN
        (bundle.EMBEDDING, 0x7FC0),
    ):
        spoilt = np.array(good.tensors[name])
        spoilt[..., 0] = value
        bundle.write(path, document, {**good.tensors, name: spoilt})
        load = partial(bitvla.load, path)
        refusing = partial(load().act, observation(good.config)) if name == bundle.EMBEDDING else load
        with pytest.raises(BitvlaError, match=f"^{name} holds a value that is not finite"):
            refusing()
    bundle.check_finite("the largest numbers", np.array([0x7F7F, 0xFF7F], np.uint16))


@pytest.mark.parametrize("threads", [0, -1, 1025, 1 << 40, 2.5, "2"])
def test_a_number_of_threads_that_cannot_be_is_refused(policy_file: Path, threads: Any) -> None:
    with pytest.raises(BitvlaError, match=f"threads is {threads!r}; give a whole number from 1 to 1024"):
        bitvla.load(policy_file, threads=threads)


def test_unknown_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BitvlaError, match=r"cannot read the policy file .*gone\.safetensors: No such file"):
        bitvla.load(tmp_path / "gone.safetensors")
    with pytest.raises(BitvlaError, match="is a folder"):
        bitvla.load(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BitvlaError, match="pip install huggingface_hub"):
        bitvla.load("somebody/policy")


def test_hub_ids_are_fetched(policy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    hub = SimpleNamespace(hf_hub_download=lambda *args: asked.append(args) or str(policy_file))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert bitvla.load("somebody/policy").config.name == "tiny"
    assert asked == [("somebody/policy", "policy.safetensors")]


# Instruction sets.


class TwoSets:
    """The native module as on a machine whose faster instruction set ("broken") spoils one kernel."""

    def __init__(self, spoiled: str) -> None:
        self.spoiled, self.active = spoiled, "broken"

    def available(self) -> list[str]:
        return ["broken", "scalar"]

    def isa(self) -> str:
        return self.active

    def set_isa(self, name: str) -> None:
        self.active = name
        native.set_isa("scalar")

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(native, name)

        def call(*args: Any, **options: Any) -> None:
            kernel(*args, **options)
            if name == self.spoiled and self.active == "broken":
                out = next(value for value in reversed(args) if isinstance(value, np.ndarray))
                out.reshape(-1)[-1] += 1

        return call


KERNELS = [
    "quantize", "ternary_matmul", "ternary_linear", "layer_norm_quantize", "rms_norm_quantize", "gelu_quantize",
    "relu2_gate_norm_quantize", "gelu", "attention", "linear",
]  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_wrong_kernel_is_found_at_load(
    policy_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernel: str
) -> None:
    machine = TwoSets(kernel)
    monkeypatch.setattr(selftest, "native", machine)
    with caplog.at_level(logging.WARNING, "bitvla"):
        policy = bitvla.load(policy_file)
    assert policy.isa == machine.active == "scalar"
    assert "broken kernels differ" in caplog.text
    assert kernel in caplog.text


def test_right_kernels_are_kept_silently(policy_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert bitvla.load(policy_file).isa == native.isa()
    assert not caplog.records


def test_an_instruction_set_can_be_forced(policy_file: Path) -> None:
    code = "import bitvla, sys; print(bitvla.load(sys.argv[1]).info()['instruction_set'])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(policy_file)],
        env=os.environ | {"BITVLA_ISA": "scalar"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "scalar"
