"""The policy file: what is written comes back in place; what is damaged, foreign or altered is refused in one line.

pytest tests/test_bundle.py
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

import bitvla
from bitvla import BitvlaError, bundle
from bitvla.bundle import Bundle, read, stored_tensors, tensor_specs, to_bfloat16, to_float32, write
from bitvla.quantization import quantize_activations
from bitvla.runtime.inspect import inspect
from bitvla.runtime.policy import Policy
from checkpoints import observation, pack_random, tiny_config


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest policy: corruption tests read it thousands of times."""
    config = tiny_config()
    one_layer = {
        name: msgspec.structs.replace(getattr(config, name), num_layers=1, hidden_size=8, num_heads=2)
        for name in ("vision", "language")
    }
    one_layer["language"] = msgspec.structs.replace(one_layer["language"], num_kv_heads=1)
    config = msgspec.structs.replace(config, **one_layer)
    return pack_random(tmp_path_factory.mktemp("policy"), config, golden=1, matrix_dtype="BF16")


@pytest.fixture(scope="module")
def content(path: Path) -> bytes:
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "policy.safetensors"


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(BitvlaError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header with its document parsed, and the data."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"]["bitvla"] = json.loads(header["__metadata__"]["bitvla"])
    return header, content[end:]


def assemble(header: dict[str, Any], data: bytes) -> bytes:
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and "bitvla" in metadata and not isinstance(metadata["bitvla"], str):
        header = header | {"__metadata__": metadata | {"bitvla": json.dumps(metadata["bitvla"])}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# What is written.


def test_safetensors_reads_the_same_tensors(path: Path) -> None:
    policy = read(path)
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == policy.tensors.keys() == stored_tensors(policy.document).keys()
        for name in file.keys():  # noqa: SIM118  not a dictionary
            if file.get_slice(name).get_dtype() != "BF16":
                np.testing.assert_array_equal(file.get_tensor(name), policy.tensors[name])


def test_weights_are_used_in_place_and_aligned(path: Path) -> None:
    policy = read(path)
    for name, spec in tensor_specs(policy.config).items():
        tensor = policy.tensors[name]
        assert not tensor.flags.owndata
        assert not tensor.flags.writeable
        assert tensor.ctypes.data % (64 if spec.kind == "ternary" else tensor.itemsize) == 0


def test_the_same_policy_gives_the_same_bytes(path: Path, content: bytes, scratch: Path) -> None:
    policy = read(path)
    assert write(scratch, policy.document, policy.tensors) == policy.sha256
    assert scratch.read_bytes() == content


def test_every_weight_has_one_place(path: Path) -> None:
    """Packed tensors hold exactly the parameters of the network, and the file nothing else."""
    policy = read(path)
    stored = stored_tensors(policy.document)
    assert {name.removesuffix("_scale") for name in stored if not name.startswith("golden.")} == set(
        tensor_specs(policy.config)
    )
    assert sum(tensor.nbytes for tensor in stored.values()) < os.path.getsize(path)


def test_wrong_tensors_are_not_written(path: Path, scratch: Path) -> None:
    policy = read(path)
    norm = "language_model.model.norm.weight"
    with pytest.raises(ValueError, match=r"norm\.weight"):
        write(scratch, policy.document, {name: t for name, t in policy.tensors.items() if name != norm})
    with pytest.raises(ValueError, match="float64"):
        write(scratch, policy.document, {**policy.tensors, norm: policy.tensors[norm].astype(np.float64)})


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    policy, target = read(path), tmp_path / "policy.safetensors"
    target.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(BitvlaError, match=r"cannot write .*No space left on device"):
        write(target, policy.document, policy.tensors)
    assert [file.name for file in tmp_path.iterdir()] == ["policy.safetensors"]
    assert target.read_bytes() == b"old"


def test_what_cannot_be_a_file_is_named(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = read(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BitvlaError, match=r"^\. is a folder: name a file in it$"):
        write(Path(), policy.document, policy.tensors)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = read(path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "policy.safetensors", policy.document, policy.tensors)
    assert not list(tmp_path.iterdir())


# What is refused.


def test_truncated_files_are_refused(content: bytes, scratch: Path) -> None:
    start = 8 + int.from_bytes(content[:8], "little")
    ends = [bound for entry in header_of(content)[0].values() for bound in entry.get("data_offsets", ())]
    bounds = {0, 1, 7, 8, 9, start, len(content)} | {start + end for end in ends}
    lengths = {bound + step for bound in bounds for step in (-1, 0, 1) if 0 <= bound + step < len(content)}
    for length in sorted(lengths):
        scratch.write_bytes(content[:length])
        assert length < start or "truncated" in refused(scratch)
        refused(scratch, digest=False)
    scratch.write_bytes(content + b"\0")
    refused(scratch)
    refused(scratch, digest=False)


@settings(max_examples=300)
@given(data=st.data())
def test_altered_bytes_are_found(path: Path, content: bytes, scratch: Path, data: st.DataObject) -> None:
    """Any change is an error, or (as in the header's padding) leaves policy and weights exactly as they were."""
    header_end = 8 + int.from_bytes(content[:8], "little")
    limit = header_end if data.draw(st.booleans()) else len(content)
    altered = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        altered[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    scratch.unlink(missing_ok=True)  # a new file: the map of the last one must not change under a reader
    scratch.write_bytes(altered)
    try:
        policy = read(scratch)
    except BitvlaError as error:
        assert "\n" not in str(error)  # noqa: PT017  either outcome is right
    else:
        same_policy(policy, read(path))


def same_policy(one: Bundle[Any], other: Bundle[Any]) -> None:
    assert one.document == other.document
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor, other.tensors[name])


@settings(max_examples=200)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_refused(scratch: Path, content: bytes, plausible: bool) -> None:
    scratch.unlink(missing_ok=True)
    scratch.write_bytes(len(content).to_bytes(8, "little") + content if plausible else content)
    refused(scratch)


NASTY = (None, True, -1, 0, 1, 3, 2**31, 2**63, 2**64, 1e308, "", "x", "U8", [], [0], [2**62, 2**62], {}, {"x": 1})


def mutations(value: Any) -> Iterator[Any]:
    """`value` with each field, at any depth, left out or replaced by each nasty value."""
    yield from NASTY
    if isinstance(value, dict):
        for key, item in value.items():
            yield {name: other for name, other in value.items() if name != key}
            for changed in mutations(item):
                yield value | {key: changed}
        yield value | {"unknown": 1}
    if isinstance(value, list):
        for index, item in enumerate(value):
            for changed in mutations(item):
                yield [*value[:index], changed, *value[index + 1 :]]


def test_every_tensor_entry_may_be_wrong(content: bytes, scratch: Path) -> None:
    header, data = header_of(content)
    names = [next(name for name in header if header[name].get("dtype") == dtype) for dtype in ("U8", "F32", "BF16")]
    cases = [header | {name: changed} for name in names for changed in mutations(header[name])]
    cases += [header | {"__metadata__": changed} for changed in NASTY]
    assert len(cases) > 200
    for case in cases:
        if json.dumps(case) == json.dumps(header):
            continue
        scratch.unlink(missing_ok=True)
        scratch.write_bytes(assemble(case, data))
        refused(scratch, digest=False)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_every_field_of_the_document_may_be_wrong(path: Path, content: bytes, scratch: Path) -> None:
    """Without the digest, as for a large file: one line, or a policy that answers with finite actions."""
    header, data = header_of(content)
    seen = observation(read(path).config)
    outcomes = {"refused": 0, "acted": 0}
    for changed in mutations(header["__metadata__"]["bitvla"]):
        scratch.unlink(missing_ok=True)
        scratch.write_bytes(assemble(header | {"__metadata__": {"sha256": "0", "bitvla": changed}}, data))
        try:
            assert np.isfinite(Policy(read(scratch, digest=False)).act(seen)).all()
            outcomes["acted"] += 1
        except BitvlaError as error:
            assert "\n" not in str(error)  # noqa: PT017  most cases must raise, not all
            outcomes["refused"] += 1
    assert outcomes["refused"] > 1500
    assert outcomes["acted"] > 100  # the unchanged meaning of a field: other names, units, rates


@pytest.mark.parametrize(
    "header",
    [b"[" * 100_000, b'{"a":' * 100_000, b"{" * 8, b'{"__metadata__":{"bitvla":"' + b"[" * 99_999 + b'","sha256":""}}'],
    ids=["lists", "objects", "braces", "document"],
)
def test_deep_json_is_refused(scratch: Path, header: bytes) -> None:
    scratch.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    refused(scratch)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, (100 << 20) + 1])
def test_a_huge_header_is_refused_without_reading_it(scratch: Path, length: int) -> None:
    with scratch.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(200 << 20)  # sparse: takes no room
    assert "its header would have" in refused(scratch)
    scratch.unlink()


def test_foreign_files_are_named(scratch: Path) -> None:
    save_file({"weight": np.zeros(3, np.float32)}, scratch)
    assert "bitvla pack" in refused(scratch)
    scratch.write_bytes(pickle.dumps({"weights": list(range(1000))}))
    refused(scratch)
    scratch.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(scratch)


def with_document(content: bytes, **changes: Any) -> bytes:
    header, data = header_of(content)
    header["__metadata__"]["bitvla"] |= changes
    return assemble(header, data)


def test_formats_of_other_versions_are_named(content: bytes, scratch: Path) -> None:
    scratch.write_bytes(with_document(content, format=5, new_field=1))
    assert "format 5, this bitvla reads formats 1 to 4; update bitvla" in refused(scratch, digest=False)
    scratch.write_bytes(with_document(content, format=0))
    assert "pack it again" in refused(scratch, digest=False)


def test_format_1_is_read(content: bytes, scratch: Path) -> None:
    """It had no field for the packing of ternary weights."""
    header, data = header_of(content)
    document = header["__metadata__"]["bitvla"]
    document["format"] = 1
    del document["packing"]
    scratch.write_bytes(assemble(header, data))
    assert read(scratch, digest=False).document.packing == "2bit"


def test_format_2_is_read(tmp_path: Path) -> None:
    """With int8 matrices the layer that writes actions was one of them."""
    path = pack_random(tmp_path, tiny_config(), matrix_dtype="I8")
    policy, layer = bitvla.load(path), "action_head.model.fc2.weight"
    document = msgspec.structs.replace(policy.bundle.document, format=2)
    codes, scales = quantize_activations(to_float32(policy.bundle.tensors[layer]))
    write(path, document, {**policy.bundle.tensors, layer: codes, f"{layer}_scale": scales})
    seen, older = observation(policy.config), bitvla.load(path)
    assert older.bundle.tensors[layer].dtype == np.int8
    np.testing.assert_allclose(older.act(seen), policy.act(seen), atol=0.1)
    assert inspect(path)["format"] == 2


def test_format_3_is_read(content: bytes, scratch: Path) -> None:
    """Its towers had no FiLM, and no field for it."""
    header, data = header_of(content)
    document = header["__metadata__"]["bitvla"]
    document["format"] = 3
    del document["config"]["vision"]["film"]
    scratch.write_bytes(assemble(header, data))
    assert not read(scratch, digest=False).config.vision.film


def test_altered_statistics_are_found(content: bytes, scratch: Path) -> None:
    """A plausible edit of the header: another bound of the action, everything else as it was."""
    config = header_of(content)[0]["__metadata__"]["bitvla"]["config"]
    config["processing"]["action"]["high"][0] += 0.125
    scratch.write_bytes(with_document(content, config=config))
    assert "altered" in refused(scratch)


def test_tensors_that_do_not_fit_are_named(content: bytes, scratch: Path) -> None:
    header, data = header_of(content)
    norm = "language_model.model.norm.weight"
    cases = {
        f"lacks the tensor {norm}": {name: entry for name, entry in header.items() if name != norm},
        "unexpected tensor lm_head": header | {"lm_head": header[norm]},
        rf"{norm} is F32 \[4\], the policy needs F32 \[8\]": header | {norm: header[norm] | {"shape": [4]}},
    }
    for message, case in cases.items():
        scratch.write_bytes(assemble(case, data))
        with pytest.raises(BitvlaError, match=message):
            read(scratch, digest=False)


def test_tensors_in_other_places_are_refused(content: bytes, scratch: Path) -> None:
    """Beyond the end, between two values, or (same size, other weights) exchanged."""
    header, data = header_of(content)
    q, k = (f"vision_tower.vision_model.encoder.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    norm = "language_model.model.norm.weight"
    start, end = header[norm]["data_offsets"]

    def moved(name: str, start: int, end: int) -> bytes:
        return assemble(header | {name: header[name] | {"data_offsets": [start, end]}}, data)

    scratch.write_bytes(moved(norm, len(data), len(data) + end - start))
    assert f"truncated: tensor {norm}" in refused(scratch, digest=False)
    scratch.write_bytes(moved(norm, start + 1, end + 1))
    assert f"damaged: tensor {norm}" in refused(scratch, digest=False)
    start = 8 + int.from_bytes(content[:8], "little")
    exact = json.loads(content[8:start])  # with the document's very text, which the digest covers as well
    scratch.write_bytes(assemble(exact, data))
    read(scratch)
    scratch.unlink()
    scratch.write_bytes(assemble(exact | {q: exact[k], k: exact[q]}, data))
    assert "SHA-256" in refused(scratch)


def test_a_description_of_millions_of_golden_images_costs_nothing(content: bytes, scratch: Path) -> None:
    config = header_of(content)[0]["__metadata__"]["bitvla"]["config"]
    config["processing"]["cameras"] = [{"name": str(index), "height": 1, "width": 1} for index in range(40)]
    config["language"]["max_positions"] = 1 << 20
    scratch.write_bytes(with_document(content, config=config, golden=["open"] * 40))
    assert "1600 layers or golden images" in refused(scratch, digest=False)


@pytest.mark.parametrize(
    ("section", "field"), [("vision", "num_layers"), ("language", "num_layers"), ("action", "head_blocks")]
)
def test_a_description_of_millions_of_layers_costs_nothing(
    content: bytes, scratch: Path, section: str, field: str
) -> None:
    config = header_of(content)[0]["__metadata__"]["bitvla"]["config"]
    config[section][field] = (1 << 24) - 1
    scratch.write_bytes(with_document(content, config=config))
    assert "layers or golden images" in refused(scratch, digest=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_impossible_scales_are_named(path: Path, scratch: Path, value: float) -> None:
    policy = read(path)
    name = next(name for name in policy.tensors if name.endswith("_scale"))
    write(scratch, policy.document, {**policy.tensors, name: np.array([value], np.float32)})
    assert name in refused(scratch)


def test_large_files_are_hashed_on_request_only(
    path: Path, content: bytes, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "READ_AT_LOAD", len(content) - 1)
    altered = bytearray(content)
    altered[-1] ^= 1  # a pixel of a golden image
    scratch.write_bytes(altered)
    read(scratch)
    assert "SHA-256" in refused(scratch, digest=True)


def test_mapped_and_read_policies_are_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = bitvla.load(path)
    monkeypatch.setattr(bundle, "READ_AT_LOAD", 0)
    mapped = bitvla.load(path)
    seen = observation(small.config)
    np.testing.assert_array_equal(small.act(seen), mapped.act(seen))


@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_a_mapped_file_keeps_its_tokenizer_to_itself(
    path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """Its text is read when it is needed, and the tokenizer stays only where it is small."""
    small = read(path)
    monkeypatch.setattr(bundle, "READ_AT_LOAD", 0)
    monkeypatch.setattr("bitvla.runtime.policy.TOKENIZER_KEPT", kept)
    mapped = bitvla.load(path)
    assert mapped.bundle.document.tokenizer == ""
    assert mapped.bundle.tokenizer() == small.tokenizer() == small.document.tokenizer
    assert (mapped._prompt is None) == (kept == 0)
    ids = [mapped.plan(instruction).text_positions.tolist() for instruction in ("open it", "close it", "open it")]
    assert ids[0] == ids[2]
    with pytest.raises(ValueError, match="no tokenizer"):
        write(scratch, mapped.bundle.document, mapped.bundle.tensors)


def test_a_small_file_may_be_overwritten_while_in_use(path: Path, scratch: Path) -> None:
    scratch.write_bytes(path.read_bytes())
    policy = bitvla.load(scratch)
    seen = observation(policy.config)
    before = policy.act(seen)
    scratch.write_bytes(b"")
    seen["instruction"] = "another sentence"  # whose embeddings are looked up anew
    policy.act(seen)
    seen = observation(policy.config)
    np.testing.assert_array_equal(policy.act(seen), before)


def test_a_damaged_tokenizer_is_refused(path: Path, scratch: Path) -> None:
    policy = read(path)
    write(scratch, msgspec.structs.replace(policy.document, tokenizer='{"model": 1}'), policy.tensors)
    with pytest.raises(BitvlaError, match="tokenizer is damaged"):
        bitvla.load(scratch)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_token_without_an_embedding_is_refused(
    path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    """Of a mapped file, what follows the embedding would be read."""
    policy = read(path)
    tokenizer = json.loads(policy.tokenizer())
    tokenizer["model"]["vocab"]["q"] = policy.config.language.vocab_size
    write(scratch, msgspec.structs.replace(policy.document, tokenizer=json.dumps(tokenizer)), policy.tensors)
    if mapped:
        monkeypatch.setattr(bundle, "READ_AT_LOAD", 0)
    with pytest.raises(BitvlaError, match=r"embed_tokens\.weight has 300 rows, none of them for token 300"):
        bitvla.load(scratch).act(observation(policy.config) | {"instruction": "q"})


def test_a_tokenizer_shortens_and_fills_nothing(path: Path, scratch: Path) -> None:
    """Training libraries leave in its file how they did."""
    policy = read(path)
    tokenizer = Tokenizer.from_str(policy.tokenizer())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=99)
    write(scratch, msgspec.structs.replace(policy.document, tokenizer=tokenizer.to_str()), policy.tensors)
    seen = observation(policy.config)
    np.testing.assert_array_equal(bitvla.load(scratch).act(seen), bitvla.load(path).act(seen))


def test_the_smallest_policy_acts(path: Path) -> None:
    policy = bitvla.load(path)
    assert policy.act(observation(policy.config)).shape == (5, 4)


# bfloat16.


@given(arrays(np.float32, st.integers(1, 20), elements=st.floats(-(2.0**120), 2.0**120, width=32)))
def test_bfloat16_rounds_to_the_nearest(values: np.ndarray) -> None:
    rounded = to_bfloat16(values)
    error = np.abs(to_float32(rounded).astype(np.float64) - values)
    for step in (-1, 1):
        neighbour = to_float32((rounded.astype(np.int32) + step).astype(np.uint16)).astype(np.float64)
        other = np.abs(neighbour - values)
        better = np.isfinite(neighbour) & ((other < error) | ((other == error) & (rounded % 2 == 1) & (error > 0)))
        assert not better.any()


def test_bfloat16_ties_go_to_even() -> None:
    ties = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)
    assert to_bfloat16(ties).tolist() == [0x3F80, 0x3F82]


LIMITED = """
import resource
from pathlib import Path
from bitvla import bundle
from bitvla.config import LanguageConfig
from bitvla.errors import BitvlaError
from bitvla.runtime.network import Cache, Workspace
bundle.READ_AT_LOAD = {read_at_load}
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)
try:
    {call}
except BitvlaError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="this limit is Linux's")
@pytest.mark.parametrize(
    ("call", "read_at_load", "said"),
    [
        ("bundle.read(Path({path!r}))", 0, "policy.safetensors, which takes 67.1 MB"),  # mapped
        ("bundle.read(Path({path!r}))", 1 << 30, "policy.safetensors, which takes 67.1 MB"),  # read
        ("Workspace().floats('up', 6912, 2560)", 0, "no memory for the buffer 'up', which takes 70.8 MB"),
        ("Cache(LanguageConfig(), 4096)", 0, "no memory for the keys and values of 4096 tokens, which takes 629.1 MB"),
    ],
)
def test_a_limit_of_memory_is_named(tmp_path: Path, call: str, read_at_load: int, said: str) -> None:
    """`ulimit -v` just above what the process has already."""
    path = tmp_path / "policy.safetensors"
    with path.open("wb") as file:
        file.truncate(64 << 20)  # sparse: takes no room, and nothing of it is read
    script = LIMITED.format(call=call.format(path=str(path)), read_at_load=read_at_load)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert said in done.stdout, done.stdout + done.stderr
    assert "ulimit -v" in done.stdout
