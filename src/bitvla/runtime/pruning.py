"""Which image tokens the decoder may do without: those that resemble others. Free of training, a choice of its user."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import bitvla._native as native


def most_different(tokens: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """A mask (M,) of `count` of the tokens float32 (M, H), chosen so that none of the others is far from all of them.

    The first is the longest vector; each that follows is the farthest (L2) from the nearest chosen before it (Gonzalez
    1985; for the image tokens of vision-language models, Alvar et al. 2025, arXiv 2503.02175). Products are the
    kernels', so that every machine chooses the same.
    """
    products = np.empty((len(tokens), len(tokens)), np.float32)
    native.linear(tokens, tokens, None, products)
    lengths = products.diagonal()
    nearest = lengths.copy()  # squared distances to what was chosen; at first to the origin
    chosen = np.zeros(len(tokens), np.bool_)
    for _ in range(count):
        index = int(nearest.argmax())
        chosen[index] = True
        np.minimum(nearest, lengths + lengths[index] - 2 * products[index], out=nearest)
        nearest[index] = -np.inf  # rounding may leave others below zero
    return chosen
