"""What each op computes, in NumPy (docs/ops.md): the oracle of every kernel's test.

Sizes: N in-features, M out-features, r rank of the branch, G weight groups, A activation groups, S segments.
Floats are computed in float32, integers exactly; y has the dtype of x (float32 or float16).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.attention import walsh_hadamard
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import segment_length, unpack_group_scales, unpack_int4
from specquant.custom_ops.schema import GATES, PROLOGUES

Float = NDArray[np.floating[Any]]
TINY_RANGE = np.float32(1e-30)  # a group whose values span less counts as zeros


def quantize_activation(
    u: Float, bits: int, group: int, clip: float = 1.0
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
    """Dynamic quantisation (Eq. 1) of u [..., N], per run of `group` features (0: all N): asymmetric below 8 bits.

    Returns q int32 [..., N] in 0…2^bits − 1, scale float32 [..., A] and zero_point int32 [..., A], so that
    u ≈ scale · (q − zero_point); A = N / group, or 1. At 8 bits levels are 0…254 around 127, so that q − zero_point
    always fits a signed byte. The levels span `clip` of a group's range; what lies beyond is clipped. The scale of a
    group with a NaN or an infinity is NaN.
    Raises SpecQuantError unless bits is in 2…8, group divides N and 0 < clip ≤ 1.
    """
    n = u.shape[-1]
    if not 2 <= bits <= 8:
        raise SpecQuantError(f"act_bits is {bits}; use 2 to 8, or 16 for activations that are not quantised")
    if group < 0 or (group and n % group):
        raise SpecQuantError(f"act_group {group} does not divide {n} features; use 0 or a divisor of {n}")
    if not 0 < clip <= 1:
        raise SpecQuantError(f"act_clip is {clip}; use more than 0, and at most 1")
    groups = u.astype(np.float32).reshape(*u.shape[:-1], n // (group or n), group or n)
    qmax = np.float32(254 if bits == 8 else 2**bits - 1)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        low = np.float32(clip) * np.minimum(groups.min(axis=-1, keepdims=True), np.float32(0))
        high = np.float32(clip) * np.maximum(groups.max(axis=-1, keepdims=True), np.float32(0))
        if bits == 8:
            high = np.maximum(high, -low)
            low = -high
        span = high - low
        empty, finite = span < TINY_RANGE, np.isfinite(span)
        inverse = np.where(empty | ~finite, np.float32(0), qmax / span)
        scale = np.where(finite, np.where(empty, np.float32(0), span / qmax), np.float32(np.nan))
        low, groups = np.where(finite, low, np.float32(0)), np.where(finite, groups, np.float32(0))
    zero_point = np.rint(-low * inverse)
    q = np.clip(np.rint(groups * inverse) + zero_point, 0, qmax)
    return q.astype(np.int32).reshape(u.shape), scale[..., 0], zero_point[..., 0].astype(np.int32)


def prologue_of(x: Float, prologue: int, norm: Float | None, epsilon: float) -> NDArray[np.float32]:
    """x̂ float32 [..., N] (docs/ops.md): x, or x / √(mean(x²) + epsilon) · norm [N].

    Raises SpecQuantError if `prologue` is unknown, or there is no norm [N] for rms_norm.
    """
    x32, n = x.astype(np.float32), x.shape[-1]
    if not 0 <= prologue < len(PROLOGUES):
        raise SpecQuantError(f"prologue is {prologue}; use 0 to {len(PROLOGUES) - 1}")
    if PROLOGUES[prologue] == "none":
        return x32
    if norm is None or norm.shape != (n,):
        raise SpecQuantError(f"norm should be float32 [{n}]")
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        root = np.sqrt(np.mean(x32 * x32, axis=-1, keepdims=True) + np.float32(epsilon))
        return x32 / root * norm.astype(np.float32)


def gated(v: NDArray[np.float32], gate: int) -> NDArray[np.float32]:
    """v [..., M] as it is, or float32 [..., M/2] with a gate (docs/ops.md): act(v[2i]) · v[2i + 1].

    Raises SpecQuantError if `gate` is unknown, or there are no pairs for it.
    """
    if not 0 <= gate < len(GATES):
        raise SpecQuantError(f"gate is {gate}; use 0 to {len(GATES) - 1}")
    if GATES[gate] == "none":
        return v
    if v.shape[-1] % 2:
        raise SpecQuantError(f"there are {v.shape[-1]} outputs; a gate and what it gates are a pair of them")
    g, up = v[..., ::2], v[..., 1::2]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        w = g
        if GATES[gate] == "gelu":  # ½ (1 + tanh v) is 1 / (1 + e^−2v), which does not cancel
            w = np.float32(2 * np.sqrt(2 / np.pi)) * g * (1 + np.float32(0.044715) * g * g)
        return g / (1 + np.exp(-w)) * up


def block_hadamard(x: Float, block: int) -> NDArray[np.float32]:
    """x [..., N] in float32, every run of `block` features times the Hadamard matrix; 0: as it is.

    Raises SpecQuantError unless block is 0, or a power of two from 8 to 4,096 that divides N.
    """
    n, x32 = x.shape[-1], x.astype(np.float32)
    if block == 0:
        return x32
    if not 8 <= block <= 4096 or block & (block - 1) or n % block:
        valid = f"0, or a power of two from 8 to 4096 that divides {n}"
        raise SpecQuantError(f"hadamard {block} does not suit {n} features; use {valid}")
    return walsh_hadamard(x32.reshape(*x.shape[:-1], n // block, block)).reshape(x.shape)


def _branch(
    x: NDArray[np.float32], basis: Float, coef: Float, rank: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """low = x · B[:, :rank], its columns from rank on 0, and low · C[:rank], both float32 (Eq. 13–16)."""
    low = x @ basis.astype(np.float32)
    low[..., max(rank, 0) :] = 0
    return low @ coef.astype(np.float32), low


def _matmul4(
    u: NDArray[np.float32],
    qweight: NDArray[np.int8],
    group_scales: NDArray[np.int8],
    scales: Float,
    group_size: int,
    act_bits: int,
    act_group: int,
    act_clip: float,
) -> NDArray[np.float32]:
    """u [..., N] times the INT4 weights: float32 [..., M]."""
    n, m = u.shape[-1], scales.shape[0]
    if scales.ndim != 1:
        raise SpecQuantError(f"scales {list(scales.shape)} should have one axis: export the model again")
    segment = segment_length(n, group_size, act_group)
    count, groups = n // segment, n // (group_size or n)
    q_w, c = unpack_int4(qweight, n, m), unpack_group_scales(group_scales, groups, m).astype(np.float32)
    if act_bits == 16:
        return u @ (np.repeat(c, n // groups, axis=0) * q_w) * scales.astype(np.float32)
    q, scale, zero_point = quantize_activation(u, act_bits, act_group, act_clip)
    y = np.zeros((*u.shape[:-1], m), np.float32)
    for s in range(count):
        features = slice(s * segment, (s + 1) * segment)
        g, a = s * groups // count, s * scale.shape[-1] // count
        # Integers below 2^53 are exact in float64, whose product is the fast one.
        centred = q[..., features].astype(np.float64) - zero_point[..., a, None]
        total = centred @ q_w[features].astype(np.float64)
        y += scale[..., a, None] * c[g] * total.astype(np.float32)
    return y * scales.astype(np.float32)


def _finish(y: NDArray[np.float32], bias: Float, residual: Float | None, gate: int) -> NDArray[np.float32]:
    y = gated(y + bias.astype(np.float32), gate)
    return y if residual is None else y + residual.astype(np.float32)


def spectral_branch(x: Float, basis: Float, coef: Float, rank: NDArray[np.int64]) -> tuple[Float, Float]:
    """`SpectralBranch`: x [..., N], basis [N, r], coef [r, M], rank i64[1] → y [..., M], low [..., r]."""
    y, low = _branch(x.astype(np.float32), basis, coef, int(rank[0]))
    return y.astype(x.dtype), low.astype(x.dtype)


def int4_residual_matmul(
    x: Float,
    qweight: NDArray[np.int8],
    group_scales: NDArray[np.int8],
    scales: Float,
    bias: Float,
    norm: Float | None = None,
    residual: Float | None = None,
    *,
    group_size: int = 0,
    act_bits: int = 16,
    act_group: int = 0,
    act_clip: float = 1.0,
    hadamard: int = 0,
    prologue: int = 0,
    epsilon: float = 1e-5,
    gate: int = 0,
) -> Float:
    """`Int4ResidualMatMul`: y = x̂ H · Q4(W) + bias + residual, x̂ as `prologue_of` says; then `gated`.

    x [..., N], qweight i8[P, Q, 64], group_scales i8[P, G, 8], scales [M], bias [M], residual [..., M] or of one zero
    → y [..., M], or [..., M/2] with a gate.
    Raises SpecQuantError if sizes or attributes disagree.
    """
    u = block_hadamard(prologue_of(x, prologue, norm, epsilon), hadamard)
    y = _matmul4(u, qweight, group_scales, scales, group_size, act_bits, act_group, act_clip)
    return _finish(y, bias, residual, gate).astype(x.dtype)


def specquant_matmul(
    x: Float,
    basis: Float,
    coef: Float,
    rank: NDArray[np.int64],
    qweight: NDArray[np.int8],
    group_scales: NDArray[np.int8],
    scales: Float,
    bias: Float,
    norm: Float | None = None,
    residual: Float | None = None,
    *,
    group_size: int = 0,
    act_bits: int = 16,
    act_group: int = 0,
    act_clip: float = 1.0,
    hadamard: int = 0,
    subtract: int = 0,
    prologue: int = 0,
    epsilon: float = 1e-5,
    gate: int = 0,
) -> Float:
    """`SpecQuantMatMul`: low = x̂ H · B[:, :rank], y = low · C[:rank] + (x̂ H − s · low · Bᵀ) · Q4(R) + bias + residual.

    s is `subtract`; then `gated`. Shapes as in the two ops above.
    Raises SpecQuantError if sizes or attributes disagree.
    """
    x32 = block_hadamard(prologue_of(x, prologue, norm, epsilon), hadamard)
    y, low = _branch(x32, basis, coef, int(rank[0]))
    u = x32 - low @ basis.astype(np.float32).T if subtract else x32
    y += _matmul4(u, qweight, group_scales, scales, group_size, act_bits, act_group, act_clip)
    return _finish(y, bias, residual, gate).astype(x.dtype)
