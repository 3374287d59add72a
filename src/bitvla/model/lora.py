"""Low-rank adapters (LoRA, Hu et al., 2021) of the latent weights: W + alpha / rank * B A, then ternary codes of that.

Libraries of adapters add B A x to what a layer answers, which no ternary weight can do once it is packed. Here the sum
is what is quantised, in training as in `bitvla pack`, so a policy with merged adapters is the one that was trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# Parts that act, and FiLM. Often new: a run with adapters trains them whole, as the official fine-tuning does.
WHOLE = ("film.", "proprio_projector.", "prefix_projector.", "action_head.", "language_model.lm_head.")
ADAPTED = ".parametrizations.weight.original"  # a weight with an adapter, where it was ".weight"
_PARAMETRIZATION = ".parametrizations.weight.0."


class LowRank(nn.Module):
    """What is added to a weight (rows, columns). At the start nothing: B is zero (Gaussian A, as in OpenVLA-OFT)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, columns).normal_(std=1 / rank))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return merged(weight, self.lora_A, self.lora_B, self.scale)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The adapted weight, in float32 also where training is in mixed precision: packing must find the same codes."""
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight, b, a, alpha=scale)


def add_adapters(network: nn.Module, rank: int, alpha: float) -> None:
    """Freeze `network` but for the parts that act, and adapt every linear layer of the others, in place."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(WHOLE))
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and not f"{name}.".startswith(WHOLE):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha))


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """What a run trains of the network's state: all, or where there are adapters these and the parts that act."""
    state = network.state_dict()
    if not any(_PARAMETRIZATION in name for name in state):
        return state
    return {name: value for name, value in state.items() if _PARAMETRIZATION in name or name.startswith(WHOLE)}


def checkpoint_name(name: str) -> str:
    """The name in a checkpoint of a tensor of `trained_state`: an adapter's parts stand beside the layer's weight."""
    return name.replace(_PARAMETRIZATION, ".")
