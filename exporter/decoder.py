"""A decoder ready to be written as a graph: the typed object between the quantiser and `graph/`.

Weights are stored [in_features, out_features] (y = x · W), already smoothed; linears that share an input
(q/k/v, gate/up) are one entry, concatenated along out_features in `parts` order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FloatLinear:
    """y = x · weight + bias. weight float32 [N, M]; bias float32 [M] or None."""

    name: str
    parts: dict[str, int]  # linear name -> its out_features, in order
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class QuantLinear:
    """One op call (docs/ops.md): `SpecQuantMatMul` if it has a branch, else `Int4ResidualMatMul`.

    q int8 [N, M] in −8…7 and group_scales int8 [G, M] in 1…16 (neither packed); scales float16 [M]; basis float16
    [N, r] and coef float16 [r, M], both None without a branch; bias float32 [M] or None. group_size 0: per channel;
    act_group 0: per token; act_bits 16: activations are not quantised. hadamard: the block of the transform that q and
    basis are already in; 0: none. Where G is 1, all group_scales are 1.
    """

    name: str
    parts: dict[str, int]
    q: NDArray[np.int8]
    group_scales: NDArray[np.int8]
    scales: NDArray[np.float16]
    group_size: int
    act_bits: int
    act_group: int
    basis: NDArray[np.float16] | None = None
    coef: NDArray[np.float16] | None = None
    subtract: bool = False
    bias: NDArray[np.float32] | None = None
    hadamard: int = 0
    act_clip: float = 1.0
    alpha: float | None = None  # smoothing exponent that was chosen
    error: float | None = None  # ‖y − ŷ‖² / ‖y‖² on calibration data

    @property
    def products(self) -> NDArray[np.float32]:
        """[G, M]: what a level of each group is worth, exactly: scales · group_scales."""
        return self.scales.astype(np.float32) * self.group_scales


Linear = FloatLinear | QuantLinear

NORMS = ("input_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm", "q_norm", "k_norm")  # of a layer


@dataclass(frozen=True)
class DecoderConfig:
    """What the graph needs to know of an architecture. Sizes in elements."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    bos_token_id: int | None
    eos_token_ids: list[int]
    attention_scale: float  # what q · k is multiplied by
    embedding_scale: float = 1.0  # what rows of the embedding are multiplied by, though not as the head reads them
    activation: Literal["silu", "gelu_tanh"] = "silu"
    kv_bits: int = 16  # of the KV cache: 4 or 16 (`Decoder.attention_op`)
    kv_clip: float = 1.0  # share of a cached row's range that its 4-bit levels span
    head_bits: int = 16  # of the head, 8 or 4, beside an embedding in float16; 16: both in the graph's float type


@dataclass(frozen=True)
class DecoderLayer:
    """x + norm(o(attention(qkv(norm(x))))), then x + norm(down(act(gate) · up)) of norm(x).

    Norm weights float32 [hidden], q_norm and k_norm [head_dim] and applied to every head before its rotation; each
    is the whole factor (1 + w where an architecture stores w). Norms that are None do nothing. `window` is how many
    tokens a query sees, itself included, 0 for all; `rotary` is the layer's row of the decoder's rotary tables.
    key_offset float32 [num_kv_heads, head_dim] is taken from keys before a 4-bit cache; None is none.
    """

    input_norm: NDArray[np.float32]
    qkv: Linear
    o: Linear
    mlp_norm: NDArray[np.float32]
    gate_up: Linear
    down: Linear
    attention_output_norm: NDArray[np.float32] | None = None
    mlp_output_norm: NDArray[np.float32] | None = None
    q_norm: NDArray[np.float32] | None = None
    k_norm: NDArray[np.float32] | None = None
    window: int = 0
    rotary: int = 0
    key_offset: NDArray[np.float32] | None = None

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def norms(self) -> dict[str, NDArray[np.float32]]:
        """The norms that there are, by field."""
        return {name: norm for name in NORMS if (norm := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Decoder:
    """The whole model. embedding float32 [vocab, hidden]; lm_head the same, or None when tied to the embedding. Both
    are quantised, if head_bits says so, as the graph is written (head.py).

    rope_cos, rope_sin float32 [tables, context_length, rotary_dim / 2]: the rotary tables, scaling included; one for
    all layers, or one a kind of layer. Features beyond rotary_dim (≤ head_dim) are not rotated.
    """

    config: DecoderConfig
    embedding: NDArray[np.float32]
    layers: list[DecoderLayer]
    final_norm: NDArray[np.float32]
    lm_head: NDArray[np.float32] | None
    rope_cos: NDArray[np.float32]
    rope_sin: NDArray[np.float32]
    recipe: dict[str, object] = field(default_factory=dict)

    @property
    def attention_op(self) -> Literal["Int4KVAttention", "HalfKVAttention", "GroupQueryAttention"]:
        """What attends in the graph: an op of ours (docs/ops.md), cache of 4 bits or of float16; or, where no linear
        is quantised and none of our ops is needed, ONNX Runtime's with a cache in the graph's float type."""
        if self.config.kv_bits == 4:
            return "Int4KVAttention"
        quantised = any(isinstance(entry, QuantLinear) for layer in self.layers for entry in layer.linears)
        return "HalfKVAttention" if quantised else "GroupQueryAttention"
