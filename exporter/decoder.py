"""A decoder ready to be written as a graph: the typed object between the quantiser and `graph/`.

Weights are stored [in_features, out_features] (y = x · W), already smoothed; linears that share an input
(q/k/v, gate/up) are one entry, concatenated along out_features in `parts` order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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

    q int8 [N, M] in −8…7 (not packed); scales float16 [G, M]; basis float16 [N, r] and coef float16 [r, M],
    both None without a branch; bias float32 [M] or None. group_size 0: per channel; act_group 0: per token;
    act_bits 16: activations are not quantised.
    """

    name: str
    parts: dict[str, int]
    q: NDArray[np.int8]
    scales: NDArray[np.float16]
    group_size: int
    act_bits: int
    act_group: int
    basis: NDArray[np.float16] | None = None
    coef: NDArray[np.float16] | None = None
    subtract: bool = False
    bias: NDArray[np.float32] | None = None
    alpha: float | None = None  # smoothing exponent that was chosen
    error: float | None = None  # ‖y − ŷ‖² / ‖y‖² on calibration data


Linear = FloatLinear | QuantLinear


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


@dataclass(frozen=True)
class DecoderLayer:
    """Pre-norm block: x + o(attention(qkv(norm(x)))), then x + down(silu(gate) · up). Norm weights float32 [hidden]."""

    input_norm: NDArray[np.float32]
    qkv: Linear
    o: Linear
    post_attention_norm: NDArray[np.float32]
    gate_up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True)
class Decoder:
    """The whole model. embedding float32 [vocab, hidden]; lm_head the same, or None when tied to the embedding.

    rope_cos, rope_sin float32 [context_length, head_dim / 2]: the rotary tables, scaling included.
    """

    config: DecoderConfig
    embedding: NDArray[np.float32]
    layers: list[DecoderLayer]
    final_norm: NDArray[np.float32]
    lm_head: NDArray[np.float32] | None
    rope_cos: NDArray[np.float32]
    rope_sin: NDArray[np.float32]
    recipe: dict[str, object] = field(default_factory=dict)
