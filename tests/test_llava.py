"""Conversations wherever they lie: beside their images, in shards as the Hub has them, here or at an address.

pytest tests/test_llava.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bitvla.data.llava import LlavaDataset
from bitvla.errors import BitvlaError
from bitvla.processing.prompt import Chat
from bitvla.train.config import load
from bitvla.train.conversations import Conversations
from bitvla.train.language import _new_tokenizer
from bitvla.train.loop import run
from datasets import write_conversations
from training import MODEL, losses_of, write_config

ADDRESS = "memory://conversations"
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where images are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bitvla"


@pytest.fixture
def far() -> Iterator[Any]:
    """fsspec's memory, empty before and after."""
    memory = fsspec.filesystem("memory")
    yield memory
    if memory.exists("/conversations"):
        memory.rm("/conversations", recursive=True)


def put(memory: Any, folder: Path) -> None:
    for path in folder.rglob("*.*"):
        memory.pipe(f"/conversations/{path.relative_to(folder)}", path.read_bytes())


def write_shards(data: Path, out: Path, kind: pa.DataType = IMAGE, group: int = 5) -> Path:
    """The entries of `data` in two shards of the Hub's layout, a few rows a group."""
    entries = json.loads(data.read_text())
    for entry in entries:
        path = data.parent / entry["image"]
        image = {"bytes": path.read_bytes(), "path": entry["image"]}
        entry["image"] = [image] if pa.types.is_list(kind) else image
    out.mkdir()
    for shard in range(2):
        table = pa.Table.from_pylist(entries[20 * shard : 20 * shard + 20])
        table = table.set_column(table.schema.get_field_index("image"), "image", table["image"].cast(kind))
        pq.write_table(table, out / f"train-{shard:05d}-of-00002.parquet", row_group_size=group)
    (out / "test-00000-of-00001.parquet").write_bytes(b"of another split")
    return out


def windows(dataset: LlavaDataset, folder: Path, **options: Any) -> Conversations:
    config = load(write_config(folder, MODEL)).model
    assert config
    assert config.vision
    assert config.image
    tokenizer = _new_tokenizer(config, sorted({turn.answer for entry in dataset.entries for turn in entry.turns}))
    settings = {"batch_size": 8, "max_tokens": 400, "seed": 3, "augmentation": None} | options
    return Conversations(dataset, config.vision, config.image, Chat(config, tokenizer), **settings)


@pytest.mark.parametrize("kind", [IMAGE, pa.list_(IMAGE)])
def test_shards_hold_what_the_file_says(data: Path, tmp_path: Path, far: Any, kind: pa.DataType) -> None:
    shards = write_shards(data, tmp_path / "shards", kind)
    put(far, shards)
    expected = LlavaDataset(data)
    for source in (shards, ADDRESS):
        found = LlavaDataset(source)
        assert [entry.turns for entry in found.entries] == [entry.turns for entry in expected.entries]
        for one, other in zip(expected.entries, found.entries, strict=True):
            assert one.images[0].name == other.images[0].name  # by which those held out are chosen
            assert np.array_equal(expected.image(one.images[0]), found.image(other.images[0]))
    for step in range(6):
        one, other = (windows(dataset, tmp_path)[step] for dataset in (expected, found))
        assert all(map(np.array_equal, one.inputs, other.inputs))


def test_a_file_far_away_trains_as_one_here(data: Path, tmp_path: Path, far: Any, cache: Path) -> None:
    """Its images are fetched once: the second time they are not there any more."""
    put(far, data.parent)
    config = write_config(
        tmp_path, MODEL, precision="ternary", steps=3, workers=1, learning_parts=["tower", "connector", "decoder"]
    )
    run("instruct", config, data, tmp_path / "near")
    run("instruct", config, f"{ADDRESS}/colours.json", tmp_path / "far")
    assert losses_of(tmp_path / "far") == losses_of(tmp_path / "near")
    dataset = LlavaDataset(f"{ADDRESS}/colours.json")
    LlavaDataset(f"{ADDRESS}/colours.json", cache_bytes=1).image(dataset.entries[0].images[0])  # larger than the cache
    before = [dataset.image(entry.images[0]) for entry in dataset.entries]
    far.rm("/conversations/images", recursive=True)
    after = [dataset.image(entry.images[0]) for entry in dataset.entries]
    assert all(map(np.array_equal, before, after))
    assert sum(path.is_file() for path in cache.rglob("*")) == 40


def test_a_cache_has_a_bound(data: Path, tmp_path: Path, cache: Path) -> None:
    """Every entry is seen once an epoch, a few groups of rows at a time."""
    shards = write_shards(data, tmp_path / "shards")
    whole = LlavaDataset(shards)
    assert set(whole.turns(np.random.default_rng(0))) == {0}
    size = max(whole._group_sizes.values())
    dataset = LlavaDataset(shards, cache_bytes=9 * size)
    parts = dataset.turns(np.random.default_rng(0))
    assert max(parts) == 3  # of eight groups two at a time
    train = windows(dataset, tmp_path, batch_size=1)
    seen = [int(train._indices(step)[0]) for step in range(train.num_frames)]
    assert sorted(seen) == sorted(train._chosen)
    groups = [dataset.entries[number].images[0][1:3] for number in seen]
    assert len(dict.fromkeys(groups[:9])) <= 3
    for number in seen:
        dataset.image(dataset.entries[number].images[0])
        assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) <= 14 * size
    with pytest.raises(BitvlaError, match=r"--cache-size is too small for .*train-00000.*give at least four times"):
        LlavaDataset(shards, cache_bytes=3 * size)


def test_what_a_killed_process_left_makes_room(data: Path, tmp_path: Path, cache: Path) -> None:
    shards = write_shards(data, tmp_path / "shards")
    size = max(LlavaDataset(shards)._group_sizes.values())
    dataset = LlavaDataset(shards, cache_bytes=9 * size)
    old, new = (dataset._folder / f".{name}.1.tmp" for name in ("old", "new"))
    dataset._folder.mkdir(parents=True)
    for path in (old, new):
        path.write_bytes(bytes(9 * size))
    os.utime(old, (0, 0))
    dataset.image(dataset.entries[0].images[0])
    assert new.exists()  # someone may be writing it
    assert not old.exists()


def test_images_of_one_name_in_several_folders_are_told_apart(data: Path, tmp_path: Path) -> None:
    """Their paths say which are held out, here and in a shard."""
    entries = json.loads(data.read_text())
    for number, entry in enumerate(entries):
        path = data.parent / entry["image"]
        entry["image"] = f"{number}/picture.png"
        (tmp_path / str(number)).mkdir()
        (tmp_path / entry["image"]).write_bytes(path.read_bytes())
    (tmp_path / "same.json").write_text(json.dumps(entries))
    for source in (tmp_path / "same.json", write_shards(tmp_path / "same.json", tmp_path / "shards")):
        dataset = LlavaDataset(source)
        assert [entry.images[0].name for entry in dataset.entries] == [entry["image"] for entry in entries]
        assert 0 < windows(dataset, tmp_path, split="validation").num_frames < 10


def row(**changes: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cube."}]
    return {"id": "x1", "conversations": said, "image": {"bytes": b"no picture", "path": "7.png"}} | changes


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(conversations=row()["conversations"][:1])], r"row 0 \('x1'\): it has 1 messages"),
        ([row(), row(image=None)], r"row 1 \('x1'\): <image> stands 1 times in its questions, it has 0 images"),
        ([row(image=[None]), row(image=[row()["image"]])], r"row 0 \('x1'\): <image> stands 1 times .* has 0 images"),
        ([row(image="7.png")], "its column 'image' is string; it must be a struct of bytes and path"),
        ([{"id": "x1", "text": "A cube."}], "row 0 is not in the layout of LLaVA: .*`conversations`"),
        ([row()], "bad.parquet: 7.png cannot be read as an image"),
        ([row(image={"bytes": None, "path": "7.png"}), row()], "the image 7.png has no bytes in the column 'image'"),
    ],
)
def test_what_is_wrong_with_a_shard_is_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bad.parquet")
    with pytest.raises(BitvlaError, match=message):
        (dataset := LlavaDataset(tmp_path / "bad.parquet")).image(dataset.entries[0].images[0])


def test_what_is_not_there_is_named(data: Path, tmp_path: Path, far: Any) -> None:
    far.pipe("/conversations/colours.json", data.read_bytes())
    dataset = LlavaDataset(f"{ADDRESS}/colours.json")
    with pytest.raises(BitvlaError, match=r"entry 0 \('n0'\): cannot read memory://conversations/images/0.png"):
        windows(dataset, tmp_path)._pixels(dataset.entries[0].images[0], dataset.entries[0].name, np.zeros(5))
    with pytest.raises(BitvlaError, match=r"cannot read memory://conversations/lost\.json"):
        LlavaDataset(f"{ADDRESS}/lost.json")
    with pytest.raises(BitvlaError, match=r"nowhere://x/y\.json cannot be reached"):
        LlavaDataset("nowhere://x/y.json")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(BitvlaError, match=r"cannot read .*bad\.parquet"):
        LlavaDataset(tmp_path / "bad.parquet")
