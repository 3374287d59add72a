"""The weight files of a published checkpoint: every tensor by name, read one at a time.

The backbone is one safetensors file or shards with an index; training saves it under lora_adapter/. Action head and
proprio projector are saved beside it, by PyTorch, under names with their training step. No pickle is executed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitvla.bundle import to_float32
from bitvla.convert.source import check_finite, read_json, safetensors
from bitvla.errors import BitvlaError
from bitvla.quantization import ternarize

SIDE_FILES = {"action_head": "action_head.", "proprio_projector": "proprio_projector."}  # and their tensors' prefix


class Place(NamedTuple):
    """Where a tensor is: under `key` in a safetensors file, or `loaded` from a PyTorch file."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    loaded: Any = None


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint by name, over all of its files."""

    root: Path
    places: Mapping[str, Place]

    def read(self, name: str) -> NDArray[Any]:
        """One tensor as float32, or as bfloat16 seen as uint16; packed bytes as uint8. A copy, not a map."""
        import torch

        place = self.places[name]
        if place.loaded is None:
            # Opened for this tensor alone: an open file's mapping grows with every tensor that is read from it.
            with safetensors(place.path, "pt") as file:
                tensor = file.get_tensor(place.key)
        else:
            tensor = place.loaded.detach()  # it may have been saved as a parameter
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.uint16)
        elif tensor.dtype == torch.float16:
            tensor = tensor.float()
        values: NDArray[Any] = tensor.numpy().copy()
        if values.dtype != np.uint8:
            check_finite(place.path, place.key, values)
        return values

    def ternary(self, name: str) -> tuple[NDArray[np.int8], np.float32]:
        """Ternary codes and the scale of a weight, whether it is stored packed or to be rounded."""
        place = self.places[name]
        if place.dtype != "U8":
            return ternarize(to_float32(self.read(name)))
        scale = to_float32(self.read(f"{name}_scale")).reshape(-1)
        if scale.shape != (1,) or not 0 < scale[0] < np.inf:
            raise BitvlaError(f"{place.path}: {name}_scale is {scale.tolist()}; it must be one positive number")
        try:
            return unpack_rows(self.read(name)), scale[0]
        except ValueError as error:
            raise BitvlaError(f"{place.path}: tensor {place.key}: {error}") from None

    @property
    def files(self) -> list[Path]:
        return sorted({place.path for place in self.places.values()})


def find_weights(folder: Path) -> Weights:
    """The backbone's tensors, and those of the side files under the names `action_head.` and `proprio_projector.`."""
    places = dict(_backbone_places(folder))
    for name, prefix in SIDE_FILES.items():
        if path := side_file(folder, name):
            # Distributed training puts "module." before every name.
            places |= {f"{prefix}{place.key.removeprefix('module.')}": place for place in _side_places(path)}
    return Weights(folder, places)


def backbone_folder(folder: Path) -> Path:
    """Where config.json and the backbone's weights are."""
    nested = folder / "lora_adapter"
    return folder if _weight_file(folder) or not nested.is_dir() else nested


def side_file(folder: Path, name: str) -> Path | None:
    """The one file of a part that is saved beside the backbone, None where there is none."""
    found = [path for path in sorted(folder.glob(f"*{name}*checkpoint*")) if path.suffix in (".pt", ".safetensors")]
    if len(found) > 1:
        raise BitvlaError(
            f"{folder} has {len(found)} files of the {name} ({', '.join(path.name for path in found)}); keep the one "
            "that belongs to the weights"
        )
    return found[0] if found else None


def unpack_rows(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Ternary codes (4 R, K) of Microsoft's packed format, uint8 (R, K).

    Byte (r, k) holds rows r, R + r, 2 R + r and 3 R + r in bits 0-1, 2-3, 4-5 and 6-7, each as code + 1. Raises
    ValueError for the unused code 3. Source: transformers, `integrations/bitnet.py`.
    """
    fields = np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    if np.any(fields == 3):
        raise ValueError("packed weights hold the unused code 3: the data is damaged")
    return fields.astype(np.int8) - np.int8(1)


def pack_rows(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Ternary codes (4 R, K) in Microsoft's packed format, uint8 (R, K): the inverse of `unpack_rows`."""
    fields = np.split((codes + 1).astype(np.uint8), 4)
    packed: NDArray[Any] = fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6
    return packed


def _weight_file(folder: Path) -> Path | None:
    names = ("model.safetensors.index.json", "model.safetensors")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _backbone_places(folder: Path) -> Iterator[tuple[str, Place]]:
    path = _weight_file(backbone_folder(folder))
    if path is None and list(folder.rglob("adapter_model.safetensors")):
        raise BitvlaError(f"{folder} holds a LoRA adapter; merge it into its base model first")
    if path is None:
        raise BitvlaError(f"{folder} has no model.safetensors, whole or in shards: the checkpoint is not complete")
    index = _read_index(path) if path.suffix == ".json" else None
    for shard in sorted(set(index.values())) if index else [path.name]:
        for place in _safetensors_places(path.with_name(shard)):
            yield place.key, place
            if index and index.pop(place.key, None) != shard:
                raise BitvlaError(f"{place.path} holds {place.key}, which {path.name} does not expect there")
    if index:
        raise BitvlaError(f"{path} promises the tensor {min(index)}, which its shards lack ({len(index)} in all)")


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
        raise BitvlaError(f"{path} has no weight_map from tensors to shards")
    for shard in index.values():
        if Path(shard).name != shard:
            raise BitvlaError(f"{path} names the shard '{shard}', which is not a file beside it")
    return index


def _safetensors_places(path: Path) -> Iterator[Place]:
    with safetensors(path) as file:
        for key in file.keys():  # noqa: SIM118 (not a dictionary)
            entry = file.get_slice(key)
            yield Place(path, key, entry.get_dtype(), tuple(entry.get_shape()))


def _side_places(path: Path) -> Iterator[Place]:
    if path.suffix == ".safetensors":
        yield from _safetensors_places(path)
        return
    names = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}
    for key, tensor in _load_pytorch(path).items():
        yield Place(path, key, names.get(str(tensor.dtype), str(tensor.dtype)), tuple(tensor.shape), tensor)


def _load_pytorch(path: Path) -> dict[str, Any]:
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and PyTorch each have their own errors for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BitvlaError(f"{path} cannot be read as a PyTorch file of tensors alone: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise BitvlaError(f"{path} does not hold a dictionary of tensors")
    return state
