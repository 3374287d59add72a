"""Language models: BitNet checkpoints pack, and write what transformers' BitNet would; errors name what is wrong.

pytest tests/test_language.py
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitNetConfig, BitNetForCausalLM

import bitvla
import bitvla._native as native
from bitvla import BitvlaError
from bitvla.bundle import read_language_model, tensor_specs
from bitvla.cli import main
from bitvla.config import ChatConfig, from_dict, to_dict
from bitvla.convert.make_checkpoint import make_checkpoint
from bitvla.convert.pack import pack
from bitvla.convert.weights import pack_rows
from bitvla.model.ternary import make_ternary
from bitvla.quantization import ternarize
from bitvla.runtime.bench import bench
from bitvla.runtime.language import Conversation, LanguageModel, Sampler
from bitvla.runtime.network import Cache
from bitvla.runtime.verify import verify
from checkpoints import pack_random, tiny_config

SHARD = "model-00001-of-00001.safetensors"
PROMPT = "What is on the table?"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16 that no test changes, like microsoft/bitnet-b1.58-2B-4T-bf16."""
    folder = tmp_path_factory.mktemp("latent") / "checkpoint"
    make_checkpoint(folder, kind="language-bf16", reduced=True)
    return folder


@pytest.fixture(scope="module")
def model_file(latent: Path) -> Path:
    pack(latent, latent.parent / "model.safetensors")
    return latent.parent / "model.safetensors"


@pytest.fixture(scope="module")
def model(model_file: Path) -> LanguageModel:
    return LanguageModel.load(model_file)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint that no test changes, like microsoft/bitnet-b1.58-2B-4T."""
    folder = tmp_path_factory.mktemp("packed") / "checkpoint"
    make_checkpoint(folder, kind="language", reduced=True)
    return folder


@pytest.fixture
def packed(published: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(published, tmp_path / "packed"))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """The edited weights as one file, the other layout in which they are published."""
    tensors = load_file(folder / SHARD)
    edit(tensors)
    (folder / SHARD).unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors")


# The arithmetic.


def transformers_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """Logits (tokens, V) in float32, of the official module with our fake quantisation in it."""
    config = BitNetConfig(**json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"})
    network = BitNetForCausalLM(config).float().eval()
    tensors = {name: tensor.float() for name, tensor in load_file(folder / SHARD).items()}
    missing, unexpected = network.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) == {"lm_head.weight"}
    network.tie_weights()
    make_ternary(network.model)
    with torch.no_grad():
        return network(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("seed", [1, 2])
def test_logits_are_those_of_transformers(tmp_path: Path, seed: int) -> None:
    """Sums in another order flip an int8 code here and there; the median is what a wrong formula cannot keep small."""
    make_checkpoint(tmp_path / "checkpoint", kind="language-bf16", reduced=True, seed=seed)
    pack(tmp_path / "checkpoint", tmp_path / "model.safetensors")
    model = LanguageModel.load(tmp_path / "model.safetensors")
    ids = model.chat.encode(model.config.chat.begin + model.config.chat.turn.replace("{prompt}", PROMPT))
    expected, cache = transformers_logits(tmp_path / "checkpoint", ids), Cache(model.config.language, len(ids))
    actual = np.stack([model.logits([token], cache).copy() for token in ids])
    errors = np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)
    print(np.sort(errors))
    assert np.median(errors) < 1e-5
    assert errors.max() < 0.1


@pytest.mark.parametrize("isa", native.available())
def test_decoding_equals_reading_again_bit_for_bit(model: LanguageModel, isa: str) -> None:
    """With the cache, in one block, or in several: the same logits."""
    native.set_isa(isa)
    ids = np.random.default_rng(0).integers(0, 128000, 45).tolist()
    cache = Cache(model.config.language, 1)
    for length in range(1, len(ids) + 1):
        cache = cache.grown(length)
        step = model.logits(ids[length - 1 : length], cache).copy()
        if length % 11 and length != len(ids):
            continue
        whole = Cache(model.config.language, length)
        np.testing.assert_array_equal(step, model.logits(ids[:length], whole))
        np.testing.assert_array_equal(cache.keys, whole.keys)
        parts = Cache(model.config.language, length)
        for start in range(0, length, 17):
            last = model.logits(ids[start : min(start + 17, length)], parts)
        np.testing.assert_array_equal(step, last)


def test_packings_give_the_same_logits(latent: Path, model: LanguageModel, tmp_path: Path) -> None:
    pack(latent, tmp_path / "base3.safetensors", packing="base3")
    dense = LanguageModel.load(tmp_path / "base3.safetensors")
    ids = list(range(40))
    assert dense.bundle.document.packing == "base3"
    for tokens in (ids, [7]):
        logits = [each.logits(tokens, Cache(each.config.language, 40)).tobytes() for each in (model, dense)]
        assert logits[0] == logits[1]


def test_bench_measures_writing(model_file: Path) -> None:
    result = bench(model_file, threads=1, repeats=3)
    json.dumps(result)
    assert [row["part"] for row in result["latency"]] == ["decoder", "head"]
    for row in result["latency"]:
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["share"] == pytest.approx(row["gb_per_s"] / row["bandwidth"])
    with pytest.raises(BitvlaError, match="neither views nor batches"):
        bench(model_file, views=2)
    with pytest.raises(BitvlaError, match="neither views nor batches"):
        bench(model_file, batch=2)
    with pytest.raises(BitvlaError, match="4097 tokens after 69 do not fit into the 4096"):
        bench(model_file, threads=1, repeats=4097)


# What is written.


def test_packed_and_latent_checkpoints_of_the_same_weights_are_the_same(
    latent: Path, model_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(latent, tmp_path / "packed")

    def pack_all(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            codes, scale = ternarize(tensors[name].float().numpy())
            tensors[name] = torch.from_numpy(pack_rows(codes))
            tensors[f"{name}_scale"] = torch.tensor([scale])

    edit_weights(tmp_path / "packed", pack_all)
    pack(tmp_path / "packed", tmp_path / "model.safetensors")
    one, other = (read_language_model(path) for path in (model_file, tmp_path / "model.safetensors"))
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor, other.tensors[name], name)
    answers = [
        "".join(LanguageModel.load(path).generate(PROMPT, max_tokens=10))
        for path in (model_file, tmp_path / "model.safetensors")
    ]
    assert answers[0] == answers[1] != ""


def test_greedy_takes_the_likeliest_token(model: LanguageModel) -> None:
    conversation = Conversation(model)
    text = "".join(conversation.say(PROMPT, max_tokens=5))
    written = conversation.ids[-5:]
    assert model.chat.tokenizer.decode(written) == text
    prompt = conversation.ids[:-5]
    for index, token in enumerate(written):
        cache = Cache(model.config.language, len(conversation.ids))
        assert token == int(np.argmax(model.logits(prompt + written[:index], cache)))


def test_a_conversation_goes_on_from_its_cache(model: LanguageModel) -> None:
    """Two turns leave the tokens that the template asks for, and the second is what one long prompt would give."""
    conversation = Conversation(model)
    list(conversation.say(PROMPT, max_tokens=3))
    assert not conversation.ended
    before = list(conversation.ids)
    list(conversation.say("Open it", max_tokens=1))
    turn = model.chat.encode("<|eot_id|>User: Open it<|eot_id|>Assistant: ")
    assert conversation.ids[:-1] == before + turn
    cache = Cache(model.config.language, len(conversation.ids))
    assert conversation.ids[-1] == int(np.argmax(model.logits(conversation.ids[:-1], cache)))


def test_a_stop_token_ends_the_answer(model: LanguageModel) -> None:
    conversation, stop = Conversation(model), Sampler()
    chosen = iter([596, 128001, 596])
    stop.choose = lambda logits: next(chosen)  # type: ignore[method-assign]
    assert "".join(conversation.say(PROMPT, sampler=stop)) == "'s"
    assert conversation.ended


def test_an_answer_ends_with_the_context(model_file: Path) -> None:
    model = LanguageModel.load(model_file)
    size = len(model.chat.encode(model.config.chat.begin + model.config.chat.turn.replace("{prompt}", PROMPT)))
    language = msgspec.structs.replace(model.config.language, max_positions=size + 3)
    model.config = msgspec.structs.replace(model.config, language=language)
    conversation = Conversation(model)
    list(conversation.say(PROMPT, max_tokens=100))
    assert len(conversation.ids) == size + 3
    with pytest.raises(BitvlaError, match=f"tokens, the model was built for {size + 3}"):
        conversation.say(PROMPT)


def test_sampling_follows_temperature_top_p_and_seed() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))

    def shares(**options: float) -> np.ndarray:
        sampler = Sampler(**options)  # type: ignore[arg-type]
        return np.bincount([sampler.choose(logits) for _ in range(4000)], minlength=4) / 4000

    np.testing.assert_allclose(shares(temperature=1), [0.1, 0.5, 0.15, 0.25], atol=0.04)
    sharp = np.array([0.1, 0.5, 0.15, 0.25]) ** 2
    np.testing.assert_allclose(shares(temperature=0.5), sharp / sharp.sum(), atol=0.04)
    np.testing.assert_allclose(shares(temperature=1, top_p=0.7), [0, 2 / 3, 0, 1 / 3], atol=0.04)
    np.testing.assert_array_equal(shares(temperature=1, top_p=1e-9), [0, 1, 0, 0])
    np.testing.assert_array_equal(shares(temperature=1e-6), [0, 1, 0, 0])
    np.testing.assert_array_equal(shares(), [0, 1, 0, 0])
    np.testing.assert_array_equal(shares(temperature=1, seed=3), shares(temperature=1, seed=3))
    assert (shares(temperature=1, seed=3) != shares(temperature=1, seed=4)).any()


def test_a_packed_model_verifies_and_a_damaged_one_does_not(model_file: Path, tmp_path: Path) -> None:
    result = verify(model_file)
    assert result["passed"], result
    assert len(result["checks"]) == 4 + len(native.available())
    data = bytearray(model_file.read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    result = verify(tmp_path / "damaged")
    assert [check["check"] for check in result["checks"] if not check["passed"]] == ["digest"]


def test_a_packed_model_is_inspected(model_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model_file), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    config = read_language_model(model_file).config
    assert found["parameters"] == sum(math.prod(spec.shape) for spec in tensor_specs(config).values())
    assert found["weight_bytes"] == sum(part["bytes"] for part in found["parts"].values()) < found["file_bytes"]
    assert found["sizes"] == {"language": to_dict(config.language)}
    assert from_dict(ChatConfig, found["conventions"].pop("chat"), "inspect") == config.chat
    assert not found["conventions"]
    assert main(["inspect", str(model_file)]) == 0
    assert "stop tokens" in capfd.readouterr().out


# What is refused.


def wrong_shape(tensors: dict[str, Any]) -> None:
    tensors[Q_PROJ] = torch.zeros(19, 80, dtype=torch.uint8)


def unused_code(tensors: dict[str, Any]) -> None:
    tensors[Q_PROJ][0, 0] = 3


def no_scale(tensors: dict[str, Any]) -> None:
    del tensors[f"{Q_PROJ}_scale"]


def zero_scale(tensors: dict[str, Any]) -> None:
    tensors[f"{Q_PROJ}_scale"] = torch.zeros(1)


WRONG_WEIGHTS = {
    "shape": (wrong_shape, r"q_proj.weight is U8 \[19, 80\], its config.json asks for U8 \[20, 80\]"),
    "code": (unused_code, "q_proj.weight: packed weights hold the unused code 3"),
    "no scale": (no_scale, "lacks the tensor model.layers.0.self_attn.q_proj.weight_scale"),
    "zero scale": (zero_scale, "weight_scale is .0.0.; it must be one positive number"),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_wrong_weights_are_named(packed: Path, tmp_path: Path, name: str) -> None:
    edit, message = WRONG_WEIGHTS[name]
    edit_weights(packed, edit)
    with pytest.raises(BitvlaError, match=message):
        pack(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "silu"}, "hidden_act is 'silu'; only 'relu2' can be computed"),
    "untied": ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    "vocabulary": ({"vocab_size": 128264}, "has 128256 rows, config.json says vocab_size 128264"),
    "packing": ({"quantization_config": {"linear_class": "bitlinear"}}, "linear_class is 'bitlinear'"),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_other_models_are_refused(packed: Path, tmp_path: Path, name: str) -> None:
    change, message = WRONG_CONFIGS[name]
    edit_json(packed / "config.json", lambda config: config.update(change))
    with pytest.raises(BitvlaError, match=message):
        pack(packed, tmp_path / "out")


def test_policies_and_language_models_are_not_mixed_up(model_file: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(BitvlaError, match="is a language model, not a policy; use it with: bitvla chat"):
        bitvla.load(model_file)
    with pytest.raises(BitvlaError, match="is a policy, which acts and does not chat"):
        LanguageModel.load(pack_random(tmp_path, tiny_config()))
    with pytest.raises(BitvlaError, match="has no views"):
        pack(packed, tmp_path / "out", views=2)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" ", "the prompt is empty"),
        ("a<|eot_id|>b", "the prompt contains reserved tokens"),
        ("a\udcff", "cannot become tokens"),
    ],
)
def test_unusable_prompts_are_refused(model: LanguageModel, prompt: str, message: str) -> None:
    with pytest.raises(BitvlaError, match=message):
        model.generate(prompt)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}])
def test_impossible_samplers_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(BitvlaError, match="; give"):
        Sampler(**options)  # type: ignore[arg-type]


# The command.


def test_chat_prints_the_answer(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(model_file), "--prompt", PROMPT, "--max-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert main(["chat", str(model_file), "--prompt", PROMPT, "--max-tokens", "4", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["answer"] + "\n" == printed
    assert record["answer_tokens"] == 4
    assert not record["ended"]


def test_input_that_is_no_text_is_one_line(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--json"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"wei\xdf"), encoding="utf-8"))
        assert main(["chat", str(model_file), "--max-tokens", "1", *options]) == 1
        assert capsys.readouterr().err.startswith("error: standard input is not utf-8 text: ")


def test_a_model_has_no_more_threads_than_kernels_take(model_file: Path) -> None:
    with pytest.raises(BitvlaError, match="threads is 1025; give"):
        LanguageModel.load(model_file, threads=1025)


def test_chat_needs_neither_torch_nor_extras(model_file: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from bitvla.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "chat", str(model_file), "--max-tokens", "2"]
    done = subprocess.run(words, input=PROMPT, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
