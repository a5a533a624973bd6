"""What a recipe may hold: the choices of its fields, and one line with the nearest valid value for all else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from specquant.custom_ops.errors import SpecQuantError

if TYPE_CHECKING:
    from specquant.exporter.recipe import Recipe

METRICS = ("act", "entropy", "abs_mean", "abs_max", "l2", "uniform")
STAGES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
OVERRIDABLE = (
    "w_bits",
    "a_bits",
    "basis",
    "k",
    "subtract",
    "group_size",
    "act_group",
    "smooth",
    "hadamard",
)
_CHOICES: dict[str, tuple[Any, ...]] = {
    "w_bits": (4, 16),
    "a_bits": (*range(2, 9), 16),
    "kv_bits": (4, 16),
    "head_bits": (4, 8, 16),
    "basis": ("none", "dft", "klt"),
    "ranks": ("uniform", "fisher"),
    "budget": METRICS,
    "rounding": ("rtn", "gptq"),
    "smooth_by": ("rms", "max"),
    "float_type": ("float32", "float16"),
}


def check(recipe: Recipe) -> None:
    """Raises SpecQuantError for a field out of its range, or fields that do not go together at some stage."""
    for name, allowed in _CHOICES.items():
        _check_choice(name, getattr(recipe, name), allowed)
    for stage, changes in recipe.overrides.items():
        if stage not in STAGES:
            raise SpecQuantError(f"recipe: no stage '{stage}' to override; the stages are {', '.join(STAGES)}")
        if not isinstance(changes, dict):
            raise SpecQuantError(f"recipe: overrides of {stage} must be a mapping of recipe fields")
        for name, value in changes.items():
            if name not in OVERRIDABLE:
                raise SpecQuantError(f"recipe: '{name}' cannot differ by stage; these can: {', '.join(OVERRIDABLE)}")
            if name in _CHOICES:
                _check_choice(f"{stage}.{name}", value, _CHOICES[name])
            elif type(value) is not (kind := type(getattr(recipe, name))):
                raise SpecQuantError(f"recipe: {stage}.{name} must be of type {kind.__name__}, not {value!r}")
    _check_at_least(recipe, 1, "samples", "sequence_length", "refine_batch")
    _check_at_least(recipe, 0, "descents", "refine_steps", "refine_samples")
    if not 0 <= recipe.seed < 2**63:
        raise SpecQuantError(f"recipe: seed {recipe.seed} is not in 0…2^63 − 1")
    if recipe.sequence_length < 16:
        raise SpecQuantError(f"recipe: sequence_length {recipe.sequence_length} is too short; use 16 or more")
    if not 0 < recipe.damping <= 1:
        raise SpecQuantError(f"recipe: damping {recipe.damping} is not in (0, 1]; 0.01 is usual")
    if not 0 <= recipe.asymmetry <= 1:
        raise SpecQuantError(f"recipe: asymmetry {recipe.asymmetry} is not in [0, 1]; 0.5 is usual")
    if not 0 < recipe.kv_clip <= 1:
        raise SpecQuantError(f"recipe: kv_clip {recipe.kv_clip} is not in (0, 1]; 0.93 is usual")
    if not 0 < recipe.refine_lr < 1:
        raise SpecQuantError(f"recipe: refine_lr {recipe.refine_lr} is not in (0, 1); 0.001 is usual")
    seen, option = (recipe.refine_samples, "refine-samples") if recipe.refine_samples else (recipe.samples, "samples")
    if recipe.refine_steps and seen - held_back(seen) < recipe.refine_batch:
        enough = max(recipe.refine_batch, 16 * (recipe.refine_batch - 1) // 15) + 1
        raise SpecQuantError(
            f"recipe: {seen} samples are too few for a refine_batch of {recipe.refine_batch} "
            f"when a sixteenth is kept back; use --{option} {enough} or more"
        )
    if not recipe.smooth_grid or not all(0 <= a <= 1 for a in recipe.smooth_grid):
        raise SpecQuantError("recipe: smooth_grid must hold exponents between 0 and 1")
    if not recipe.clip_grid or not all(0 < c <= 1 for c in recipe.clip_grid):
        raise SpecQuantError("recipe: clip_grid must hold shares above 0, and at most 1")
    if recipe.ranks == "fisher" and all(recipe.at(stage).basis != "klt" for stage in STAGES):
        raise SpecQuantError("recipe: ranks fisher needs the basis klt; use --basis klt, or --ranks uniform")
    for stage in STAGES:
        _check_combination(recipe.at(stage), stage)


def _check_combination(stage: Recipe, name: str) -> None:
    _check_at_least(stage, 1, "k")
    _check_at_least(stage, 0, "group_size")
    _check_at_least(stage, -1, "act_group")
    if (h := stage.hadamard) and (h & (h - 1) or not 8 <= h <= 4096):
        near = 2 ** min(max(round(math.log2(abs(h))), 3), 12)
        raise SpecQuantError(f"recipe: hadamard {h} is not 0 or a power of two from 8 to 4096; nearest: {near}")
    if stage.w_bits == 16 and stage.a_bits != 16:
        raise SpecQuantError(
            f"recipe: {name} has 16-bit weights and {stage.a_bits}-bit activations; "
            "quantised activations need --w-bits 4 (or use --a-bits 16)"
        )
    if stage.subtract and stage.basis == "none":
        raise SpecQuantError("recipe: subtract needs a basis; use --basis klt or dft, or --no-subtract")
    sizes = sorted(s for s in (stage.group_size, stage.activation_group) if s)
    for size in sizes:
        if size % 8:
            raise SpecQuantError(f"recipe: group size {size} is not a multiple of 8; nearest: {round_to_8(size)}")
    if len(sizes) == 2 and sizes[1] % sizes[0]:
        raise SpecQuantError(
            f"recipe: group_size {stage.group_size} and act_group {stage.activation_group} do not nest; "
            f"make them equal, e.g. both {sizes[0]}"
        )


def held_back(samples: int) -> int:
    """Of so many calibration samples, those that refinement does not train on but is judged by."""
    return max(1, samples // 16)


def round_to_8(size: int) -> int:
    return max(8, (size + 4) // 8 * 8)


def _check_at_least(recipe: Recipe, least: int, *names: str) -> None:
    for name in names:
        if (value := getattr(recipe, name)) < least:
            raise SpecQuantError(f"recipe: {name} must be {least} or more, not {value}")


def _check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    allowed = tuple(allowed)
    if value in allowed and type(value) is type(allowed[0]):
        return
    if isinstance(value, int) and isinstance(allowed[0], int):
        near = min(allowed, key=lambda a: abs(a - value))
        raise SpecQuantError(f"recipe: {name} = {value} is not available; nearest: {near}")
    raise SpecQuantError(f"recipe: {name} = {value!r} is not one of {', '.join(map(str, allowed))}")
