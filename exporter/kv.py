"""The KV cache in PyTorch: what `Int4KVAttention` and `HalfKVAttention` (docs/ops.md) do to keys and values, for the
simulation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specquant.custom_ops.kv_rows import rotates_keys

NAME, NAME_HALF = "specquant_int4_kv", "specquant_half_kv"
LEVELS = 15  # the largest 4-bit level
_OFFSET = "specquant_key_offset"  # buffer of an attention module: float32 [kv_heads, head_dim]


def hadamard(x: Tensor) -> Tensor:
    """x [..., d] times the orthonormal Hadamard matrix of Sylvester's order, d a power of two.

    Butterflies from the nearest neighbours outwards, the order of the kernels, so that float32 results are equal.
    """
    d = x.shape[-1]
    step = 1
    while step < d:
        a, b = x.unflatten(-1, (d // (2 * step), 2, step)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        step *= 2
    return x * (1 / torch.tensor(float(d), device=x.device).sqrt())


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """x float32 [..., N] in blocks of `block` features (a power of two), each times the Hadamard matrix; 0: x itself.

    A product with the matrix: much faster here than butterflies, and equal to them up to rounding.
    """
    if not block:
        return x
    with matmul_precision("highest"):
        matrix = hadamard(torch.eye(block, device=x.device, dtype=x.dtype))
        return (x.unflatten(-1, (-1, block)) @ matrix).flatten(-2)


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Of float32 matrix products on a GPU: `high` is tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fake_quantize_rows(x: Tensor, clip: float = 1.0) -> Tensor:
    """Each row of x [..., d] in 4 bits and back: low + scale · q, levels over the middle `clip` of its range, as
    in custom_ops/kv_rows.py.

    A row that float16 cannot span, or with a NaN or an infinity, is NaN. Gradients pass straight through.
    """
    x = x.float()
    with torch.no_grad():
        lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        levels = torch.tensor(float(LEVELS), device=x.device)  # a Python number would become a reciprocal
        span = hi - lo
        cut = span * (0.5 * (1 - torch.tensor(clip, device=x.device)))
        scale, low = ((span - (cut + cut)) / levels).half().float(), (lo + cut).half().float()
        inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
        q = ((x - low) * inverse).round().clamp(0, LEVELS)
        y = torch.where(scale.isfinite() & low.isfinite(), low + scale * q, torch.full_like(x, torch.nan))
    return x + (y - x).detach() if x.requires_grad else y


def use_int4_cache(model: nn.Module, clip: float) -> None:
    """Let every attention of a transformers model see keys (after RoPE) and values as the 4-bit cache holds them.

    An attention without a key offset measures it: the mean key of its first call, all tokens but each sequence's
    first, whose keys are like no others.
    """
    name = f"{NAME}_{clip}"
    AttentionInterface.register(name, partial(_attention, clip=clip))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)  # type: ignore[operator]


def use_half_cache(model: nn.Module) -> None:
    """Let every attention of a transformers model see keys (after RoPE) and values rounded to float16."""
    AttentionInterface.register(NAME_HALF, _half_attention)
    AttentionMaskInterface.register(NAME_HALF, sdpa_mask)
    model.set_attn_implementation(NAME_HALF)  # type: ignore[operator]


def set_key_offset(attention: nn.Module, offset: NDArray[np.float32] | None) -> None:
    """Give an attention module its key offset, float32 [kv_heads, head_dim]; None: zero."""
    attention.register_buffer(_OFFSET, torch.zeros(1, 1) if offset is None else torch.from_numpy(offset))


def key_offset(attention: nn.Module) -> NDArray[np.float32] | None:
    """The key offset that a module measured or was given; None without one."""
    offset = getattr(attention, _OFFSET, None)
    return None if offset is None else np.ascontiguousarray(offset.cpu().numpy(), np.float32)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    clip: float,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [batch, heads, tokens, d], key and value [batch, kv_heads, past + tokens, d]."""
    dtype = query.dtype
    query, key = query.float(), key.float()
    if not hasattr(module, _OFFSET):
        module.register_buffer(_OFFSET, key[:, :, 1:].mean((0, 2)))
    key = key - getattr(module, _OFFSET)[:, None].to(key.device)
    if rotates_keys(key.shape[-1]):
        query, key = hadamard(query), hadamard(key)
    key, value = (fake_quantize_rows(x, clip).to(dtype) for x in (key, value))
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query.to(dtype), key, value, attention_mask, **options)
    return output


def _half_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As `_attention`. Gradients pass straight through."""
    key, value = (x + (x.half().to(x.dtype) - x).detach() for x in (key, value))
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output
