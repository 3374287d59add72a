"""Conversations about images, in the JSON layout of LLaVA or in Parquet shards as the Hugging Face Hub has them.

    [{"id": "7", "image": "images/7.png", "conversations": [
        {"from": "human", "value": "<image>\\nWhich object is red?"}, {"from": "gpt", "value": "the cube"}, ...]}, ...]

An entry may have several turns and images, or no image. Those of a JSON file lie beside it; those of a shard are in its
column `image`, each a struct with its `bytes` and `path`. What is said is in memory; images are read one by one, from
wherever fsspec reaches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from bitvla.data.lerobot import Place, locate
from bitvla.data.pictures import make_room, user_cache
from bitvla.errors import BitvlaError
from bitvla.files import write_whole
from bitvla.processing.images import read_image

IMAGE = "<image>"  # where the images of an entry are, in what is said
ROLES = ("human", "gpt")


class Turn(NamedTuple):
    """What is asked, how many images come with it, and what is answered."""

    prompt: str
    images: int
    answer: str


class Picture(NamedTuple):
    """An image: a file, or the `number`-th one of a row of a shard."""

    name: str  # its path as the entry gives it: within the data, wherever they lie
    address: str  # of the file or shard
    group: int = -1  # of rows in a shard
    row: int = 0  # in the group
    number: int = 0


class Conversation(NamedTuple):
    """One entry; `name` tells which."""

    name: str
    images: tuple[Picture, ...]
    turns: tuple[Turn, ...]


class _Message(msgspec.Struct):
    role: str = msgspec.field(name="from")
    value: str


class _Entry(msgspec.Struct):
    conversations: list[_Message]
    id: str | int | None = None
    image: str | list[str] | None = None


class LlavaDataset:
    """The entries of a JSON file or of Parquet shards, checked when it is opened.

    `source` is a file, or a folder that holds one JSON file or shards (of several splits those named `train-*`): a
    path, an address of any file system that fsspec knows, as hf://datasets/owner/name/file.json, or an id on the
    Hugging Face Hub, of which everything is fetched. Images that are far away, and a shard's, are kept on disk once
    they were read: up to `cache_bytes`, or all of them. A shard's are read a group of rows at a time.

    `digest` is of the file, or of what is said in the shards and the sizes of their images. BitvlaError names the first
    entry that cannot be used, and why; an image that is far away is met only when it is read.
    """

    def __init__(self, source: str | Path, cache_bytes: int | None = None) -> None:
        files = _files(locate(source))
        self.path, self.limit = files[0], cache_bytes
        self._group_sizes: dict[tuple[str, int], int] = {}  # bytes of images
        if self.path.suffix == ".parquet":
            self.entries = [entry for file in files for entry in self._read_shard(file)]
            content = msgspec.json.encode(
                [[(entry.turns, [image.name for image in entry.images]) for entry in self.entries],
                 [*self._group_sizes.values()]]
            )  # fmt: skip
        else:
            content = _read(self.path)
            self.entries = _parse(self.path, content)
        self.digest = hashlib.sha256(content).hexdigest()
        if not self.entries:
            raise BitvlaError(f"{self.path} holds no conversation: its list is empty")
        largest = max(self._group_sizes.values(), default=0)
        if cache_bytes is not None and cache_bytes < 4 * largest:
            raise BitvlaError(
                f"--cache-size is too small for {self.path}: {cache_bytes / 1e6:.1f} MB; the images of a group of its "
                f"rows take {largest / 1e6:.1f} MB, give at least four times as much"
            )
        self._folder = user_cache() / hashlib.sha256(f"{self.path}\0{self.digest}".encode()).hexdigest()[:16]
        self._written = 0

    def turns(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """In which part (N,) of an epoch each entry is used.

        A part has the images of random groups of rows, and they take a quarter of the disk that images may take.
        """
        if self.limit is None or not self._group_sizes:
            return np.zeros(len(self.entries), np.int64)
        sizes = np.array([*self._group_sizes.values()])
        drawn = rng.permutation(len(sizes))
        part = np.empty_like(sizes)
        part[drawn] = np.cumsum(sizes[drawn]) // (self.limit // 4)
        of_group = dict(zip(self._group_sizes, part, strict=True))
        return np.array([of_group[e.images[0].address, e.images[0].group] if e.images else 0 for e in self.entries])

    def image(self, picture: Picture) -> NDArray[np.uint8]:
        """An image, uint8 (height, width, 3), RGB. BitvlaError where it cannot be read."""
        if picture.group >= 0:
            return read_image(self._cell(picture), f"{picture.address}: {picture.name}")
        place = _place(picture.address)
        if isinstance(place, Path):
            return read_image(place)
        return read_image(self._kept(picture.address, partial(_read, place), Path.read_bytes), picture.address)

    def _read_shard(self, path: Place) -> Iterator[Conversation]:
        """The entries of a shard, of which everything but the bytes of its images is read."""
        groups = []
        with _reading(path), path.open("rb") as file:
            table = pq.ParquetFile(file)
            columns = [table.schema.column(number).path for number in range(len(table.schema))]
            images = [number for number, column in enumerate(columns) if _part(column) == "image"]
            if images and not any(columns[number].endswith(".bytes") for number in images):
                found = table.schema_arrow.field("image").type
                raise BitvlaError(f"{path}: its column 'image' is {found}; it must be a struct of bytes and path")
            said = [c for c in columns if _part(c) in _Entry.__struct_fields__ and not c.endswith(".bytes")]
            for group in range(table.num_row_groups):
                stored = table.metadata.row_group(group)
                size = sum(stored.column(number).total_uncompressed_size for number in images)
                self._group_sizes[str(path), group] = size
                groups.append(table.read_row_group(group, columns=said).to_pylist())
        places = ((group, row, fields) for group, rows in enumerate(groups) for row, fields in enumerate(rows))
        for number, (group, row, fields) in enumerate(places):
            pictures = tuple(
                Picture(image.get("path") or f"{path.name}:{number}", str(path), group, row, i)
                for i, image in enumerate(_listed(fields.pop("image", None)))
            )
            name = f"{path}: row {number}"
            try:
                entry = msgspec.convert(fields, _Entry)
            except msgspec.ValidationError as error:
                raise BitvlaError(f"{name} is not in the layout of LLaVA: {error}") from None
            yield _conversation(entry, name, pictures)

    def _cell(self, picture: Picture) -> bytes:
        """The file in a shard that is an image. Its group of rows is kept where any row of it can be read alone."""

        def fetch() -> Any:
            path, sink = _place(picture.address), pa.BufferOutputStream()
            with _reading(path), path.open("rb") as file:
                images = pq.ParquetFile(file).read_row_group(picture.group, columns=["image"])
            with pa.ipc.new_file(sink, images.schema) as file:
                file.write_table(images)
            return sink.getvalue()

        def take(kept: Path) -> Any:
            column = pa.ipc.open_file(pa.memory_map(str(kept))).read_all()["image"]
            return _listed(column[picture.row].as_py())[picture.number]["bytes"]

        content: bytes | None = self._kept(f"{picture.address}:{picture.group}", fetch, take)
        if content is None:
            raise BitvlaError(f"{picture.address}: the image {picture.name} has no bytes in the column 'image'")
        return content

    def _kept(self, name: str, fetch: Callable[[], Any], read: Callable[[Path], Any]) -> Any:
        """`read` of the file that keeps what `fetch` brings. Others may make room, so it is tried again."""
        path = self._folder / hashlib.sha256(name.encode()).hexdigest()[:32]
        while True:
            with suppress(FileNotFoundError):
                return read(path)
            content = fetch()
            self._written += len(content)
            if self.limit is not None and self._written > self.limit // 16:  # now and then: every file is looked at
                make_room(self._folder.glob("*"), self.limit - self.limit // 16 - len(content))
                self._written = len(content)
            write_whole(path, content)


def _files(root: Place) -> list[Place]:
    """`root`, or where that is a folder its shards or the one JSON file in it."""
    if not root.is_dir():
        return [root]
    shards: list[Place] = sorted(root.glob("train-*.parquet"), key=str) or sorted(root.glob("*.parquet"), key=str)
    if shards:
        return shards
    files: list[Place] = sorted(root.glob("*.json"), key=str)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise BitvlaError(
            f"{root} must hold Parquet shards or one JSON file of conversations, it holds {names}; name the file"
        )
    return files


def _place(address: str) -> Place:
    """A new one at every reading: connections do not survive the fork of a loader's worker."""
    return UPath(address) if "://" in address else Path(address)


@contextmanager
def _reading(path: Place) -> Iterator[None]:
    try:
        yield
    except BitvlaError:
        raise
    except Exception as error:  # whatever a service says
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise BitvlaError(f"cannot read {path}: {reason}") from None


def _read(path: Place) -> bytes:
    with _reading(path):
        return path.read_bytes()


def _parse(path: Place, content: bytes) -> list[Conversation]:
    try:
        entries = msgspec.json.decode(content, type=list[_Entry])
    except msgspec.MsgspecError as error:
        raise BitvlaError(f"{path} is not in the JSON layout of LLaVA: {error}") from None
    return [_beside(entry, f"{path}: entry {number}", path.parent) for number, entry in enumerate(entries)]


def _beside(entry: _Entry, name: str, folder: Place) -> Conversation:
    """An entry whose images are files; those of this machine must be there."""
    pictures = tuple(Picture(image, str(folder / image)) for image in _listed(entry.image))
    for picture in pictures:
        if isinstance(folder, Path) and not Path(picture.address).is_file():
            raise BitvlaError(f"{_named(entry, name)}: its image {picture.address} does not exist")
    return _conversation(entry, name, pictures)


def _conversation(entry: _Entry, name: str, images: tuple[Picture, ...]) -> Conversation:
    name = _named(entry, name)
    for number, message in enumerate(entry.conversations):
        expected = ROLES[number % 2]
        if message.role != expected:
            raise BitvlaError(f"{name}: message {number} is from '{message.role}', it must be from '{expected}'")
        if not message.value.replace(IMAGE, "").strip():
            raise BitvlaError(f"{name}: message {number}, from '{message.role}', is empty")
    if not entry.conversations or len(entry.conversations) % 2:
        raise BitvlaError(f"{name}: it has {len(entry.conversations)} messages; each question needs its answer")
    asked, answered = entry.conversations[::2], entry.conversations[1::2]
    turns = tuple(
        Turn(question.value.replace(IMAGE, "").strip(), question.value.count(IMAGE), answer.value)
        for question, answer in zip(asked, answered, strict=True)
    )
    if sum(turn.images for turn in turns) != len(images):
        raise BitvlaError(
            f"{name}: {IMAGE} stands {sum(turn.images for turn in turns)} times in its questions, it has "
            f"{len(images)} images"
        )
    return Conversation(name, images, turns)


def _named(entry: _Entry, name: str) -> str:
    return name if entry.id is None else f"{name} ('{entry.id}')"


def _listed(value: Any) -> list[Any]:
    """One, several or none, as a list."""
    return [one for one in (value if isinstance(value, list) else [value]) if one is not None]


def _part(column: str) -> str:
    """Of which column a column of numbers or bytes is a part."""
    return column.partition(".")[0]
