"""Published checkpoints, in the layout of the LIBERO fine-tunes: what packs and acts, and what is refused.

pytest tests/test_official.py
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bitvla
import bitvla._native as native
from bitvla import BitvlaError
from bitvla.bundle import read, tensor_specs, to_bfloat16, to_float32
from bitvla.convert import conventions, weights
from bitvla.convert.make_checkpoint import LIBERO_SPATIAL, make_checkpoint
from bitvla.convert.pack import pack
from bitvla.convert.weights import find_weights, unpack_rows
from bitvla.quantization import ternarize, unpack
from bitvla.runtime.verify import verify

INSTRUCTION = "pick up the black bowl and place it on the plate"
SHARD = "model-00001-of-00001.safetensors"
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reduced checkpoint that no test changes."""
    folder = tmp_path_factory.mktemp("official") / "checkpoint"
    make_checkpoint(folder, reduced=True)
    return folder


@pytest.fixture
def checkpoint(published: Path, tmp_path: Path) -> Path:
    """A copy to change. The files are links, so a test replaces what it changes, and never writes into it."""
    shutil.copytree(published, tmp_path / "checkpoint", copy_function=os.link)
    return tmp_path / "checkpoint"


@pytest.fixture(scope="module")
def policy_file(published: Path) -> Path:
    pack(published, published.parent / "policy.safetensors")
    return published.parent / "policy.safetensors"


def observe(views: int, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    names = conventions.CAMERAS[views]
    return {
        "images": {name: random.integers(0, 256, (256, 256, 3), dtype=np.uint8) for name in names},
        "state": random.uniform(-0.1, 0.1, 8).astype(np.float32),
        "instruction": INSTRUCTION,
    }


# What packs and acts.


@pytest.mark.parametrize("views", [1, 2, 3])
def test_it_packs_verifies_loads_and_acts(checkpoint: Path, tmp_path: Path, views: int) -> None:
    edit_json(checkpoint / "config.json", lambda config: config.update(num_images_in_input=views))
    out = tmp_path / "policy.safetensors"
    pack(checkpoint, out)
    assert verify(out)["passed"]
    policy = bitvla.load(out)
    assert [camera["name"] for camera in policy.info()["cameras"]] == list(conventions.CAMERAS[views])
    chunk = policy.act(observe(views))
    assert chunk.shape == (8, 7)
    assert np.isfinite(chunk).all()
    assert set(np.unique(chunk[:, -1])) <= {-1.0, 0.0, 1.0}
    assert not np.array_equal(chunk, policy.act(observe(views, seed=1)))
    with pytest.raises(BitvlaError, match="camera"):
        policy.act(observe(views % 3 + 1))


def test_a_batch_answers_what_each_observation_gets_alone(policy_file: Path) -> None:
    policy = bitvla.load(policy_file)
    seen = [observe(2, seed) | {"instruction": text} for seed, text in enumerate((INSTRUCTION, "open the drawer"))]
    alone = [policy.act(one).tobytes() for one in seen]
    assert [chunk.tobytes() for chunk in policy.act_batch(seen)] == alone
    assert [chunk.tobytes() for chunk in policy.act_batch(seen[::-1])] == alone[::-1]


def test_the_scalar_kernels_replay_small_policies_only(policy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replayed() -> set[str]:
        names = {check["check"] for check in verify(policy_file)["checks"]}
        return {name.removeprefix("golden traces ") for name in names if name.startswith("golden traces")}

    available = set(native.available())
    assert replayed() == available
    monkeypatch.setattr("bitvla.runtime.verify.SCALAR_WEIGHTS", 1000)
    assert replayed() == (available - {"scalar"} or available)


def test_every_tensor_is_what_the_checkpoint_holds(published: Path, policy_file: Path) -> None:
    trained, bundle = load_file(published / SHARD), read(policy_file)
    for name, prefix in weights.SIDE_FILES.items():
        state = torch.load(published / f"{name}--10000_checkpoint.pt", weights_only=True)
        trained |= {prefix + key.removeprefix("module."): tensor for key, tensor in state.items()}
    trained.pop("language_model.lm_head.weight")
    specs = tensor_specs(bundle.config)
    assert trained.keys() == specs.keys()
    for name, spec in specs.items():
        weight, stored = trained[name].float().numpy(), bundle.tensors[name]
        if spec.kind == "ternary":
            codes, scale = ternarize(weight)
            np.testing.assert_array_equal(unpack(stored, *spec.shape), codes)
            assert bundle.tensors[f"{name}_scale"][0] == scale
        elif spec.kind in (
            "matrix",
            "embedding",
        ):  # the official code computes with bfloat16, also where the projector was float32
            np.testing.assert_array_equal(stored, to_bfloat16(weight))
        else:
            np.testing.assert_array_equal(stored, weight)


def test_codes_are_those_of_the_official_quantiser(published: Path) -> None:
    """Its mean is a float32 sum, ours a float64 one: the same codes except where a weight lies on the edge."""
    for name, tensor in load_file(published / SHARD).items():
        if not name.endswith("_proj.weight"):
            continue
        weight = tensor.float()
        step = weight.abs().mean().clamp(min=1e-5)
        expected = (weight * (1.0 / step)).round().clamp(-1, 1).numpy()
        codes, scale = ternarize(weight.numpy())
        assert scale == pytest.approx(step.item(), rel=1e-6)
        assert np.mean(codes != expected) < 1e-3


def test_the_file_is_the_same_on_every_run_and_in_every_layout(
    published: Path, policy_file: Path, tmp_path: Path
) -> None:
    pack(published, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == policy_file.read_bytes()
    # The tensors do not depend on how they were laid out, only the digests of the files do.
    for name, layout in LAYOUTS.items():
        folder = tmp_path / name
        shutil.copytree(published, folder, copy_function=os.link)
        layout(folder)
        pack(folder, tmp_path / f"{name}.safetensors")
        expected, actual = read(policy_file), read(tmp_path / f"{name}.safetensors")
        assert actual.config == expected.config
        for tensor in expected.tensors:
            np.testing.assert_array_equal(actual.tensors[tensor], expected.tensors[tensor])


def under_lora_adapter(folder: Path) -> None:
    (folder / "lora_adapter").mkdir()
    for name in ("config.json", "model.safetensors.index.json", SHARD):
        (folder / name).rename(folder / "lora_adapter" / name)


def one_file(folder: Path) -> None:
    (folder / SHARD).rename(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()


def three_shards(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    index = {}
    (folder / SHARD).unlink()
    for number in range(3):
        names = sorted(tensors)[number::3]
        shard = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names}, folder / shard)
        index |= dict.fromkeys(names, shard)
    replace(folder / "model.safetensors.index.json", json.dumps({"weight_map": index}))


def plain_side_files(folder: Path) -> None:
    """Safetensors for one, the other as parameters, without the prefix of distributed training and with `latest` for a
    step."""
    head = folder / "action_head--10000_checkpoint.pt"
    save_file(torch.load(head, weights_only=True), folder / "action_head--latest_checkpoint.safetensors")
    head.unlink()
    proprio = folder / "proprio_projector--10000_checkpoint.pt"
    state = torch.load(proprio, weights_only=True)
    proprio.unlink()
    state = {name.removeprefix("module."): torch.nn.Parameter(tensor) for name, tensor in state.items()}
    torch.save(state, folder / "proprio_projector--latest_checkpoint.pt")


LAYOUTS = {"nested": under_lora_adapter, "one": one_file, "three": three_shards, "sides": plain_side_files}


def test_the_file_says_what_it_was_made_from(policy_file: Path) -> None:
    document = read(policy_file).document
    assert document.config.name == "bitvla-libero_spatial_no_noops"
    files = document.provenance["checkpoint"]["files"]
    assert SHARD in files
    assert "dataset_statistics.json" in files
    assert all(len(digest) == 64 for digest in files.values())
    assert document.config.processing.state.low == tuple(LIBERO_SPATIAL["proprio"]["q01"])
    assert document.config.language.bidirectional


def test_statistics_are_chosen_by_their_key(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "dataset_statistics.json"
    edit_json(path, lambda tables: tables.update(libero_goal_no_noops=tables["libero_spatial_no_noops"]))
    with pytest.raises(BitvlaError, match=r"libero_spatial_no_noops, libero_goal_no_noops; choose with --statistics"):
        pack(checkpoint, tmp_path / "out")
    pack(checkpoint, tmp_path / "out", statistics="libero_goal_no_noops")
    assert read(tmp_path / "out").config.name == "bitvla-libero_goal_no_noops"


def test_a_hub_id_is_fetched(published: Path, tmp_path: Path) -> None:
    """A stand-in for the Hub: its cache on disk, which the real client reads without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--hongyuw--ft-bitvla"
    shutil.copytree(published, repository / "snapshots" / commit, copy_function=os.link)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def packed(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bitvla", "pack", name, str(tmp_path / "policy.safetensors")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = packed("hongyuw/ft-bitvla")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "policy.safetensors").config.name == "bitvla-libero_spatial_no_noops"
    gone = packed("hongyuw/gone")
    assert gone.returncode == 1
    assert "hongyuw/gone is neither a folder here nor a checkpoint on the Hugging Face Hub" in gone.stderr


# What is refused.


def replace(path: Path, content: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(content)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    replace(path, json.dumps(value))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the backbone and write it as one file; `published` is linked, hence copied before."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SHARD).items()}
    edit(tensors)
    one_file(folder)
    (folder / "model.safetensors").unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def edit_head(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "action_head--10000_checkpoint.pt"
    state = torch.load(path, weights_only=True)
    edit(state)
    path.unlink()
    torch.save(state, path)


def edit_statistics(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    edit_json(folder / "dataset_statistics.json", lambda tables: edit(tables["libero_spatial_no_noops"]))


def edit_tokens(folder: Path, edit: Callable[[list[dict[str, Any]]], object]) -> None:
    edit_json(folder / "tokenizer.json", lambda tokenizer: edit(tokenizer["added_tokens"]))


def swap_contents(added: list[dict[str, Any]]) -> None:
    added[10]["content"], added[11]["content"] = added[11]["content"], added[10]["content"]


def more_rows(tensors: dict[str, torch.Tensor]) -> None:
    for name in (EMBEDDING, "language_model.lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:4]])


def pickled(path: Path) -> None:
    """A PyTorch file that would run a command when unpickled without care."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch executed",)

    path.unlink()
    torch.save({"model.fc1.weight": Evil()}, path)


def another_model(folder: Path) -> None:
    replace(folder / "config.json", json.dumps({"model_type": "llama"}))
    one_file(folder)
    (folder / "model.safetensors").unlink()
    save_file({"model.embed_tokens.weight": torch.zeros(4, 4)}, folder / "model.safetensors")


HEAD, PROPRIO = "action_head--10000_checkpoint.pt", "proprio_projector--10000_checkpoint.pt"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no head": (lambda folder: (folder / HEAD).unlink(), r"lacks action_head--\*_checkpoint.pt"),
    "no projector": (lambda folder: (folder / PROPRIO).unlink(), r"lacks proprio_projector--\*_checkpoint.pt"),
    "two heads": (
        lambda folder: shutil.copy(folder / HEAD, folder / "action_head--5000_checkpoint.pt"),
        "has 2 files of the action_head .*5000_checkpoint.pt.* keep the one",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no statistics": (lambda folder: (folder / "dataset_statistics.json").unlink(), "statistics.json is missing"),
    "no shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
    "no weights": (
        lambda folder: [(folder / name).unlink() for name in (SHARD, "model.safetensors.index.json")],
        "has no model.safetensors, whole or in shards",
    ),
    "unmerged adapter": (
        lambda folder: [
            (folder / "model.safetensors.index.json").unlink(),
            (folder / SHARD).rename(folder / "adapter_model.safetensors"),
        ],
        "LoRA adapter; merge it",
    ),
    "damaged shard": (lambda folder: replace(folder / SHARD, "?" * 100), f"{SHARD} cannot be read"),
    "index of too much": (
        lambda folder: edit_json(
            folder / "model.safetensors.index.json", lambda index: index["weight_map"].update(more=SHARD)
        ),
        "promises the tensor more, which its shards lack",
    ),
    "index of too little": (
        lambda folder: edit_json(
            folder / "model.safetensors.index.json", lambda index: index["weight_map"].pop(Q_PROJ)
        ),
        f"holds {Q_PROJ}, which model.safetensors.index.json does not expect there",
    ),
    "index that leaves": (
        lambda folder: edit_json(
            folder / "model.safetensors.index.json", lambda index: index["weight_map"].update(more="../secret")
        ),
        "names the shard '../secret', which is not a file beside it",
    ),
    "missing tensor": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.pop(Q_PROJ)),
        f"lacks the tensor {Q_PROJ}",
    ),
    "unknown tensor": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update(extra=torch.zeros(2))),
        "has the unknown tensor extra",
    ),
    "wrong shape": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update({Q_PROJ: torch.zeros(8, 80)})),
        r"q_proj.weight is F32 \[8, 80\], its config.json asks for BF16 \[80, 80\]",
    ),
    "wrong dtype": (
        lambda folder: edit_weights(
            folder, lambda tensors: tensors.update({Q_PROJ: torch.zeros(80, 80, dtype=torch.int32)})
        ),
        "q_proj.weight is I32",
    ),
    "NaN": (
        lambda folder: edit_weights(folder, lambda tensors: tensors[Q_PROJ].view(-1)[7:8].fill_(float("nan"))),
        "q_proj.weight has values that are not finite",
    ),
    "vocabulary of the pre-trained model": (
        lambda folder: edit_weights(folder, more_rows),
        "the embedding has 128268 rows, LIBERO fine-tunes have 128264; 128268 are those of the pre-trained base model",
    ),
    "vocabulary of config.json": (
        lambda folder: edit_json(folder / "config.json", lambda config: config["text_config"].update(vocab_size=32000)),
        "the embedding has 128264 rows, config.json says vocab_size 32000",
    ),
    "tokenizer of the pre-trained model": (
        lambda folder: edit_tokens(
            folder,
            lambda added: added.extend({**added[-1], "id": 128264 + i, "content": f"<more_{i}>"} for i in range(4)),
        ),
        "the tokenizer has 128268 tokens, the policy's embedding only 128264 rows",
    ),
    "tokenizer without image tokens": (
        lambda folder: edit_tokens(folder, lambda added: added.__delitem__(slice(10, None))),
        r"tokenizer.json lacks the special token <\|image_pad\|> \(id 128010\): it is the tokenizer of another model",
    ),
    "tokenizer with other ids": (
        lambda folder: edit_tokens(folder, swap_contents),
        r"gives the id 128011 to <\|image_pad\|> \(id 128010\)",
    ),
    "no tokenizer at all": (lambda folder: replace(folder / "tokenizer.json", "{}"), "tokenizer is damaged"),
    "missing quantile": (
        lambda folder: edit_statistics(folder, lambda tables: tables["action"].pop("q99")),
        "lacks q01 or q99 of libero_spatial_no_noops.action",
    ),
    "missing proprio": (
        lambda folder: edit_statistics(folder, lambda tables: tables.pop("proprio")),
        "lacks q01 or q99 of libero_spatial_no_noops.proprio",
    ),
    "constant state": (
        lambda folder: edit_statistics(folder, lambda tables: tables["proprio"].update(q01=[0] * 8, q99=[0] * 8)),
        "state statistics of 'eef_x' are missing or constant",
    ),
    "NaN statistics": (
        lambda folder: edit_statistics(folder, lambda tables: tables["action"].update(q01=[float("nan")] * 7)),
        "action statistics of 'x' are missing or constant",
    ),
    "statistics of another robot": (
        lambda folder: edit_statistics(folder, lambda tables: tables["action"].update(q01=[0] * 14)),
        r"action statistics hold \[7, 7, 14, 7, 7\] values, the policy needs 7",
    ),
    "statistics that are no numbers": (
        lambda folder: edit_statistics(folder, lambda tables: tables["action"].update(q01=["low"] * 7)),
        "libero_spatial_no_noops.action: Expected `float`, got `str`",
    ),
    "another data set": (
        lambda folder: replace(folder / "dataset_statistics.json", json.dumps({"bridge_orig": LIBERO_SPATIAL})),
        "is of 'bridge_orig'; cameras, gripper and chunk are known only for fine-tunes on LIBERO",
    ),
    "head of another model": (
        lambda folder: edit_head(folder, lambda state: state.update({"module.model.fc2.weight": torch.zeros(14, 80)})),
        r"model.fc2.weight is F32 \[14, 80\], its config.json asks for BF16 \[7, 80\]",
    ),
    "head without a layer": (
        lambda folder: edit_head(folder, lambda state: state.pop("module.model.fc1.bias")),
        "lacks the tensor action_head.model.fc1.bias",
    ),
    "a head that would run code": (lambda folder: pickled(folder / HEAD), "cannot be read as a PyTorch file"),
    "a head that is cut off": (lambda folder: replace(folder / HEAD, "PK"), "cannot be read as a PyTorch file"),
    "another model": (another_model, r"is a checkpoint of another model \(model_type 'llama', tensor action_head"),
    "another feature layer": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(vision_feature_layer=-2)),
        "vision_feature_layer is -2; only -1 can be computed",
    ),
    "another activation": (
        lambda folder: edit_json(
            folder / "config.json", lambda config: config["vision_config"].update(hidden_act="relu")
        ),
        "vision_config.hidden_act is 'relu'",
    ),
    "full-precision tower": (
        lambda folder: edit_json(folder / "config.json", lambda config: config["vision_config"].pop("vit_weight_bits")),
        "the vision tower was trained in full precision",
    ),
    "sizes that cannot be": (
        lambda folder: edit_json(
            folder / "config.json", lambda config: config["text_config"].update(num_attention_heads=7)
        ),
        "does not give an even head size",
    ),
    "sizes that are no numbers": (
        lambda folder: edit_json(folder / "config.json", lambda config: config["text_config"].update(hidden_size="80")),
        r"Expected `int`, got `str` - at `\$.hidden_size`",
    ),
    "too many views": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(num_images_in_input=4)),
        "4 views; a BitVLA policy sees 1, 2 or 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused(
    checkpoint: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, message = BROKEN[name]
    spoil(checkpoint)
    out = tmp_path / "policy.safetensors"
    out.write_bytes(b"old")
    with pytest.raises(BitvlaError, match=message) as caught:
        pack(checkpoint, out)
    assert "\n" not in str(caught.value)
    assert out.read_bytes() == b"old"
    assert not (tmp_path / "executed").exists()


def test_views_that_contradict_the_checkpoint_are_refused(published: Path, tmp_path: Path) -> None:
    with pytest.raises(BitvlaError, match="was trained with 2 views, not 3"):
        pack(published, tmp_path / "out", views=3)


def test_views_are_asked_for_where_the_checkpoint_is_silent(checkpoint: Path, tmp_path: Path) -> None:
    edit_json(checkpoint / "config.json", lambda config: config.pop("num_images_in_input"))
    pack(checkpoint, tmp_path / "out", views=1)
    assert len(read(tmp_path / "out").config.processing.cameras) == 1
    pack(checkpoint, tmp_path / "out")
    assert len(read(tmp_path / "out").config.processing.cameras) == 2


def test_instructions_that_would_change_the_prompt_are_refused(policy_file: Path) -> None:
    policy = bitvla.load(policy_file)
    for token in ("<|eot_id|>", "<|image_pad|>", "<proprio_pad>", "<action_7>", "<|begin_of_text|>"):
        with pytest.raises(BitvlaError, match="reserved tokens"):
            policy.act(observe(2) | {"instruction": f"pick up {token}"})
    with pytest.raises(BitvlaError, match="trained for at most 128"):
        policy.act(observe(2) | {"instruction": "the " * 129})


def test_a_prompt_longer_than_the_context_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    edit_json(checkpoint / "config.json", lambda config: config["text_config"].update(max_position_embeddings=630))
    with pytest.raises(BitvlaError, match="tokens, the policy was built for 630"):
        policy_of(checkpoint, tmp_path).act(observe(2) | {"instruction": f"{INSTRUCTION} and turn on the stove"})


def policy_of(checkpoint: Path, tmp_path: Path) -> Any:
    pack(checkpoint, tmp_path / "policy.safetensors")
    return bitvla.load(tmp_path / "policy.safetensors")


def on_a_full_disk(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A limit on the size of files stands for the disk that fills: the system refuses to write on."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, 5 << 20))

    command = [sys.executable, "-m", "bitvla", *arguments]
    return subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)


def test_a_full_disk_leaves_the_old_file(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "policy.safetensors"
    out.write_bytes(b"old")
    done = on_a_full_disk("pack", str(published), str(out))
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write")
    assert done.stderr.count("\n") == 1
    assert out.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["policy.safetensors"]


def test_a_full_disk_leaves_no_random_checkpoint(tmp_path: Path) -> None:
    done = on_a_full_disk("make-checkpoint", str(tmp_path / "checkpoint"), "--reduced")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


# The base models: read and checked, and named where they are refused.


def base_model(folder: Path) -> None:
    for name in (HEAD, PROPRIO, "dataset_statistics.json"):
        (folder / name).unlink()


def language_model(folder: Path) -> None:
    """microsoft/bitnet-b1.58-2B-4T-bf16: the decoder under its own names, its head is the embedding."""
    base_model(folder)

    def decoder_only(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            del tensors[name]
            if name.startswith("language_model.model."):
                tensors[name.removeprefix("language_model.")] = tensor

    edit_weights(folder, decoder_only)
    config = json.loads((folder / "config.json").read_text())["text_config"]
    replace(folder / "config.json", json.dumps(config | {"model_type": "bitnet"}))


def packed_language_model(folder: Path) -> None:
    """microsoft/bitnet-b1.58-2B-4T: four rows a byte."""
    language_model(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if name.endswith("_proj.weight"):
            codes, scale = ternarize(tensors[name].float().numpy())
            tensors[name] = torch.from_numpy(pack_rows(codes))
            tensors[f"{name}_scale"] = torch.tensor([scale]).bfloat16()
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


def pack_rows(codes: np.ndarray) -> np.ndarray:
    """Microsoft's format, written from its description: row r + i R of the matrix in bits 2 i of row r."""
    rows = len(codes) // 4
    out = np.zeros((rows, codes.shape[1]), np.uint8)
    for part in range(4):
        out |= (codes[part * rows : (part + 1) * rows] + 1).astype(np.uint8) << (2 * part)
    return out


def test_base_models_are_checked(checkpoint: Path, tmp_path: Path) -> None:
    packed_language_model(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(19, 80, dtype=torch.uint8)
    (checkpoint / "model.safetensors").unlink()
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(BitvlaError, match=r"q_proj.weight is U8 \[19, 80\], its config.json asks for U8 \[20, 80\]"):
        pack(checkpoint, tmp_path / "out")


def test_packed_rows_are_read_back(checkpoint: Path) -> None:
    codes = np.random.default_rng(0).integers(-1, 2, (12, 5), dtype=np.int8)
    np.testing.assert_array_equal(unpack_rows(pack_rows(codes)), codes)
    with pytest.raises(ValueError, match="unused code 3"):
        unpack_rows(np.full((1, 1), 0b11, np.uint8))
    packed_language_model(checkpoint)
    packed = find_weights(checkpoint)
    assert packed.read("model.layers.0.self_attn.q_proj.weight").dtype == np.uint8
    assert to_float32(packed.read("model.layers.0.self_attn.q_proj.weight_scale")).shape == (1,)


# Random checkpoints.


def test_random_checkpoints_are_reproducible(published: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "again", reduced=True)
    make_checkpoint(tmp_path / "other", reduced=True, seed=1)
    names = {path.name for path in published.iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (published / name).read_bytes(), name
    assert (tmp_path / "other" / SHARD).read_bytes() != (published / SHARD).read_bytes()


def test_random_checkpoints_are_split_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitvla.convert.make_checkpoint.SHARD_BYTES", 21 << 20)
    make_checkpoint(tmp_path / "checkpoint", reduced=True)
    assert len(list((tmp_path / "checkpoint").glob("model-*-of-00002.safetensors"))) == 2
    pack(tmp_path / "checkpoint", tmp_path / "policy.safetensors")


def test_a_random_checkpoint_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int, name: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "checkpoint", reduced=True, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_not_written_to(published: Path) -> None:
    with pytest.raises(BitvlaError, match="is not an empty folder"):
        make_checkpoint(published, reduced=True)
    with pytest.raises(BitvlaError, match="name a folder for the checkpoint, as in checkpoint"):
        make_checkpoint(Path(), reduced=True)


def test_statistics_may_be_given(tmp_path: Path) -> None:
    table = tmp_path / "dataset_statistics.json"
    with pytest.raises(BitvlaError, match=r"dataset_statistics.json is missing: give --statistics a file"):
        make_checkpoint(tmp_path / "checkpoint", reduced=True, statistics=table)
    table.write_text(json.dumps({"libero_10_no_noops": LIBERO_SPATIAL}))
    with pytest.raises(BitvlaError, match=r"--kind vision-language has no use for --statistics .*: leave it out"):
        make_checkpoint(tmp_path / "checkpoint", kind="vision-language", reduced=True, statistics=table)
    with pytest.raises(BitvlaError, match="--kind pretrained has no use for --views 1: leave it out"):
        make_checkpoint(tmp_path / "checkpoint", kind="pretrained", reduced=True, views=1)
    make_checkpoint(tmp_path / "checkpoint", reduced=True, statistics=table, views=1)
    pack(tmp_path / "checkpoint", tmp_path / "out")
    assert read(tmp_path / "out").config.name == "bitvla-libero_10_no_noops"
