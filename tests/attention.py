"""Random calls of `Int4KVAttention` and `HalfKVAttention`, and a model that holds that one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from specquant.custom_ops import attention, library_attention
from specquant.custom_ops.functions import OPSET, function_protos
from specquant.custom_ops.kv_rows import pack_rows
from specquant.custom_ops.schema import DOMAIN, OPS, VERSION

INT4, HALF = "Int4KVAttention", "HalfKVAttention"
REFERENCE: dict[str, Any] = {INT4: attention.int4_kv_attention, HALF: attention.half_kv_attention}
KERNEL: dict[str, Any] = {INT4: library_attention.int4_kv_attention, HALF: library_attention.half_kv_attention}
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Call:
    """Inputs and attributes of one call of `op`, and how many tokens of each row were in the cache before."""

    op: str
    inputs: Arrays
    attributes: dict[str, Any]
    past: NDArray[np.int64]

    def expected(self) -> list[NDArray[Any]]:
        return list(REFERENCE[self.op](**self.inputs, **self.attributes))

    def kernel(self, isa: str | None = None, **options: Any) -> list[NDArray[Any]]:
        return list(KERNEL[self.op](**self.inputs, **self.attributes, isa=isa, **options))

    def rows(self, cache: NDArray[Any]) -> NDArray[Any]:
        """The rows of a cache [B, K, T, E] that hold tokens, one after the other: [n, E]."""
        total = self.inputs["seqlens_k"] + 1
        return np.concatenate([cache[b, :, :n].reshape(-1, cache.shape[-1]) for b, n in enumerate(total)])


def random_call(
    rng: np.random.Generator,
    past: list[int],
    new: list[int],
    *,
    op: str = INT4,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 64,
    window: int = -1,
    hadamard: int = 0,
    clip: float = 1.0,
    spare: int = 0,
    rotary: int | None = None,
    scale: float = 0.0,
    float_type: Any = np.float32,
) -> Call:
    """Rows of past[b] cached tokens and new[b] new ones, padded to the longest; `spare` rows more in the cache.

    Cache rows that hold no token are NaN, if read. hadamard and clip are of Int4KVAttention.
    """
    batch, sequence, capacity = len(past), max(new), max(past) + spare
    context = capacity + sequence + 3
    total = np.array(past) + np.array(new)
    half = head_dim // 2 if rotary is None else rotary
    angles = rng.uniform(0, 6.3, (context, half))
    caches = []
    for _ in range(2):
        values = rng.standard_normal((batch, kv_heads, capacity, head_dim)) * rng.uniform(0.1, 9, (1, kv_heads, 1, 1))
        values += rng.standard_normal(values.shape[:-1])[..., None]
        cache = pack_rows(values.astype(np.float32)) if op == INT4 else values.astype(np.float16)
        for b, n in enumerate(past):
            cache[b, :, n:] = -1 if op == INT4 else np.nan
        caches.append(cache)
    inputs = {
        "qkv": rng.standard_normal((batch, sequence, (heads + 2 * kv_heads) * head_dim)).astype(float_type),
        "past_key": caches[0],
        "past_value": caches[1],
        "seqlens_k": (total - 1).astype(np.int32),
        "total_sequence_length": np.array(total.max(), np.int32),
        "position_ids": np.minimum(np.array(past)[:, None] + np.arange(sequence), context - 1),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "local_window_size": window,
        "scale": scale,
    }
    if op == INT4:
        inputs["key_offset"] = rng.standard_normal((kv_heads, head_dim)).astype(np.float32)
        attributes |= {"hadamard": hadamard, "clip": clip}
    return Call(op, inputs, attributes, np.array(past))


def call_model(call: Call) -> onnx.ModelProto:
    """One node with its function. Batch, sequence and cache lengths are dynamic."""
    shapes = {name: list(array.shape) for name, array in call.inputs.items()}
    shapes["qkv"][:2] = shapes["position_ids"][:] = ["batch", "sequence"]
    shapes["seqlens_k"] = ["batch"]
    shapes["cos"][0] = shapes["sin"][0] = "context"
    heads, kv_heads = call.attributes["num_heads"], call.attributes["kv_num_heads"]
    shapes["past_key"][::2] = shapes["past_value"][::2] = ["batch", "past"]
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in call.inputs.items()}
    width = shapes["qkv"][2] // (heads + 2 * kv_heads) * heads
    present = ["batch", kv_heads, "total", shapes["past_key"][3]]
    outputs = [
        helper.make_tensor_value_info("y", kinds["qkv"], ["batch", "sequence", width]),
        *(helper.make_tensor_value_info(f"present_{part}", kinds["past_key"], present) for part in ("key", "value")),
    ]
    inputs = [helper.make_tensor_value_info(name, kinds[name], shapes[name]) for name in call.inputs]
    names = [tensor.name for tensor in OPS[call.op].inputs], [tensor.name for tensor in OPS[call.op].outputs]
    node = helper.make_node(call.op, *names, domain=DOMAIN, **call.attributes)
    return helper.make_model(
        helper.make_graph([node], "one_op", inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=function_protos({call.op}),
        ir_version=11,
    )
