"""The packed policy against the official arithmetic, layer by layer, by `benchmarks/parity.py`.

    pytest tests/test_official_parity.py            # every layer small
    pytest -m slow tests/test_official_parity.py    # full width (a minute), the whole network (8 GB of disk)

Alone, a layer that flips no int8 code agrees with float64 to float32's precision, which no wrong formula could do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from parity import parity

# Sums of float32 in another order: 1e-7 to 1e-6 of the result, ten times that at most.
FLOAT_PRECISION = 1e-5
# A code is x * scale of at most 127, rounded: where x is wrong by 4e-6, one in a thousand is within 127 * 4e-6 of a
# border on either side.
FLIPPED = 1e-3


def agrees(result: dict[str, Any]) -> None:
    flipped = {row["layer"]: row for row in result["flipped alone"]}
    exact = [row for row in result["alone"] if not flipped.get(row["state"], {}).get("packed")]
    assert all(row["packed"] < FLOAT_PRECISION for row in exact), exact
    assert {"vision.0", "connector", "decoder.0", "answers", "actions"} <= {row["state"] for row in exact}
    for row in result["alone"]:
        assert row["packed"] < row["bfloat16"], row
    for row in flipped.values():
        assert row["packed"] < FLIPPED < 10 * FLIPPED < row["bfloat16"], row


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_reduced(tmp_path: Path) -> None:
    result = parity(tmp_path, reduced=True)
    agrees(result)
    assert any(not row["packed"] for row in result["flipped alone"]), "no ternary layer was compared to float precision"
    assert result["through"][-1]["packed"] < result["through"][-1]["bfloat16"]


@pytest.mark.slow
def test_full_width(tmp_path: Path) -> None:
    agrees(parity(tmp_path, layers=1))


@pytest.mark.slow
def test_whole_network(tmp_path: Path) -> None:
    agrees(parity(tmp_path))
