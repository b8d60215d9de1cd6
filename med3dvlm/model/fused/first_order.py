"""Backward passes that have no derivative themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def first_order(backward: Callable) -> staticmethod:
    """A `backward` of an `autograd.Function`, run without autocast.

    Raises:
        RuntimeError: a gradient of the gradients is wanted (`create_graph=True`). `once_differentiable` would leave out
            this part of it, silently where the first gradient does not require one.
    """

    @functools.wraps(backward)
    def run(ctx, *gradients: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused DCFormer has no second derivatives: take the plain one, encoder.fused = 'off'"
            )
        with torch.autocast(gradients[0].device.type, enabled=False):
            return backward(ctx, *gradients)

    return staticmethod(run)
