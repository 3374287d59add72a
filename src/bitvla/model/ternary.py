"""Fake quantisation for training: the arithmetic of `bitvla.quantization`, with gradients that pass straight through.

The product is computed on the codes themselves, as whole numbers, and scaled afterwards. In float32 such sums are
exact below 2**24, so training accumulates exactly the integers that the packed kernels accumulate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitvla.quantization import EPSILON

_EPSILON = float(EPSILON)


class _RoundStraightThrough(torch.autograd.Function):
    """Round half to even and clamp; the gradient is the identity, as in the reference."""

    @staticmethod
    def forward(ctx: object, x: Tensor, low: float, high: float) -> Tensor:
        return x.round().clamp(low, high)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary codes (float32, the shape of `weight`) with straight-through gradient, and the scale alpha ()."""
    alpha = weight.detach().abs().mean(dtype=torch.float64).float().clamp(min=_EPSILON)
    return _RoundStraightThrough.apply(weight.float() * (1 / alpha), -1.0, 1.0), alpha


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes (float32, the shape of `x`) with straight-through gradient, and their scale (..., 1)."""
    x = x.float()
    beta = x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=_EPSILON)
    # A Python number divided by a tensor becomes a reciprocal and a product in PyTorch, which round twice.
    scale = torch.full_like(beta, 127) / beta
    return _RoundStraightThrough.apply(x * scale, -128.0, 127.0), beta / 127


class TernaryLinear(nn.Linear):
    """A linear layer with ternary weights and int8 activations; latent weights stay in full precision."""

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quantize_activations(x)
        weight_codes, alpha = ternarize(self.weight)
        product = nn.functional.linear(codes, weight_codes)
        output = product.float() * (scale * alpha)
        if self.bias is not None:
            output = output + self.bias
        return output.to(product.dtype)


def make_ternary(module: nn.Module) -> nn.Module:
    """Turn every linear layer below `module` into a `TernaryLinear`, in place, keeping its parameters."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = TernaryLinear  # same parameters and names, so checkpoints fit both precisions
    return module
