"""The two networks, PyTorch for training and packed for the robot, are one: the same observation, the same chunk.

    pytest tests/test_parity.py

Float sums are taken in another order, so now and then a value on the border between two int8 codes falls to the other
side, which moves a chunk a little. Where none does, the chunks agree to float precision, and no wrong formula could do
that: among the chunks of several networks some must. All must agree as closely as `pack` demands.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

import bitvla
from bitvla.config import Camera, ImageProcessing, PolicyConfig
from bitvla.convert.pack import PARITY_BOUND, pack
from bitvla.model.policy import TorchPolicy
from bitvla.processing.vectors import normalize
from checkpoints import flow_config, observation, processing_config, tiny_config, write_random_checkpoint


def changed(section: str, **fields: object) -> PolicyConfig:
    config = tiny_config()
    return msgspec.structs.replace(config, **{section: msgspec.structs.replace(getattr(config, section), **fields)})


CONFIGS = {
    "bidirectional": tiny_config(),
    "causal": changed("language", bidirectional=False),
    "full-precision tower": changed("vision", ternary=False),
    "FiLM": changed("vision", film=True),
    "one kv head": changed("language", num_kv_heads=1),
    "deep head": changed("action", head_blocks=2, slots_per_step=1),
    "rotated, lanczos": changed("processing", image=ImageProcessing(rotate180=True, resize="lanczos")),
    "decided actions": changed("action", max_prefix=3),
    "flow": flow_config(),
    "ternary flow, decided actions": tiny_config(
        action=msgspec.structs.replace(flow_config(precision="ternary").action, max_prefix=3)
    ),
    "one camera": tiny_config(processing=processing_config((Camera(name="top", height=28, width=28),), 3, 4, 5)),
}


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_pytorch(tmp_path: Path, name: str) -> None:
    config, errors, random = CONFIGS[name], [], np.random.default_rng(0)
    for seed in range(4):
        checkpoint = write_random_checkpoint(tmp_path / str(seed), config, seed=seed)
        pack(checkpoint, tmp_path / "policy.safetensors", matrix_dtype="F32")
        trained, packed = TorchPolicy.load(checkpoint), bitvla.load(tmp_path / "policy.safetensors")
        for view in range(3):
            seen, given = observation(config, 10 * seed + view), min(view + 1, config.action.max_prefix)
            prefix = random.uniform(-0.4, 0.7, (given, 4)).astype(np.float32)
            chunks = [policy.act(seen, prefix=prefix) for policy in (trained, packed)]
            assert all(np.array_equal(chunk[:given], prefix) for chunk in chunks)
            assert not given or np.abs(packed.act(seen) - chunks[1])[given:].max() > 1e-3
            one, other = (normalize(chunk, config.processing.action) for chunk in chunks)
            errors.append(np.abs(one - other)[given:].mean())
    print(name, np.sort(errors))
    assert np.max(errors) < PARITY_BOUND
    assert np.sum(np.array(errors) < 1e-5) >= 5
