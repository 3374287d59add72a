"""What each stage of training minimises. The loop around them is `bitvla.train.loop`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitvla.config import LanguageModelConfig, PolicyConfig
from bitvla.errors import BitvlaError
from bitvla.model.network import Backbone, Output, VisionLanguageModel
from bitvla.train.batches import UNKNOWN, TokenWindow, Window
from bitvla.train.config import Part, TrainConfig

Losses = dict[str, Tensor]  # by name; "loss" is the one that is minimised
Network = Callable[..., Any]  # a whole network or its vision tower, compiled or not
Objective = Callable[[Network, Any], Losses]  # over a Window, or a TokenWindow where tokens are written

NAMES = ("align", "instruct", "localize", "pretrain", "finetune", "distill")
PARTS: dict[Part, tuple[str, ...]] = {  # what the names of their tensors begin with
    "tower": ("vision_tower.", "film."),
    "connector": ("multi_modal_projector.", "proprio_projector.", "prefix_projector."),
    "decoder": ("language_model.",),
    "head": ("action_head.",),
}
# What learns where conversations are the data (paper, Table IV): first the connector, then all that reads the tower,
# at last the tower, which has become ternary.
LANGUAGE_PARTS: dict[str, tuple[Part, ...]] = {
    "align": ("connector",),
    "instruct": ("connector", "decoder"),
    "distill": ("tower",),
}


class AuxiliaryHead(nn.Module):
    """Reads what only a simulator knows, so that the network learns early where things are.

    Positions of things come from the proprio token, their places in each image from the image's patches. Only a
    training signal: it is no part of the policy.
    """

    def __init__(self, config: PolicyConfig | LanguageModelConfig, positions: int, keypoints: int) -> None:
        super().__init__()
        self.linear = nn.Linear(config.language.hidden_size, positions)
        self.points = nn.Linear(config.vision.hidden_size if config.vision else 0, 3 * keypoints)

    def positions(self, output: Output) -> Tensor:
        """Standardised privileged state (B, E)."""
        return self.linear(output.proprio_state)

    def keypoints(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """From states (N, P, H) of images, for each thing: logits (N, K, P) of its patch, its place there (..., 2)."""
        scores = self.points(patches).unflatten(-1, (-1, 3)).transpose(1, 2)
        return scores[..., 0], scores[..., 1:]


def objective(stage: str, config: TrainConfig, auxiliary: AuxiliaryHead, teacher: Network | None) -> Objective:
    """What `stage` minimises; `teacher` is of stage "distill", the tower alone for a vision-language model."""
    if stage == "localize":
        return localize(auxiliary)
    if stage in ("pretrain", "align", "instruct"):
        return likelihood
    return finetune(config, auxiliary) if teacher is None else distill(config, auxiliary, teacher)


def trained_part(stage: str, network: Backbone) -> nn.Module:
    """What `stage` trains."""
    return network.vision_tower if stage == "localize" else network


def freeze(stage: str, config: TrainConfig, network: Backbone) -> None:
    """Leave gradients to the parts that learn in `stage`: of a policy all, if the configuration names none."""
    learning = config.learning_parts
    if learning is None and isinstance(network, VisionLanguageModel):
        learning = LANGUAGE_PARTS[stage]
    if learning is None:
        return
    names = tuple(name for part in learning for name in PARTS[part])
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(names))
    if not any(parameter.requires_grad for parameter in trained_part(stage, network).parameters()):
        raise BitvlaError(f"learning_parts = {list(learning)} leaves nothing to learn in stage '{stage}'; name others")


def localize(auxiliary: AuxiliaryHead) -> Objective:
    """The vision tower alone learns where things are in each image, at a third of the cost of a step of the policy."""

    def objective(tower: Network, window: Window) -> Losses:
        loss = _keypoint_loss(*auxiliary.keypoints(tower(window.inputs.pixels.flatten(0, 1))[-1]), window.keypoints)
        return {"loss": loss}

    return objective


def likelihood(network: Network, window: TokenWindow) -> Losses:
    """Cross-entropy of each token of an action, or of the answers, after the ones before it (paper, section IV).

    Windows weigh alike, however many such tokens they have, so that the shares of processes do as well.
    """
    return _cross_entropy(network(window.inputs), window)


def _cross_entropy(output: Output, window: TokenWindow) -> Losses:
    known = window.targets != UNKNOWN
    logits = output.actions[:, -known.shape[1] :].float()
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


def distill_tower(config: TrainConfig, teacher: Network, image_id: int) -> Objective:
    """Quantise-then-distill of the tower of a vision-language model, as the paper does it (eqs. 5-7): the likelihood of
    the answers plus gamma times the distance of its hidden states from those of the `teacher`, the tower it was.

    `image_id` is the token in whose places images are read.
    """

    def objective(network: Network, window: TokenWindow) -> Losses:
        student = network(window.inputs)
        losses = _cross_entropy(student, window)
        if config.alignment_weight:
            with torch.no_grad():
                target = teacher(window.inputs.pixels.flatten(0, 1))
            losses["answers"] = losses["loss"]
            shares = _image_shares(window.inputs.token_ids == image_id, *target[0].shape[:2])
            losses["vision"] = _alignment(student.vision_states, target, torch.ones_like(shares)[:, None], shares)
            losses["loss"] = losses["loss"] + config.alignment_weight * losses["vision"]
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


def _alignment(student: list[Tensor], teacher: list[Tensor], kept: Tensor, shares: Tensor | None = None) -> Tensor:
    """Mean over layers of the mean squared distance over the tokens that are `kept` (B, S).

    Rows weigh alike, or as `shares` (B,) says. The input to the first layer is not a layer's output.
    """
    distances = []
    for s, t in zip(student[1:], teacher[1:], strict=True):
        squares = (s.float() - t.float()).square().mean(dim=-1)
        tokens = kept.expand_as(squares)
        each = (squares * tokens).sum(dim=1) / tokens.sum(dim=1)
        distances.append(each.mean() if shares is None else (each * shares).sum())
    return torch.stack(distances).mean()


def _image_shares(read: Tensor, images: int, patches: int) -> Tensor:
    """What each of the images of a batch weighs (images,), from where its windows `read` one (B, S).

    Windows weigh alike, as the images of one do; an image that no window reads weighs nothing.
    """
    counts = read.sum(dim=1, keepdim=True) // patches
    ends, places = counts.cumsum(dim=0), torch.arange(images, device=read.device)
    inside = (places >= ends - counts) & (places < ends)
    return (inside / counts.clamp(min=1)).mean(dim=0)
