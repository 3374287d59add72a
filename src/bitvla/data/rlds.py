"""RLDS episodes in TFRecords, as TensorFlow Datasets writes them; read without TensorFlow.

A record is the length of its data, a checksum of that, the data, and a checksum of these. The data are one episode: a
`tf.train.Example`, in which each feature holds the values of all steps, one after the other.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from bitvla.data.lerobot import Episode
from bitvla.errors import BitvlaError
from bitvla.processing.images import read_image

PATTERN = "*.tfrecord*"
ROBOT = "unknown"
# Those of modified_libero_rlds.
CAMERAS = {"full": "image", "wrist": "wrist_image"}
NAMES: dict[str, tuple[str, ...]] = {}
_STATE, _ACTION, _SENTENCE = "steps/observation/state", "steps/action", "steps/language_instruction"
# A field of each message: its number, its type (a message, or a plain one), and whether it repeats.
_FIELDS: dict[str, list[tuple[str, int, str, bool]]] = {
    "Example": [("features", 1, "Features", False)],
    "Features": [("feature", 1, "Entry", True)],
    "Entry": [("key", 1, "string", False), ("value", 2, "Feature", False)],  # a map, on the wire
    "Feature": [("bytes_list", 1, "BytesList", False), ("float_list", 2, "FloatList", False),
                ("int64_list", 3, "Int64List", False)],
    "BytesList": [("value", 1, "bytes", True)],
    "FloatList": [("value", 1, "float", True)],
    "Int64List": [("value", 1, "int64", True)],
}  # fmt: skip


def demonstrations(path: Path, cameras: Mapping[str, str]) -> list[tuple[str, Callable[[], Episode]]]:
    """The name of each episode in a file, and what reads it."""
    return [(f"{path.name}:{i}", partial(_read, path, *place, cameras)) for i, place in enumerate(_places(path))]


def _places(path: Path) -> Iterator[tuple[int, int]]:
    """Where the data of each record begin, and how long they are."""
    end = path.stat().st_size
    with path.open("rb") as file:
        while head := file.read(12):
            if len(head) < 12 or _checksum(head[:8]) != struct.unpack("<I", head[8:])[0]:
                raise _damaged(path)
            begin, length = file.tell(), struct.unpack("<Q", head[:8])[0]
            if begin + length + 4 > end:
                raise _damaged(path)
            yield begin, length
            file.seek(length + 4, io.SEEK_CUR)


def _read(path: Path, begin: int, length: int, cameras: Mapping[str, str]) -> Episode:
    with path.open("rb") as file:
        file.seek(begin)
        data, checksum = file.read(length), file.read(4)
    if _checksum(data) != struct.unpack("<I", checksum)[0]:
        raise _damaged(path)
    try:
        entries = _EXAMPLE.FromString(data).features.feature
    except DecodeError:
        raise _damaged(path) from None
    features = {entry.key: entry.value for entry in entries}
    keys = {f"steps/observation/{camera}" for camera in cameras.values()}
    for key in sorted(keys | {_STATE, _ACTION, _SENTENCE}):
        if key not in features:
            raise BitvlaError(f"{path} has no '{key}', it has {', '.join(sorted(features))}")
    images = {
        ours: _pictures(path, theirs, features[f"steps/observation/{theirs}"].bytes_list.value)
        for ours, theirs in cameras.items()
    }
    steps = len(next(iter(images.values())))
    vectors = {
        "observation.state": _vectors(path, _STATE, features[_STATE], steps),
        "action": _vectors(path, _ACTION, features[_ACTION], steps),
    }
    sentences = features[_SENTENCE].bytes_list.value  # the same in every step
    return Episode(images, vectors, sentences[0].decode() if sentences else "")


def _pictures(path: Path, camera: str, encoded: Any) -> NDArray[np.uint8]:
    frames = [read_image(picture, f"step {i} of '{camera}' in {path}") for i, picture in enumerate(encoded)]
    if len({frame.shape for frame in frames}) != 1:
        raise BitvlaError(f"'{camera}' in {path} has no pictures, or some of several sizes; leave its episode out")
    return np.stack(frames)


def _vectors(path: Path, key: str, feature: Any, steps: int) -> NDArray[np.float32]:
    values = np.array(feature.float_list.value, dtype=np.float32)
    if not values.size or values.size % steps:
        raise BitvlaError(f"'{key}' in {path} has {values.size} numbers for {steps} steps; it is half-written")
    return values.reshape(steps, -1)


def _damaged(path: Path) -> BitvlaError:
    return BitvlaError(f"{path} is truncated or damaged; copy it again")


def _checksum(data: bytes) -> int:
    """CRC-32C, turned and moved, so that the checksum of data with checksums is none of theirs (TFRecord)."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _message(name: str) -> Any:
    """A message of `tf.train`, described here so that no generated code ties us to one version of protobuf."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tf", syntax="proto2")
    for message, fields in _FIELDS.items():
        described = file.message_type.add(name=message)
        for field, number, kind, repeats in fields:
            label = kinds.LABEL_REPEATED if repeats else kinds.LABEL_OPTIONAL
            type_: dict[str, Any]
            if kind in _FIELDS:
                type_ = {"type": kinds.TYPE_MESSAGE, "type_name": f".tf.{kind}"}
            else:
                type_ = {"type": kinds.Type.Value(f"TYPE_{kind.upper()}")}
            described.field.add(name=field, number=number, label=label, **type_)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tf.{name}"))


_EXAMPLE = _message("Example")
