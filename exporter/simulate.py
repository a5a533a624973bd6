"""The quantised model in PyTorch: what an artifact computes, for calibration and to check the runtime against."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from specquant.exporter.decoder import Decoder, FloatLinear, Linear
from specquant.exporter.families import Family
from specquant.exporter.gptq import expand
from specquant.exporter.head import ACT_BITS, quantize_table
from specquant.exporter.kv import block_hadamard, set_key_offset, use_half_cache, use_int4_cache


def fake_quantize(u: Tensor, bits: int, group: int, clip: float | Tensor = 1.0) -> Tensor:
    """Quantise and dequantise per token and group of features (Eq. 1; docs/ops.md): float32 [..., N] -> the same."""
    if bits == 16:
        return u
    # A tensor: torch turns a division by or of a Python number into a product with a reciprocal, rounded twice.
    levels = 254 if bits == 8 else 2**bits - 1
    qmax = torch.tensor(levels, dtype=u.dtype, device=u.device)
    g = u.unflatten(-1, (-1, group)) if group else u.unsqueeze(-2)
    lo, hi = g.amin(-1, keepdim=True).clamp(max=0), g.amax(-1, keepdim=True).clamp(min=0)
    lo, hi = lo * clip, hi * clip
    if bits == 8:
        hi = torch.maximum(hi, -lo)
        lo = -hi
    span = hi - lo
    dead = span < 1e-30
    inverse = torch.where(dead, torch.zeros_like(span), qmax / span)
    scale = torch.where(dead, torch.zeros_like(span), span / qmax)
    zero = torch.round(-lo * inverse)
    q = (g * inverse).round_().add_(zero).clamp_(0, levels)
    return q.sub_(zero).mul_(scale).view(u.shape)


class SimInput(nn.Module):
    """The part of an op call that depends on x alone, shared by its linears: x̂B and the quantised residual."""

    basis: Tensor | None

    def __init__(
        self, basis: Tensor | None, subtract: bool, act_bits: int, act_group: int, hadamard: int = 0, clip: float = 1.0
    ) -> None:
        super().__init__()
        self.register_buffer("basis", basis)
        self.subtract, self.act_bits, self.act_group = subtract, act_bits, act_group
        self.hadamard, self.clip = hadamard, clip
        self._last: tuple[Tensor, Tensor | None, Tensor] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """x float32 [..., N] -> low [..., r] (None without a branch), quantised u [..., N]."""
        if self._last is None or self._last[0] is not x:  # q/k/v see the same tensor one after the other
            turned = block_hadamard(x, self.hadamard)
            low, u = None, turned
            if self.basis is not None:
                low = turned @ self.basis
                if self.subtract:
                    u = turned - low @ self.basis.T
            self._last = (x, low, fake_quantize(u, self.act_bits, self.act_group, self.clip))
        return self._last[1:]


class SimLinear(nn.Module):
    """y = low · C + u · Ŵ + bias, with Ŵ the dequantised residual [N, M]."""

    weight: Tensor
    coef: Tensor | None
    bias: Tensor | None

    def __init__(self, shared: SimInput, weight: Tensor, coef: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.shared = shared
        self.register_buffer("weight", weight)
        self.register_buffer("coef", coef)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        low, u = self.shared(x)
        y = u @ self.weight
        if low is not None and self.coef is not None:
            y += low @ self.coef
        return y if self.bias is None else y + self.bias


def sim_linears(linear: Linear) -> dict[str, SimLinear]:
    """One module a part of `linear`, all sharing one SimInput."""
    m = list(linear.parts.values())
    bias = [None] * len(m) if linear.bias is None else list(_tensor(linear.bias).split(m))
    if isinstance(linear, FloatLinear):
        shared = SimInput(None, False, 16, 0)
        weights, coefs = _tensor(linear.weight).split(m, 1), [None] * len(m)
    else:
        basis = None if linear.basis is None else _tensor(linear.basis)
        shared = SimInput(basis, linear.subtract, linear.act_bits, linear.act_group, linear.hadamard, linear.act_clip)
        weights = (_tensor(linear.q) * expand(_tensor(linear.products), linear.q.shape[0])).split(m, 1)
        coefs = [None] * len(m) if linear.coef is None else list(_tensor(linear.coef).split(m, 1))
    return {
        name: SimLinear(shared, w.contiguous(), c, b)
        for name, w, c, b in zip(linear.parts, weights, coefs, bias, strict=True)
    }


def simulate(model: nn.Module, family: Family, decoder: Decoder) -> nn.Module:
    """Put a decoder's numbers into a transformers model of the same architecture (changed in place and returned)."""
    base = model.get_submodule(family.decoder)
    bits, embedding = decoder.config.head_bits, decoder.embedding
    stored = embedding if bits == 16 else embedding.astype(np.float16)
    base.get_submodule(family.embedding).weight.data = _tensor(stored)
    family.set_norm(base, family.final_norm, _tensor(decoder.final_norm))
    head = embedding if decoder.lm_head is None else decoder.lm_head
    if bits == 16:
        model.get_submodule(family.lm_head).weight.data = _tensor(head)
    else:
        model.set_submodule(family.lm_head, _sim_head(head, bits))
    for layer, numbers in zip(base.get_submodule(family.layers).children(), decoder.layers, strict=True):
        for name, norm in numbers.norms.items():
            family.set_norm(layer, family.norms[name], _tensor(norm))
        for linear in numbers.linears:
            for name, module in sim_linears(linear).items():
                layer.set_submodule(name, module)
        if decoder.config.kv_bits == 4:
            set_key_offset(layer.get_submodule(family.attention), numbers.key_offset)
    if decoder.config.kv_bits == 4:
        use_int4_cache(model, decoder.config.kv_clip)
    elif decoder.attention_op == "HalfKVAttention":
        use_half_cache(model)
    return model.eval()


def _sim_head(weights: np.ndarray, bits: int) -> SimLinear:
    """The head [vocab, hidden] of `head.head_linear`, whose input may be x and x / 16: that changes no sum."""
    table = quantize_table(weights, bits)
    return SimLinear(SimInput(None, False, ACT_BITS, table.group), _tensor(table.floats().T), None, None)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).float()
