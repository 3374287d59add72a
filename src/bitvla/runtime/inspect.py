"""What is in the file of a policy or a language model: parameters, bytes and bits by part, conventions, statistics,
provenance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bitvla.bundle import (
    Bundle,
    Document,
    TensorSpec,
    is_language_model,
    read,
    read_language_model,
    stored_tensors,
    tensor_specs,
)
from bitvla.config import LanguageModelConfig, PolicyConfig, Statistics, to_dict

PARTS: dict[str, str | tuple[str, ...]] = {
    "vision": ("vision_tower.", "film."),
    "connector": "multi_modal_projector.",
    "embeddings": "language_model.model.embed_tokens.",
    "decoder": "language_model.model.",
    "proprio": "proprio_projector.",
    "prefix": "prefix_projector.",
    "head": ("action_head.", "language_model.lm_head."),
    "golden traces": "golden.",
}


def part_of(tensor: str) -> str:
    """The part of the policy that a tensor belongs to, by its name."""
    return next(part for part, prefix in PARTS.items() if tensor.startswith(prefix))


def bytes_by_part(document: Document[Any]) -> dict[str, int]:
    """Bytes in the file of each part's tensors."""
    total = dict.fromkeys(PARTS, 0)
    for name, stored in stored_tensors(document).items():
        total[part_of(name)] += stored.nbytes
    return total


def inspect(path: Path) -> dict[str, Any]:
    """Describe a file as plain, JSON-able data. Reads the header only, and the weights of small files."""
    path = Path(path)
    return describe(read_language_model(path) if is_language_model(path) else read(path))


def describe(bundle: Bundle[Any]) -> dict[str, Any]:
    document, config = bundle.document, bundle.config
    specs = tensor_specs(config)
    parameters = sum(math.prod(spec.shape) for spec in specs.values())
    file_bytes = bundle.path.stat().st_size if bundle.path else None
    weight_bytes = sum(size for part, size in bytes_by_part(document).items() if part != "golden traces")
    return {
        "name": config.name,
        "path": str(bundle.path) if bundle.path else None,
        "sha256": bundle.sha256,
        "format": document.format,
        "packing": document.packing,
        "file_bytes": file_bytes,
        "weight_bytes": weight_bytes,
        "bf16_bytes": 2 * parameters,
        "parameters": parameters,
        "bits_per_parameter": 8 * weight_bytes / parameters,
        "precision": _by_precision(document, specs),
        "parts": _by_part(document, specs),
        **(_of_language_model(config) if isinstance(config, LanguageModelConfig) else _of_policy(config)),
        "golden": list(document.golden),
        "provenance": document.provenance,
    }


def _of_policy(config: PolicyConfig) -> dict[str, Any]:
    processing = config.processing
    return {
        "sizes": {name: to_dict(getattr(config, name)) for name in ("vision", "language", "action")},
        "conventions": {
            "cameras": [to_dict(camera) for camera in processing.cameras],
            "image": to_dict(processing.image),
            "prompt": to_dict(processing.prompt),
            "control_hz": processing.control_hz,
            "horizon": config.action.horizon,
            "execute_horizon": processing.execute_horizon,
            "gripper": processing.gripper,
        },
        "statistics": {name: _rows(getattr(processing, name)) for name in ("state", "action")},
    }


def _of_language_model(config: LanguageModelConfig) -> dict[str, Any]:
    sizes = {"vision": config.vision, "language": config.language}
    conventions = {"image": config.image, "chat": config.chat}
    return {
        "sizes": {name: to_dict(value) for name, value in sizes.items() if value},
        "conventions": {name: to_dict(value) for name, value in conventions.items() if value},
    }


def _by_part(document: Document[Any], specs: dict[str, TensorSpec]) -> dict[str, dict[str, Any]]:
    sizes = bytes_by_part(document)
    parts: dict[str, dict[str, Any]] = {
        part: {"parameters": 0, "ternary": 0, "bytes": size} for part, size in sizes.items()
    }
    for name, spec in specs.items():
        entry, count = parts[part_of(name)], math.prod(spec.shape)
        entry["parameters"] += count
        entry["ternary"] += count if spec.kind == "ternary" else 0
    return parts


def _by_precision(document: Document[Any], specs: dict[str, TensorSpec]) -> dict[str, dict[str, Any]]:
    """Parameters, bytes and bits a weight of each storage format; padding and scales are counted as ternary."""
    stored = stored_tensors(document)
    formats: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        kind = "ternary" if spec.kind == "ternary" else stored[name].dtype.lower()
        entry = formats.setdefault(kind, {"parameters": 0, "bytes": 0})
        entry["parameters"] += math.prod(spec.shape)
        entry["bytes"] += stored[name].nbytes + (stored[f"{name}_scale"].nbytes if kind == "ternary" else 0)
    for entry in formats.values():
        entry["bits_per_parameter"] = 8 * entry["bytes"] / entry["parameters"]
    return formats


def _rows(statistics: Statistics) -> list[dict[str, Any]]:
    fields = ("name", "unit", "low", "high", "normalized")
    columns = (statistics.names, statistics.units, statistics.low, statistics.high, statistics.mask)
    return [dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True)]
