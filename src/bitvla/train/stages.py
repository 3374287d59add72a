"""What each stage of training minimises. The loop around them is `bitvla.train.loop`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitvla.model.network import Batch, Output
from bitvla.train.batches import Window
from bitvla.train.config import TrainConfig

Losses = dict[str, Tensor]  # by name; "loss" is the one that is minimised
Network = Callable[[Batch], Output]  # a BitVLA, compiled or not
Objective = Callable[[Network, Window], Losses]


class AuxiliaryHead(nn.Module):
    """Reads privileged simulator state from the proprio token, so that the tower learns early where things are.

    Only a training signal: it is no part of the policy.
    """

    def __init__(self, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, outputs)

    def forward(self, output: Output) -> Tensor:
        return self.linear(output.proprio_state)


def finetune(config: TrainConfig, auxiliary: AuxiliaryHead) -> Objective:
    """OFT: mean absolute error of the chunk (paper eq. 8), plus the auxiliary regression where the data allows it."""

    def objective(network: Network, window: Window) -> Losses:
        return _regression(network(window.inputs), window, config, auxiliary)

    return objective


def distill(config: TrainConfig, auxiliary: AuxiliaryHead, teacher: Network) -> Objective:
    """Quantise-then-distill: the task's loss plus gamma times the distance between hidden states (paper eqs. 5-7).

    The student starts as the teacher's weights; the teacher is frozen, in full precision.
    """

    def objective(network: Network, window: Window) -> Losses:
        student = network(window.inputs)
        losses = _regression(student, window, config, auxiliary)
        if config.alignment_weight:
            with torch.no_grad():
                target = teacher(window.inputs)
            kept = ~window.inputs.padding
            losses["vision"] = _alignment(student.vision_states, target.vision_states)
            losses["decoder"] = _alignment(
                [state[kept] for state in student.decoder_states], [state[kept] for state in target.decoder_states]
            )
            losses["loss"] = losses["loss"] + config.alignment_weight * (losses["vision"] + losses["decoder"])
        return losses

    return objective


def _regression(output: Output, window: Window, config: TrainConfig, auxiliary: AuxiliaryHead) -> Losses:
    error = (output.actions.float() - window.actions).abs().mean(dim=-1)
    # Over all steps, valid or not: shares of a batch then weigh the same on any number of processes.
    losses = {"action_l1": (error * window.valid).mean()}
    losses["loss"] = losses["action_l1"]
    if config.auxiliary_weight and window.auxiliary.shape[1]:
        losses["auxiliary"] = (auxiliary(output).float() - window.auxiliary).abs().mean()
        losses["loss"] = losses["loss"] + config.auxiliary_weight * losses["auxiliary"]
    return losses


def _alignment(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over layers of the mean squared distance; the input to the first layer is not a layer's output."""
    distances = [(s.float() - t.float()).square().mean() for s, t in zip(student[1:], teacher[1:], strict=True)]
    return torch.stack(distances).mean()
