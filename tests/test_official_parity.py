"""The packed policy against the official arithmetic, layer by layer, by `benchmarks/parity.py`.

    pytest tests/test_official_parity.py            # every layer small
    pytest -m slow tests/test_official_parity.py    # full width (a minute), the whole network (8 GB of disk)

Alone, most tokens of a layer agree with float64 to float32's precision, which no wrong formula could do. The others
hold an int8 code at a border that fell to the other side, and what follows from it within the layer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from parity import KINDS, parity

from bitvla.convert.make_checkpoint import Kind

# Sums of float32 in another order: 1e-7 to 1e-6 of the result, ten times that at most.
FLOAT_PRECISION = 1e-5


def agrees(result: dict[str, Any]) -> None:
    flipped = {row["layer"]: row for row in result["flipped alone"]}
    for row in result["alone"]:
        assert row["packed, median token"] < FLOAT_PRECISION, row
        assert row["packed"] < row["bfloat16"], row
        if row["state"] not in flipped:  # nothing there is quantised
            assert row["packed"] < FLOAT_PRECISION, row
    for row in flipped.values():
        assert 10 * row["packed"] < row["bfloat16"], row


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_reduced(tmp_path: Path) -> None:
    result = parity(tmp_path, reduced=True)
    agrees(result)
    (tower,) = [row for row in result["through"] if row["state"] == "connector"]  # later, chance decides who is closer
    assert tower["packed"] < tower["bfloat16"]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_reduced_base_models(tmp_path: Path, kind: Kind) -> None:
    """Causal, to the logits of an answer about an image or of an action's first token."""
    result = parity(tmp_path, kind=kind, reduced=True)
    agrees(result)
    assert result["alone"][-1]["state"] == "logits.0"
    assert result["likeliest token"]["packed"] == result["likeliest token"]["float32"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[1:])
def test_full_width_base_models(tmp_path: Path, kind: Kind) -> None:
    agrees(parity(tmp_path, kind=kind, layers=2))


@pytest.mark.slow
def test_full_width(tmp_path: Path) -> None:
    agrees(parity(tmp_path, layers=2))


@pytest.mark.slow
def test_whole_network(tmp_path: Path) -> None:
    agrees(parity(tmp_path))
