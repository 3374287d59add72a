"""What one call of a policy has to do: multiply-adds by part and kind, and an estimate of their energy."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from bitvla.config import ActionConfig, FlowConfig, PolicyConfig

# Joules of one operation in 7 nm: a ternary multiply-add is an int8 addition, the others are float16 product and sum
# (BitNet b1.58 2B4T report, arXiv 2504.12285, with the energies of its appendix). Memory traffic is not in it.
JOULES = {"ternary": 0.007e-12, "attention": 0.5e-12, "full_precision": 0.5e-12}


class Work(NamedTuple):
    """Multiply-adds of one part of the network."""

    ternary: int = 0
    attention: int = 0
    full_precision: int = 0

    @property
    def total(self) -> int:
        return sum(self)


def work(config: PolicyConfig, length: int, known: int = 0) -> dict[str, Work]:
    """The multiply-adds of one call by part, for a sequence of `length` tokens, the first `known` of which were read by
    an earlier call."""
    return {"vision": _vision(config), "decoder": _decoder(config, length, known), "head": _head(config, length)}


def estimated_joules(parts: dict[str, Work]) -> float:
    """Energy of the arithmetic alone: an estimate by counting, not a measurement."""
    return sum(getattr(part, kind) * joules for part in parts.values() for kind, joules in JOULES.items())


def processor_joules(root: Path = Path("/sys/class/powercap")) -> float | None:
    """What the processor packages have used so far by their own counters (RAPL); None where there are none to read.

    Counters wrap around after minutes to hours: a difference below zero is no measurement.
    """
    try:
        counters = [path / "energy_uj" for path in root.glob("intel-rapl:*") if path.name.count(":") == 1]
        return sum(int(counter.read_text()) for counter in counters) / 1e6 if counters else None
    except (OSError, ValueError):
        return None  # most systems show them to root alone


def _vision(config: PolicyConfig) -> Work:
    """Tower and connector, for all cameras."""
    vision, hidden = config.vision, config.language.hidden_size
    patches, width = vision.num_patches, vision.hidden_size
    seen = patches * len(config.processing.cameras)
    projections = seen * vision.num_layers * width * (4 * width + 2 * vision.intermediate_size)
    # FiLM's own projections are made once for an instruction.
    film = vision.num_layers * width if vision.film else 0
    around = seen * (3 * vision.patch_size**2 * width + film + width * hidden + hidden * hidden)
    return Work(
        ternary=projections if vision.ternary else 0,
        attention=seen * vision.num_layers * 2 * patches * width,
        full_precision=around if vision.ternary else around + projections,
    )


def _decoder(config: PolicyConfig, length: int, known: int) -> Work:
    """Decoder and proprio projector. Every token gives keys and values; in the last layer only the answers go on."""
    language, action = config.language, config.action
    hidden = language.hidden_size
    keys = language.num_layers * (length - known) * 2 * hidden * language.num_kv_heads * language.head_dim
    rows = (language.num_layers - 1) * (length - known) + (1 if action.bins else action.num_slots)
    return Work(
        ternary=keys + rows * hidden * (2 * hidden + 3 * language.intermediate_size),
        attention=rows * 2 * hidden * (length if language.bidirectional else (known + length + 1) // 2),
        full_precision=hidden * (action.state_dim + hidden) if action.state_dim else 0,
    )


def _head(config: PolicyConfig, length: int) -> Work:
    """The action head; or the tokens of an action, of which all but the last pass the decoder again."""
    language, action, width = config.language, config.action, config.action.head_hidden_size
    hidden = language.hidden_size
    if action.bins:
        keys = 2 * language.num_kv_heads * language.head_dim
        layer = hidden * (2 * hidden + keys + 3 * language.intermediate_size)
        passes = (action.dim - 1) * language.num_layers
        return Work(
            ternary=passes * layer,
            attention=passes * 2 * (length + action.dim // 2) * hidden,
            full_precision=action.dim * action.bins * hidden,
        )
    inputs = action.slots_per_step * hidden
    if action.flow is not None:
        return _flow(action, action.flow, inputs)
    return Work(full_precision=action.horizon * (inputs * width + action.head_blocks * width**2 + width * action.dim))


def _flow(action: ActionConfig, flow: FlowConfig, inputs: int) -> Work:
    width, tokens = flow.hidden_size, flow.steps * action.horizon
    projections = tokens * flow.num_layers * width * (4 * width + 2 * flow.intermediate_size)
    around = action.horizon * inputs * width + (flow.steps + 1) * width**2 + 2 * tokens * action.dim * width
    return Work(
        ternary=projections if flow.ternary else 0,
        attention=tokens * flow.num_layers * 2 * action.horizon * width,
        full_precision=around if flow.ternary else around + projections,
    )
