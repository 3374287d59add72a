"""What each stage of training minimises. The loop around them is `bitvla.train.loop`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitvla.config import PolicyConfig
from bitvla.errors import BitvlaError
from bitvla.model.network import BitVLA, Output
from bitvla.train.batches import UNKNOWN, TokenWindow, Window
from bitvla.train.config import TrainConfig

Losses = dict[str, Tensor]  # by name; "loss" is the one that is minimised
Network = Callable[..., Any]  # a BitVLA or its vision tower, compiled or not
Objective = Callable[[Network, Any], Losses]  # over a Window, or a TokenWindow where actions are tokens

NAMES = ("localize", "pretrain", "finetune", "distill")


class AuxiliaryHead(nn.Module):
    """Reads what only a simulator knows, so that the network learns early where things are.

    Positions of things come from the proprio token, their places in each image from the image's patches. Only a
    training signal: it is no part of the policy.
    """

    def __init__(self, policy: PolicyConfig, positions: int, keypoints: int) -> None:
        super().__init__()
        self.linear = nn.Linear(policy.language.hidden_size, positions)
        self.points = nn.Linear(policy.vision.hidden_size, 3 * keypoints)

    def positions(self, output: Output) -> Tensor:
        """Standardised privileged state (B, E)."""
        return self.linear(output.proprio_state)

    def keypoints(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """From states (N, P, H) of images, for each thing: logits (N, K, P) of its patch, its place there (..., 2)."""
        scores = self.points(patches).unflatten(-1, (-1, 3)).transpose(1, 2)
        return scores[..., 0], scores[..., 1:]


def objective(stage: str, config: TrainConfig, auxiliary: AuxiliaryHead, teacher: Network | None) -> Objective:
    """What `stage` minimises; `teacher` is of stage "distill"."""
    if stage == "localize":
        return localize(auxiliary)
    if stage == "pretrain":
        return pretrain
    return finetune(config, auxiliary) if teacher is None else distill(config, auxiliary, teacher)


def trained_part(stage: str, network: BitVLA) -> nn.Module:
    """What `stage` trains."""
    return network.vision_tower if stage == "localize" else network


def freeze(stage: str, network: BitVLA, config: TrainConfig) -> None:
    """Ask for gradients of the action head alone, where `config` says so."""
    if not config.train_head_only:
        return
    if stage != "finetune":
        raise BitvlaError(f"stage '{stage}' trains more than the action head: leave out train_head_only")
    network.requires_grad_(False)
    network.action_head.requires_grad_(True)


def localize(auxiliary: AuxiliaryHead) -> Objective:
    """The vision tower alone learns where things are in each image, at a third of the cost of a step of the policy."""

    def objective(tower: Network, window: Window) -> Losses:
        loss = _keypoint_loss(*auxiliary.keypoints(tower(window.inputs.pixels.flatten(0, 1))[-1]), window.keypoints)
        return {"loss": loss}

    return objective


def pretrain(network: Network, window: TokenWindow) -> Losses:
    """Cross-entropy of each action token after the ones before it (paper, section IV).

    Windows weigh alike, however many values their action has, so that the shares of processes do as well.
    """
    known = window.targets != UNKNOWN
    logits = network(window.inputs).actions[:, -known.shape[1] :].float()
    each = nn.functional.cross_entropy(logits.transpose(1, 2), window.targets, ignore_index=UNKNOWN, reduction="none")
    right = (logits.argmax(dim=-1) == window.targets) & known
    sizes = known.sum(dim=1)
    return {"loss": (each.sum(dim=1) / sizes).mean(), "accuracy": (right.sum(dim=1) / sizes).mean()}


def finetune(config: TrainConfig, auxiliary: AuxiliaryHead) -> Objective:
    """OFT: mean absolute error of the chunk (paper eq. 8), plus the auxiliary regression where the data allows it.

    A flow learns velocities instead: their mean squared error, on the straight line from noise to the chunk.
    """

    def objective(network: Network, window: Window) -> Losses:
        return _imitation(network(window.inputs), window, config, auxiliary)

    return objective


def distill(config: TrainConfig, auxiliary: AuxiliaryHead, teacher: Network) -> Objective:
    """Quantise-then-distill: the task's loss plus gamma times the distance between hidden states (paper eqs. 5-7).

    The student starts as the teacher's weights; the teacher is frozen, in full precision.
    """

    def objective(network: Network, window: Window) -> Losses:
        student = network(window.inputs)
        losses = _imitation(student, window, config, auxiliary)
        if config.alignment_weight:
            with torch.no_grad():
                target = teacher(window.inputs)
            kept = ~window.inputs.padding
            losses["vision"] = _alignment(student.vision_states, target.vision_states, kept.new_ones(1, 1))
            losses["decoder"] = _alignment(student.decoder_states, target.decoder_states, kept)
            losses["loss"] = losses["loss"] + config.alignment_weight * (losses["vision"] + losses["decoder"])
        return losses

    return objective


def _imitation(output: Output, window: Window, config: TrainConfig, auxiliary: AuxiliaryHead) -> Losses:
    error = output.actions.float() - window.actions
    name, each = ("flow", error.square()) if window.inputs.time.numel() else ("action_l1", error.abs())
    # Over all steps, valid or not: shares of a batch then weigh the same on any number of processes.
    losses = {name: (each.mean(dim=-1) * window.valid).mean()}
    losses["loss"] = losses[name]
    if config.auxiliary_weight and window.auxiliary.shape[1]:
        losses["auxiliary"] = (auxiliary.positions(output).float() - window.auxiliary).abs().mean()
        losses["loss"] = losses["loss"] + config.auxiliary_weight * losses["auxiliary"]
    if config.keypoint_weight and window.keypoints.shape[2]:
        losses["keypoints"] = _keypoint_loss(*auxiliary.keypoints(output.vision_states[-1]), window.keypoints)
        losses["loss"] = losses["loss"] + config.keypoint_weight * losses["keypoints"]
    return losses


def _keypoint_loss(logits: Tensor, places: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the patch that holds each thing, plus its distance inside that patch in patch widths.

    Targets are (B, V, K, 2). Things out of view count nothing; the mean is over all, as that of the actions.
    """
    logits, places, targets = logits.float(), places.float(), targets.flatten(0, 1)
    grid = math.isqrt(logits.shape[-1])
    seen = ((targets >= 0) & (targets < 1)).all(dim=-1)
    cells = (targets * grid).floor().clamp(0, grid - 1)
    patch = (cells[..., 1] * grid + cells[..., 0]).long()
    which = nn.functional.cross_entropy(logits.flatten(0, 1), patch.flatten(), reduction="none").unflatten(
        0, seen.shape
    )
    inside = places.gather(2, patch[..., None, None].expand(-1, -1, 1, 2)).squeeze(2)
    where = (inside - (targets * grid - cells)).abs().sum(dim=-1)
    return ((which + where) * seen).mean()


def _alignment(student: list[Tensor], teacher: list[Tensor], kept: Tensor) -> Tensor:
    """Mean over layers of the mean squared distance over the tokens that are `kept` (B, S), windows weighing alike.

    The input to the first layer is not a layer's output.
    """
    distances = []
    for s, t in zip(student[1:], teacher[1:], strict=True):
        squares = (s.float() - t.float()).square().mean(dim=-1)
        tokens = kept.expand_as(squares)
        distances.append(((squares * tokens).sum(dim=1) / tokens.sum(dim=1)).mean())
    return torch.stack(distances).mean()
