"""End-to-end refinement: the quantised model learns to predict what the float model predicts, then is stored again.

Layer by layer, quantisation cannot see that errors add up. Here every stored number of the quantised linears, and the
weights of the norms before them, move by gradient descent on

    KL(p_float ‖ p_quantised), the mean over calibration tokens of Σ_v p_float(v) · log(p_float(v) / p_quantised(v)),

with rounding passed straight through (the gradient of round is taken as 1). No text is learnt: the only target is the
float model's own distribution. What comes out is a `Decoder` of the same shapes, so nothing changes at run time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import MOST
from specquant.exporter.decoder import Decoder, QuantLinear
from specquant.exporter.families import Family, family_of
from specquant.exporter.gptq import QMAX, QMIN
from specquant.exporter.gradients import Divergence, FakeQuantize, StraightThrough
from specquant.exporter.kv import block_hadamard, matmul_precision
from specquant.exporter.recipe import Recipe
from specquant.exporter.recipe_checks import held_back
from specquant.exporter.scales import as_float16
from specquant.exporter.simulate import simulate

# The learning rate of integers, in units of a scale: one changes when it has moved by a half. Over many steps they move
# far at any rate, and those that turn back and forth only add noise, so all steps together lead at most this far.
_INTEGER_RATE, _INTEGER_TRAVEL = 0.03, 2.0
_WARMUP_STEPS = 10


def refine(
    model: nn.Module,
    decoder: Decoder,
    recipe: Recipe,
    tokens: Tensor,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Decoder:
    """`recipe.refine_steps` steps of Adam on the decoder's numbers; the result, or `decoder` if it is not better.

    model: the float model `decoder` was made from, unchanged by this. tokens int64 [windows, length] on its device:
    a sixteenth is kept back to judge by, the rest is visited in random order (recipe.seed), `recipe.refine_batch`
    windows a step. A CPU repeats a run bit for bit, a GPU up to the order of its sums. Raises SpecQuantError if the
    loss is lost to NaN or infinity.
    """
    held = held_back(len(tokens))
    family, device = family_of(model.config), tokens.device
    # The head in float: rounding what it reads would stop the gradient, and its own rounding is nothing to learn from.
    plain = replace(decoder, config=replace(decoder.config, head_bits=16))
    student = simulate(copy.deepcopy(model), family, plain).to(device).requires_grad_(False)
    for parameter in student.parameters():  # what a decoder does not replace may be stored in 16 bits
        parameter.data = parameter.data.float()
    stages = _make_trainable(student, family, plain)
    first = _divergence(model, student, tokens[:held], recipe.refine_batch)
    with matmul_precision("high"):
        _train(model, student, tokens[held:], recipe, progress)
    refined = _store(student, family, plain, stages)
    last = _divergence(model, simulate(student, family, refined).to(device), tokens[:held], recipe.refine_batch)
    progress(recipe.refine_steps, recipe.refine_steps, f"KL divergence {first:.4f} → {last:.4f}")
    if not math.isfinite(last):
        raise SpecQuantError(f"refinement diverged at learning rate {recipe.refine_lr}: lower --refine-lr")
    return replace(refined, config=decoder.config) if last < first else decoder


def _train(teacher: nn.Module, student: nn.Module, tokens: Tensor, recipe: Recipe, progress: Any) -> None:
    """Adam with a linear warm-up and a cosine to 0. tokens [windows, length]."""
    named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    order, steps = torch.empty(0, dtype=torch.int64), recipe.refine_steps
    integer_rate = min(_INTEGER_RATE, 2 * _INTEGER_TRAVEL / steps)  # a cosine's mean is half of its peak
    groups = [
        {"params": [p for n, p in named if n.endswith("integers")], "peak": integer_rate},
        {"params": [p for n, p in named if not n.endswith("integers")], "peak": recipe.refine_lr},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(steps):
        if len(order) < recipe.refine_batch:
            order = torch.cat([order, torch.randperm(len(tokens), generator=generator)])
        batch, order = tokens[order[: recipe.refine_batch]], order[recipe.refine_batch :]
        warm = min(1.0, (step + 1) / _WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = _kl(teacher, student, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            progress(step, steps, f"KL divergence {float(loss.detach()):.4f}")


def _kl(teacher: nn.Module, student: nn.Module, tokens: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student), nats."""
    with torch.no_grad():
        target = teacher(tokens, use_cache=False).logits.flatten(0, 1)
    output = student(tokens, use_cache=False).logits.flatten(0, 1)
    loss: Tensor = Divergence.apply(output, target)
    return loss


@torch.no_grad()
def _divergence(teacher: nn.Module, student: nn.Module, tokens: Tensor, batch: int) -> float:
    parts = tokens.split(batch)
    return sum(float(_kl(teacher, student, t)) * len(t) for t in parts) / len(tokens)


def _rounded(integers: Tensor) -> Tensor:
    return torch.clamp(torch.round(integers), QMIN, QMAX)


def _whole(group_scales: Tensor) -> Tensor:
    return torch.clamp(torch.round(group_scales), 1, MOST)


class _TrainedStage(nn.Module):
    """One op call with numbers that learn: y = low · C + u · Q4(R) + bias, concatenated over its linears.

    Every parameter is a relative change, so that one learning rate fits all: `integers` in units of a scale,
    `scale_change`, `group_change` and `clip_change` in the logarithm, `coef_change` such that 1 moves y by its own root
    mean square.
    """

    def __init__(self, linear: QuantLinear, device: torch.device) -> None:
        super().__init__()
        self.linear = linear
        self.integers = nn.Parameter(_tensor(linear.q, device))
        self.scales, self.group_scales = _tensor(linear.scales, device), _tensor(linear.group_scales, device)
        self.scale_change = nn.Parameter(torch.zeros_like(self.scales))
        self.group_change = nn.Parameter(torch.zeros_like(self.group_scales), requires_grad=len(self.group_scales) > 1)
        self.clip_change = nn.Parameter(torch.zeros((), device=device), requires_grad=linear.act_bits != 16)
        self.bias = None if linear.bias is None else _tensor(linear.bias, device)
        self.basis: Tensor | None = None
        self.coef: Tensor | None = None
        self.coef_unit: Tensor | None = None  # [r, M], of coef_change; measured on the first input
        if linear.basis is not None and linear.coef is not None:
            self.basis, self.coef = _tensor(linear.basis, device), _tensor(linear.coef, device)
            self.coef_change = nn.Parameter(torch.zeros_like(self.coef))
        self._last: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def current_scales(self) -> Tensor:
        return self.scales * self.scale_change.exp()

    def current_group_scales(self) -> Tensor:
        group_scales: Tensor = StraightThrough.apply(self.group_scales * self.group_change.exp(), _whole)
        return group_scales

    def current_clip(self) -> Tensor:
        return (self.linear.act_clip * self.clip_change.exp()).clamp(max=1)

    def current_coef(self) -> Tensor | None:
        if self.coef is None or self.coef_unit is None:
            return self.coef
        return self.coef + self.coef_change * self.coef_unit

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N] -> y [..., M]."""
        linear, low = self.linear, None
        x = u = block_hadamard(x, linear.hadamard)
        coef = self.current_coef()
        if self.basis is not None and coef is not None:
            with matmul_precision("highest"):  # low is large, and what it leaves of x small
                low = x @ self.basis
                branch = low @ coef
                if linear.subtract:
                    u = x - low @ self.basis.T
        if linear.act_bits != 16:
            u = FakeQuantize.apply(u, self.current_clip(), linear.act_bits, linear.act_group)
        q = StraightThrough.apply(self.integers, _rounded)
        scales = self.current_scales() * self.current_group_scales()
        y = u @ (q.view(len(scales), -1, q.shape[1]) * scales[:, None]).view_as(q)
        if low is not None:
            y = y + branch
            if self.coef_unit is None:
                rms = [t.detach().flatten(0, -2).square().mean(0).sqrt() for t in (low, y)]
                self.coef_unit = rms[1] / rms[0].clamp(min=1e-6)[:, None]
        return y if self.bias is None else y + self.bias

    def part(self, x: Tensor, index: int) -> Tensor:
        """The share of one linear; the product is made once for all that see the same tensor one after the other."""
        if self._last is None or self._last[0] is not x:
            self._last = (x, self(x).split(list(self.linear.parts.values()), -1))
        out = self._last[1][index]
        if index == len(self.linear.parts) - 1:
            self._last = None  # let go of the autograd graph
        return out

    @torch.no_grad()
    def to_linear(self) -> QuantLinear:
        """With float16 scales and branch."""
        coef = self.current_coef()
        return replace(
            self.linear,
            q=_rounded(self.integers).to(torch.int8).cpu().numpy(),
            group_scales=self.current_group_scales().to(torch.int8).cpu().numpy(),
            scales=as_float16(self.current_scales()).half().cpu().numpy(),
            act_clip=float(self.current_clip()),
            coef=None if coef is None else coef.clamp(-65504, 65504).half().cpu().numpy(),
            error=None,  # that of one layer, which is no longer what was minimised
        )


class _Part(nn.Module):
    """One linear of a stage, where the block looks for it."""

    def __init__(self, stage: _TrainedStage, index: int) -> None:
        super().__init__()
        self.stage, self.index = stage, index

    def forward(self, x: Tensor) -> Tensor:
        return self.stage.part(x, self.index)


class _Relative(nn.Module):
    """weight + offset = start · (1 + change); offset is what the norm adds to its weight."""

    def __init__(self, start: Tensor, offset: float) -> None:
        super().__init__()
        self.start, self.offset = start, offset

    def forward(self, change: Tensor) -> Tensor:
        return self.start * (1 + change) - self.offset

    def right_inverse(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)


def _norms(model: nn.Module, family: Family) -> Iterator[tuple[int, str, nn.Module]]:
    """Index of the layer, field of `DecoderLayer`, module."""
    for i, layer in enumerate(model.get_submodule(family.decoder).get_submodule(family.layers).children()):
        for field, path in family.norms.items():
            yield i, field, layer.get_submodule(path)


def _make_trainable(student: nn.Module, family: Family, decoder: Decoder) -> dict[str, _TrainedStage]:
    """Swap the simulated linears of `student` for ones that learn; linears in floating point stay as they are."""
    device = next(student.parameters()).device
    stages = {}
    layers = student.get_submodule(family.decoder).get_submodule(family.layers).children()
    for layer, numbers in zip(layers, decoder.layers, strict=True):
        for stage, linear in zip(family.stages, numbers.linears, strict=True):
            if isinstance(linear, QuantLinear):
                stages[linear.name] = trained = _TrainedStage(linear, device)
                for index, path in enumerate(stage.linears):
                    layer.set_submodule(path, _Part(trained, index))
    for _, _, norm in _norms(student, family):
        start = family.norm_weight(norm, "")
        parametrize.register_parametrization(norm, "weight", _Relative(start, family.norm_offset))
        norm.parametrizations.weight.original.requires_grad_(True)  # type: ignore[union-attr]
    return stages


def _store(student: nn.Module, family: Family, decoder: Decoder, stages: dict[str, _TrainedStage]) -> Decoder:
    """What was learnt, in its storage types; `student` becomes an ordinary model again."""
    norms: list[dict[str, Any]] = [{} for _ in decoder.layers]
    for i, field, norm in _norms(student, family):
        parametrize.remove_parametrizations(norm, "weight")
        norms[i][field] = family.norm_weight(norm, "").cpu().numpy()
    layers = []
    for layer, own in zip(decoder.layers, norms, strict=True):
        qkv, o, gate_up, down = (stages[x.name].to_linear() if x.name in stages else x for x in layer.linears)
        layers.append(replace(layer, qkv=qkv, o=o, gate_up=gate_up, down=down, **own))
    return replace(decoder, layers=layers)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32)).to(device)
