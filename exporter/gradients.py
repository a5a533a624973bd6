"""What refinement (refine.py) differentiates that autograd cannot, or only with far more memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specquant.exporter.simulate import fake_quantize

_ROWS = 1024  # of logits whose softmax is held at once


class Divergence(torch.autograd.Function):
    """Mean over rows of KL(target ‖ output), both logits [T, V]. What a vocabulary takes is kept once: the gradient,
    (softmax(output) − softmax(target)) / T."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor) -> Tensor:
        gradient, total = torch.empty_like(output), output.new_zeros((), dtype=torch.float32)
        for rows in torch.arange(len(output)).split(_ROWS):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            p, q = (torch.log_softmax(logits[part].float(), -1) for logits in (target, output))
            share = p.exp()
            total += (share * (p - q)).sum()
            gradient[part] = (q.exp() - share) / len(output)
        ctx.save_for_backward(gradient)
        return total / len(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradient, None


class FakeQuantize(torch.autograd.Function):
    """Activations in their levels. The gradient of u [..., N] passes where levels reach it; `clip`, a scalar tensor,
    learns from what it clips and what it rounds, as a step size does in LSQ (Esser et al. 2020)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, clip: Tensor, bits: int, group: int) -> Tensor:
        y = fake_quantize(u, bits, group, clip)
        ctx.save_for_backward(u, y, clip)
        ctx.bits, ctx.group = bits, group
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        u, y, clip = ctx.saved_tensors
        g = u.unflatten(-1, (-1, ctx.group or u.shape[-1]))
        lo, hi = g.amin(-1, keepdim=True).clamp(max=0) * clip, g.amax(-1, keepdim=True).clamp(min=0) * clip
        if ctx.bits == 8:
            hi = torch.maximum(hi, -lo)
            lo = -hi
        half = (hi - lo) * (0.5 / (2**ctx.bits - 1))
        inside = ((g >= lo - half) & (g <= hi + half)).view_as(u)
        moved = torch.where(inside, y - u, y)
        return gradient * inside, (gradient * moved).sum() / clip, None, None


class StraightThrough(torch.autograd.Function):
    """A rounding whose gradient is taken to be 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
