"""The op set of domain `specquant`, version 1, as data: the one definition that everything else is checked with.

`onnx_binding.py` hands it to onnx; this module needs nothing, so that a device can import it.
"""

from __future__ import annotations

from dataclasses import dataclass

DOMAIN = "specquant"
VERSION = 1
FLOAT = "Tf"  # the type variable of x and y
FLOAT_TYPES = ("float", "float16")
PROLOGUES = ("none", "rms_norm")  # by the value of the attribute `prologue`
GATES = ("none", "silu", "gelu")  # by that of `gate`; with one, y has M/2 outputs


@dataclass(frozen=True)
class Tensor:
    """An input or output. `types` are ONNX element types, or (FLOAT,); `shape` uses the symbols of docs/ops.md.

    optional: may be a dummy of one element.
    """

    name: str
    types: tuple[str, ...]
    shape: tuple[str, ...]
    doc: str
    optional: bool = False


@dataclass(frozen=True)
class Attribute:
    """An attribute: a float if its default is one, else an integer."""

    name: str
    default: int | float
    doc: str


@dataclass(frozen=True)
class Op:
    """An operator. An artifact gives it every input: a model-local function cannot ask whether one is there."""

    name: str
    doc: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]


_X = Tensor("x", (FLOAT,), ("...", "N"), "Activations; every leading axis counts tokens.")
_Y = Tensor("y", (FLOAT,), ("...", "M"), "Outputs of all linears that share x, side by side; M/2 with a gate.")
_LOW = Tensor("low", (FLOAT,), ("...", "r"), "x · B[:, :rank]; columns from rank on are 0.")
_BRANCH = (
    Tensor("basis", ("float16",), ("N", "r"), "B: orthonormal columns, most important first."),
    Tensor("coef", ("float16",), ("r", "M"), "C = Bᵀ Ŵ: coefficients of the weights in that basis."),
    Tensor("rank", ("int64",), ("1",), "How many columns of B to use; beyond r means all."),
)
_WEIGHTS = (
    Tensor("qweight", ("int8",), ("P", "Q", "64"), "INT4 weights as packing.py lays them out."),
    Tensor("group_scales", ("int8",), ("P", "G", "8"), "1 to 16 per group and output, as packing.py lays them out."),
    Tensor("scales", ("float16",), ("M",), "A scale per output, which its groups' are multiples of."),
    Tensor("bias", ("float",), ("M",), "Added to y; zeros where there is none."),
    Tensor("norm", ("float",), ("N",), "Factors of rms_norm; else a dummy of one element.", optional=True),
    Tensor("residual", (FLOAT,), ("...", "M"), "Added to y; a dummy of one zero where there is none.", optional=True),
)
_GROUPS = (
    Attribute("group_size", 0, "Features per weight scale; 0: one scale per output."),
    Attribute("act_bits", 16, "Bits of the activations, 2 to 8; 16: they are not quantised."),
    Attribute("act_group", 0, "Features per activation scale; 0: one scale per token."),
    Attribute("act_clip", 1.0, "Share of the range of a group of activations that the levels span; beyond is clipped."),
    Attribute("hadamard", 0, "Features of a Hadamard transform that x passes through, block by block; 0: none."),
)
_AROUND = (
    Attribute("prologue", 0, "What becomes of x first: an index of PROLOGUES."),
    Attribute("epsilon", 1e-5, "Of rms_norm."),
    Attribute("gate", 0, "What becomes of pairs of outputs last: an index of GATES. Then there is no residual."),
)
_SUBTRACT = Attribute("subtract", 0, "1: x loses its part in the span of B before it is quantised.")
_QKV = Tensor("qkv", (FLOAT,), ("B", "S", "W"), "Queries, keys and values side by side, before rotary positions.")
_INT4_PAST, _HALF_PAST = (
    (
        Tensor("past_key", (kind,), ("B", "K", "P", row), f"Keys {form}."),
        Tensor("past_value", (kind,), ("B", "K", "P", row), f"Values {form}."),
    )
    for kind, row, form in (("int8", "E", "as kv_rows.py packs them"), ("float16", "d", "in float16"))
)
_POSITIONS = (
    Tensor("seqlens_k", ("int32",), ("B",), "Tokens of each row, the new ones included, less one."),
    Tensor("total_sequence_length", ("int32",), (), "The longest row."),
    Tensor("position_ids", ("int64",), ("B", "S"), "Rows of cos and sin for the new tokens."),
    Tensor("cos", ("float",), ("C", "R"), "Rotary table."),
    Tensor("sin", ("float",), ("C", "R"), "Rotary table."),
)
_OFFSET = Tensor(
    "key_offset", ("float",), ("K", "d"), "Taken from keys before they are cached: softmax is blind to it."
)
_ATTENDED = Tensor("y", (FLOAT,), ("B", "S", "O"), "softmax(scale · q k̂ᵀ) v̂ of every query head, side by side.")
_INT4_PRESENT, _HALF_PRESENT = (
    (
        Tensor("present_key", (kind,), ("B", "K", "T", row), "past_key and the new tokens; may be past_key's memory."),
        Tensor("present_value", (kind,), ("B", "K", "T", row), "past_value and the new tokens."),
    )
    for kind, row in (("int8", "E"), ("float16", "d"))
)
_ATTENTION = (
    Attribute("num_heads", 1, "Query heads."),
    Attribute("kv_num_heads", 1, "Key and value heads; divides num_heads."),
    Attribute("local_window_size", -1, "Tokens that a query sees, itself included; -1: all before it."),
    Attribute("scale", 0.0, "What q · k is multiplied by; 0: 1 / √d."),
)
_ROUNDING = (
    Attribute("hadamard", 0, "1: queries and keys are rotated by a Hadamard matrix before the cache."),
    Attribute("clip", 1.0, "Share of a cached row's range that its levels span, in (0, 1]."),
)

OPS = {
    op.name: op
    for op in (
        Op("SpectralBranch", "low = x · B[:, :rank]; y = low · C.", (_X, *_BRANCH), (_Y, _LOW), ()),
        Op("Int4ResidualMatMul", "y = Qa(x̂ H) · Ŵ + bias + residual.", (_X, *_WEIGHTS), (_Y,), (*_GROUPS, *_AROUND)),
        Op(
            "SpecQuantMatMul",
            "low = x̂ H · B[:, :rank]; y = low · C + Qa(x̂ H − subtract · low · Bᵀ) · Ŵ + bias + residual.",
            (_X, *_BRANCH, *_WEIGHTS),
            (_Y,),
            (*_GROUPS, _SUBTRACT, *_AROUND),
        ),
        Op(
            "Int4KVAttention",
            "Appends k and v to a 4-bit KV cache; y = softmax(scale · q k̂ᵀ) v̂ over it, causal, with rotary positions.",
            (_QKV, *_INT4_PAST, *_POSITIONS, _OFFSET),
            (_ATTENDED, *_INT4_PRESENT),
            (*_ATTENTION, *_ROUNDING),
        ),
        Op(
            "HalfKVAttention",
            "Appends k and v to a float16 KV cache; y = softmax(scale · q k̂ᵀ) v̂ over it, causal, with rotations.",
            (_QKV, *_HALF_PAST, *_POSITIONS),
            (_ATTENDED, *_HALF_PRESENT),
            _ATTENTION,
        ),
    )
}
