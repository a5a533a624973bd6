"""Random calls of `Int4KVAttention`, and a model that holds that one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from specquant.custom_ops.attention import int4_kv_attention
from specquant.custom_ops.functions import OPSET, function_protos
from specquant.custom_ops.kv_rows import pack_rows, row_bytes
from specquant.custom_ops.schema import DOMAIN, OPS, VERSION

OP = "Int4KVAttention"
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Call:
    """Inputs and attributes of one call, and how many tokens of each row were in the cache before."""

    inputs: Arrays
    attributes: dict[str, Any]
    past: NDArray[np.int64]

    def expected(self) -> list[NDArray[Any]]:
        return list(int4_kv_attention(**self.inputs, **self.attributes))

    def rows(self, cache: NDArray[np.int8]) -> NDArray[np.int8]:
        """The rows of a cache [B, K, T, E] that hold tokens, one after the other: [n, E]."""
        total = self.inputs["seqlens_k"] + 1
        return np.concatenate([cache[b, :, :n].reshape(-1, cache.shape[-1]) for b, n in enumerate(total)])


def random_call(
    rng: np.random.Generator,
    past: list[int],
    new: list[int],
    *,
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

    Cache rows that hold no token are all ones: NaN, if read.
    """
    batch, sequence, context = len(past), max(new), max(past) + max(new) + 3
    capacity = max(past) + spare
    total = np.array(past) + np.array(new)
    half = head_dim // 2 if rotary is None else rotary
    angles = rng.uniform(0, 6.3, (context, half))
    caches = []
    for _ in range(2):
        values = rng.standard_normal((batch, kv_heads, capacity, head_dim)) * rng.uniform(0.1, 9, (1, kv_heads, 1, 1))
        cache = pack_rows((values + rng.standard_normal(values.shape[:-1])[..., None]).astype(np.float32))
        for b, n in enumerate(past):
            cache[b, :, n:] = -1
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
        "key_offset": rng.standard_normal((kv_heads, head_dim)).astype(np.float32),
    }
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "local_window_size": window,
        "hadamard": hadamard,
    }
    attributes |= {"scale": scale, "clip": clip}
    return Call(inputs, attributes, np.array(past))


def call_model(call: Call) -> onnx.ModelProto:
    """One node with its function. Batch, sequence and cache lengths are dynamic."""
    shapes = {name: list(array.shape) for name, array in call.inputs.items()}
    shapes["qkv"][:2] = shapes["position_ids"][:] = ["batch", "sequence"]
    shapes["seqlens_k"] = ["batch"]
    shapes["cos"][0] = shapes["sin"][0] = "context"
    bytes_of_row = row_bytes(shapes["qkv"][2] // (call.attributes["num_heads"] + 2 * call.attributes["kv_num_heads"]))
    cache = ["batch", call.attributes["kv_num_heads"], "past", bytes_of_row]
    shapes["past_key"] = shapes["past_value"] = cache
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in call.inputs.items()}
    width = bytes_of_row * 2 - 8
    present = [*cache[:2], "total", bytes_of_row]
    outputs = [
        helper.make_tensor_value_info("y", kinds["qkv"], ["batch", "sequence", call.attributes["num_heads"] * width]),
        helper.make_tensor_value_info("present_key", TensorProto.INT8, present),
        helper.make_tensor_value_info("present_value", TensorProto.INT8, present),
    ]
    inputs = [helper.make_tensor_value_info(name, kinds[name], shapes[name]) for name in call.inputs]
    names = [tensor.name for tensor in OPS[OP].inputs], [tensor.name for tensor in OPS[OP].outputs]
    node = helper.make_node(OP, *names, domain=DOMAIN, **call.attributes)
    return helper.make_model(
        helper.make_graph([node], "one_op", inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=function_protos({OP}),
        ir_version=11,
    )
