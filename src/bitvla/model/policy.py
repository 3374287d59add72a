"""A training checkpoint as a policy: the PyTorch network with the same `act` as the packed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitvla.convert.training import open_start
from bitvla.model.checkpoint import load_network
from bitvla.model.network import Batch, BitVLA
from bitvla.processing.images import crop_resized, to_pixels
from bitvla.processing.observation import check_observation
from bitvla.processing.prompt import Prompt
from bitvla.processing.vectors import check_prefix, network_actions, normalize, robot_actions, token_values


class TorchPolicy:
    """Runs a network in float32. `act` answers an observation as `bitvla.load(...).act` does."""

    def __init__(self, network: BitVLA, prompt: Prompt) -> None:
        self.config = network.config
        self._network, self._prompt = network.eval(), prompt

    @classmethod
    def load(cls, checkpoint: Path, threads: int | None = None) -> TorchPolicy:
        """The policy of a training checkpoint folder, or of a published fine-tune."""
        if threads is not None:
            torch.set_num_threads(threads)
        return cls(*load_network(open_start(checkpoint)))

    @property
    def max_prefix(self) -> int:
        """The most actions that `prefix` of `act` may hold."""
        return self.config.action.max_prefix

    def reset(self) -> None:
        """Start a new episode. The network has no memory, so there is nothing to forget."""

    def info(self) -> dict[str, Any]:
        """Name, precision, cameras and rates."""
        processing = self.config.processing
        return {
            "name": self.config.name,
            "precision": self.config.precision,
            "cameras": [camera.name for camera in processing.cameras],
            "control_hz": processing.control_hz,
            "execute_horizon": processing.execute_horizon,
            "instruction_set": "pytorch",
        }

    @torch.inference_mode()
    def act(self, observation: object, prefix: object = None) -> NDArray[np.float32]:
        """Observation -> chunk, float32 (horizon, dim) in the robot's units. `prefix`: as of `bitvla.load(...).act`."""
        seen, given = check_observation(observation, self.config), check_prefix(prefix, self.config)
        processing, action = self.config.processing, self.config.action
        padded = np.zeros((1, action.max_prefix, action.dim), np.float32)
        padded[0, : len(given)] = network_actions(given, processing)
        views = [
            to_pixels(crop_resized(image, processing.image, self.config.vision.image_size), processing.image)
            for image in seen.images
        ]
        token_ids = torch.from_numpy(self._prompt.ids(seen.instruction))[None]
        batch = Batch(
            pixels=torch.from_numpy(np.stack(views).transpose(0, 3, 1, 2))[None],
            token_ids=token_ids,
            padding=torch.zeros_like(token_ids, dtype=torch.bool),
            state=torch.from_numpy(normalize(seen.state, processing.state))[None],
            prefix=torch.from_numpy(padded),
            decided=torch.arange(action.max_prefix)[None] < len(given),
        )
        outputs = self._write(batch) if action.bins else self._network(batch).actions[0].numpy()
        chunk = robot_actions(outputs, processing)
        chunk[: len(given)] = given
        return chunk

    def _write(self, batch: Batch) -> NDArray[np.float32]:
        """One action (1, dim), normalised, token after token, each time the likeliest."""
        action, first_id = self.config.action, self.config.language.vocab_size - self.config.action.bins
        for _ in range(action.dim):
            token = self._network(batch).actions[:, -1:].argmax(-1) + first_id
            token_ids = torch.cat([batch.token_ids, token], dim=1)
            batch = batch._replace(token_ids=token_ids, padding=torch.zeros_like(token_ids, dtype=torch.bool))
        return token_values(batch.token_ids[:, -action.dim :].numpy() - first_id, action.bins)
