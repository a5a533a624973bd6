"""A recipe: everything that decides how a model is quantised. Frozen, named presets, YAML in and out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.recipe_checks import STAGES, check

_GRIDS = ("smooth_grid", "clip_grid")


@dataclass(frozen=True)
class Recipe:
    """How every linear of the decoder is quantised; symbols as in the method (docs/method.md).

    k counts frequencies for `dft` (rank r = 2k − 1) and eigenvectors for `klt` (r = k). group_size and act_group
    are in input features; 0 means one scale per output channel, per token. `overrides` maps a stage
    (qkv_proj, o_proj, gate_up_proj, down_proj) to the fields that differ there.
    """

    name: str = "klt"
    w_bits: int = 4
    a_bits: int = 8
    kv_bits: int = 16
    head_bits: int = 8  # of the head, beside an embedding in float16; 16: both in float_type
    kv_clip: float = 0.93  # share of a cached row's range that its 4-bit levels span
    basis: str = "klt"
    k: int = 32
    ranks: str = "uniform"  # k for every linear, or by what the branch is worth there at the same size in all: fisher
    subtract: bool = True  # s of the method: the activation's own low-rank part is removed before it is quantised
    group_size: int = 64
    act_group: int = -1  # −1: of 8-bit activations the whole token, of fewer bits groups of 64 (`activation_group`)
    hadamard: int = 64  # largest block of the Hadamard transform that inputs pass through; 0: none
    clip_grid: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # shares of an activation group's range
    smooth: bool = False
    smooth_by: str = "rms"  # what counts as the size of an input channel: its root mean square, or its largest value
    smooth_grid: tuple[float, ...] = (0.3, 0.5, 0.7)
    budget: str = "uniform"  # metric of Eq. 12 / Table 5 that spreads the k frequencies over output channels
    budget_alpha: float = 1.0  # temperature of its softmax
    rounding: str = "gptq"
    damping: float = 0.01  # added to the Hessian's diagonal, as a share of its mean
    descents: int = 1  # after GPTQ: each makes every integer the best for the others, twice, and fits the scales
    asymmetry: float = 0.5  # how far weights make up for what was done to their inputs (GPTAQ); 1: all the way
    samples: int = 128
    sequence_length: int = 512  # tokens a calibration sample
    seed: int = 0
    refine_steps: int = 0  # of gradient descent on the stored numbers after quantisation (refine.py); wants a GPU
    refine_lr: float = 1e-3
    refine_batch: int = 16  # samples a step
    refine_samples: int = 0  # that it sees; 0: those of the calibration
    float_type: str = "float32"
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)

    def at(self, stage: str) -> Recipe:
        """The recipe of one stage, its overrides applied (and no overrides left)."""
        changes = self.overrides.get(stage, {})
        if not changes and not self.overrides:
            return self
        plain = object.__new__(Recipe)
        for f in fields(Recipe):
            object.__setattr__(plain, f.name, changes.get(f.name, getattr(self, f.name)))
        object.__setattr__(plain, "overrides", {})
        return plain

    @property
    def activation_group(self) -> int:
        """Features that share an activation scale; 0: a token.

        At 8 bits groups of 64 gain next to nothing, and a scale a token lets sums of integers run over all features,
        which makes prompts twice as fast on a GPU (docs/cuda_times.md); at 4 bits they are worth 5 % of perplexity.
        """
        if self.a_bits == 16:
            return 0
        return self.act_group if self.act_group >= 0 else 0 if self.a_bits == 8 else 64

    def hadamard_block(self, features: int) -> int:
        """Of this stage: the largest power of two that divides its in-features and is at most `hadamard`; 0 if that is
        less than 8."""
        block = min(self.hadamard, features & -features)
        return block if block >= 8 else 0

    def rank(self, stage: str) -> int:
        """Columns r of the stage's basis: 0 without a branch."""
        r = self.at(stage)
        return {"none": 0, "dft": 2 * r.k - 1, "klt": r.k}[r.basis] if r.w_bits != 16 else 0

    @property
    def windows(self) -> int:
        """Samples to draw from the calibration text."""
        return max(self.samples, self.refine_samples) if self.refine_steps else self.samples

    @property
    def needs_calibration(self) -> bool:
        """Whether quantising looks at activations: unless weights and KV cache all stay as they are."""
        return self.kv_bits != 16 or any(self.at(stage).w_bits != 16 for stage in STAGES)

    @property
    def follows(self) -> bool:
        """Whether quantising also needs what the float model makes of the calibration tokens."""
        return self.asymmetry > 0 and any(self.at(stage).w_bits != 16 for stage in STAGES)

    def check_shapes(self, in_features: dict[str, int]) -> None:
        """Compare with a model's sizes (stage -> N). Raises SpecQuantError naming the nearest valid value."""
        for stage, n in in_features.items():
            r = self.at(stage)
            if r.w_bits == 16:
                continue
            for name, size in (("group_size", r.group_size), ("act_group", r.activation_group)):
                if size and n % size:
                    valid = [d for d in range(8, n + 1, 8) if n % d == 0]
                    hint = f"nearest: {min(valid, key=lambda d: abs(d - size))}" if valid else "use 0 (no groups)"
                    raise SpecQuantError(
                        f"recipe: {name} {size} does not divide the {n} input features of {stage}; {hint}"
                    )
            most = {"none": r.k, "dft": (n + 1) // 2, "klt": n}[r.basis]
            if r.k > most:
                raise SpecQuantError(
                    f"recipe: k = {r.k} is too large for basis {r.basis} of {stage} with {n} input features; "
                    f"nearest: {most}"
                )

    def to_dict(self) -> dict[str, Any]:
        out = asdict(self)
        return out | {name: list(getattr(self, name)) for name in _GRIDS}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> Recipe:
        """Raises SpecQuantError on an unknown key or a value of the wrong type."""
        if not isinstance(values, dict):
            raise SpecQuantError(f"{where}: expected a mapping of recipe fields")
        values = dict(values)
        base = preset(str(values.pop("preset"))) if "preset" in values else cls()
        known = {f.name: getattr(base, f.name) for f in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise SpecQuantError(f"{where}: unknown field '{name}'; known: {', '.join(known)}")
            if name in _GRIDS and isinstance(value, list) and all(type(v) in (int, float) for v in value):
                values[name] = tuple(float(v) for v in value)
            elif isinstance(known[name], float) and type(value) is int:
                values[name] = float(value)
            elif type(value) is not type(known[name]):
                kind = "list of numbers" if name in _GRIDS else type(known[name]).__name__
                raise SpecQuantError(f"{where}: {name} must be of type {kind}, not {value!r}")
        return replace(base, **values)

    @classmethod
    def from_yaml(cls, path: Path) -> Recipe:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
            raise SpecQuantError(f"recipe {path}: cannot be read: {str(e).splitlines()[0]}") from None
        return cls.from_dict(values, f"recipe {path}")


PRESETS: dict[str, Recipe] = {
    # Ours, and the default because it is the most accurate: data-driven basis, removed from the activation. 8-bit
    # activations are about as fast as 4-bit ones on CPUs, and lose 0.1 of perplexity where those lose 1.5.
    "klt": Recipe(),
    # Taught by the float model afterwards: for a GPU, and a calibration text of 2 MB. It moves all numbers anyway.
    "refined": Recipe(
        name="refined",
        smooth=True,
        descents=0,
        asymmetry=0.0,
        samples=64,
        sequence_length=1024,
        refine_steps=200,
        refine_batch=8,
        refine_samples=440,
    ),
    # Without the branch, which takes a fifth of a small model's time on a CPU (docs/performance.md).
    "fast": Recipe(name="fast", basis="none", subtract=False),
    # The paper's: Fourier basis, 16 frequencies, one scale per output channel and per token.
    "paper": Recipe(
        name="paper",
        a_bits=4,
        head_bits=16,
        basis="dft",
        k=16,
        subtract=False,
        group_size=0,
        act_group=0,
        hadamard=0,
        clip_grid=(1.0,),
        smooth=True,
        descents=0,
        asymmetry=0.0,
        smooth_by="max",
        smooth_grid=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        budget="act",
        budget_alpha=0.5,
        # A text's first token is hundreds of times the others' size: in short samples it weighs too much.
        samples=32,
        sequence_length=2048,
    ),
}


def preset(name: str) -> Recipe:
    """Raises SpecQuantError for an unknown name."""
    if name not in PRESETS:
        raise SpecQuantError(f"recipe: no preset '{name}'; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def float_recipe(float_type: str = "float32") -> Recipe:
    """Nothing quantised: the same graph builder on the model's own weights."""
    off: dict[str, Any] = {"head_bits": 16, "basis": "none", "subtract": False, "hadamard": 0, "smooth": False}
    return Recipe(name="float", w_bits=16, a_bits=16, float_type=float_type, **off)
