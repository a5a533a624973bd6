"""One decoder block of a Llama, several times in a row, as two graphs: as our exports have it, and of ONNX Runtime's
own INT4 operators. Both come from the same random weights, each rounded to 4 bits for itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from specquant.custom_ops.reference import block_hadamard
from specquant.exporter.decoder import Decoder, DecoderConfig, DecoderLayer, QuantLinear
from specquant.exporter.graph.model import build_model
from specquant.exporter.head import two_levels
from tools.ort_bench import peer_node

EPSILON = 1e-5  # of RMSNorm
ROPE_BASE = 500_000.0
Float = NDArray[np.float32]


class Shape(NamedTuple):
    """Features of the block and of its MLP, query heads, key and value heads, features of a head."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """In- and out-features of the four products."""
        query = self.heads * self.head_dim
        return {
            "qkv": (self.hidden, query + 2 * self.kv_heads * self.head_dim),
            "o": (query, self.hidden),
            "gate_up": (self.hidden, 2 * self.inner),
            "down": (self.inner, self.hidden),
        }


class Numbers(NamedTuple):
    """How our products are quantised; `group` is the peer's too. rank 0: no branch; hadamard 0: no transform."""

    group: int
    act_bits: int
    act_group: int
    rank: int
    hadamard: int


def random_weights(shape: Shape, rng: np.random.Generator) -> dict[str, Float]:
    """[N, M] of each product; outputs have about the size of the inputs."""
    pairs = shape.linears.items()
    return {name: rng.standard_normal((n, m), dtype=np.float32) * np.float32(n**-0.5) for name, (n, m) in pairs}


def rotary_tables(shape: Shape, length: int) -> tuple[Float, Float]:
    """cos and sin [length, head_dim / 2]."""
    turns = np.arange(0, shape.head_dim, 2) / shape.head_dim
    angles = np.outer(np.arange(length), ROPE_BASE**-turns)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def nearest(weight: Float, group: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """weight [N, M] as q int8 in −7…7 and scales float16 [N / group, M], as the peer has them."""
    scales = _largest(weight, group).astype(np.float16)
    return _levels(weight, scales.astype(np.float32)), scales


def _largest(weight: Float, group: int) -> Float:
    """[N / group, M]: the scales at which nothing is clipped."""
    groups = weight.reshape(-1, group, weight.shape[1])
    return np.maximum(groups.max(1), -groups.min(1)) / np.float32(7)


def _levels(weight: Float, scales: Float) -> NDArray[np.int8]:
    groups = weight.reshape(len(scales), -1, weight.shape[1])
    q = np.rint(groups / scales[:, None]).astype(np.int8)
    return np.clip(q, -7, 7, out=q).reshape(weight.shape)


def our_linear(name: str, weight: Float, numbers: Numbers, rng: np.random.Generator) -> QuantLinear:
    """The weight [N, M] in 4 bits for rotated inputs, beside a branch as `klt` has it: a random orthonormal basis, what
    the weight makes of it, and the activations' share of it taken out of what is multiplied in 4 bits."""
    n, m = weight.shape
    rotated = np.ascontiguousarray(block_hadamard(weight.T, numbers.hadamard).T) if numbers.hadamard else weight
    of_groups, scales = two_levels(_largest(rotated, numbers.group).T)
    group_scales = np.ascontiguousarray(of_groups.T)
    q = _levels(rotated, scales.astype(np.float32) * group_scales)
    entry = QuantLinear(name, {name: m}, q, group_scales, scales, numbers.group, numbers.act_bits, numbers.act_group)
    entry = replace(entry, hadamard=numbers.hadamard)
    if not numbers.rank:
        return entry
    basis = np.linalg.qr(rng.standard_normal((n, numbers.rank)))[0].astype(np.float16)
    coef = (basis.astype(np.float32).T @ rotated).astype(np.float16)
    return replace(entry, basis=basis, coef=coef, subtract=True)


def our_model(shape: Shape, linears: dict[str, QuantLinear], copies: int, length: int) -> bytes:
    """The graph that an export writes, from the embedding's rows `x` f32[1, S, hidden] to the last block's `y`."""
    norm = np.ones(shape.hidden, np.float32)
    layers = []
    for i in range(copies):
        own = {name: replace(entry, name=f"{i}.{name}") for name, entry in linears.items()}
        layers.append(DecoderLayer(input_norm=norm, mlp_norm=norm, **own))
    config = DecoderConfig(
        family="block",
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_layers=copies,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=1,
        context_length=length,
        rms_norm_eps=EPSILON,
        bos_token_id=None,
        eos_token_ids=[],
        attention_scale=shape.head_dim**-0.5,
    )
    cos, sin = rotary_tables(shape, length)
    embedding = np.zeros((1, shape.hidden), np.float32)
    model = build_model(Decoder(config, embedding, layers, norm, None, cos[None], sin[None]), "float32", {})
    return ir.to_proto(_without_ends(model, "0.qkv", f"{copies - 1}.down")).SerializeToString()


def _without_ends(model: ir.Model, first: str, last: str) -> ir.Model:
    """The model from what the node `first` reads, now an input `x`, to what the node `last` writes, now named `y`."""
    graph = model.graph
    nodes = {node.name: node for node in graph}
    start, y = nodes[first].inputs[0], nodes[last].outputs[0]
    x = ir.val("x", start.dtype, start.shape)
    ir.convenience.replace_all_uses_with(start, x)
    y.name = "y"
    graph.outputs[0] = y
    graph.inputs[0] = x  # in the place of the token ids, of which nothing is left
    RemoveUnusedNodesPass()(model)
    return model


def peer_model(shape: Shape, weights: dict[str, Float], numbers: Numbers, copies: int, length: int) -> bytes:
    """The same blocks of GroupQueryAttention, MatMulNBits and RMSNorm, as ONNX Runtime's model builders write them."""
    d, value, f32 = shape.head_dim, helper.make_tensor_value_info, TensorProto.FLOAT
    gate, up = np.split(weights["gate_up"], 2, 1)
    parts = {"qkv": weights["qkv"], "o": weights["o"], "gate": gate, "up": up, "down": weights["down"]}
    quantised = {name: nearest(np.ascontiguousarray(part), numbers.group) for name, part in parts.items()}
    cos, sin = rotary_tables(shape, length)
    initialisers: dict[str, NDArray[Any]] = {"norm": np.ones(shape.hidden, np.float32), "cos": cos, "sin": sin}
    nodes, inputs, outputs, x = [], [], [], "x"

    def op(kind: str, names: list[str], y: str, domain: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, names, [y], domain=domain, **attributes))
        return y

    def multiply(name: str, x: str, i: int) -> str:
        node, arrays = peer_node(x, f"{i}.{name}", *quantised[name])
        initialisers.update(arrays)
        nodes.append(node)
        return str(node.output[0])

    def norm(x: str, y: str) -> str:
        return op("SimplifiedLayerNormalization", [x, "norm"], y, axis=-1, epsilon=EPSILON, stash_type=1)

    for i in range(copies):
        past, present = ([f"{when}.{i}.{part}" for part in ("key", "value")] for when in ("past_key_values", "present"))
        qkv = multiply("qkv", norm(x, f"{i}.input_norm"), i)
        read = [qkv, "", "", *past, "seqlens_k", "total_sequence_length", "cos", "sin", "position_ids"]
        sizes = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads, "scale": d**-0.5, "do_rotary": 1}
        node = helper.make_node(
            "GroupQueryAttention", read, [f"{i}.attention", *present], domain="com.microsoft", **sizes
        )
        nodes.append(node)
        x = op("Add", [x, multiply("o", f"{i}.attention", i)], f"{i}.residual")
        h = norm(x, f"{i}.mlp_norm")
        gate, up = multiply("gate", h, i), multiply("up", h, i)
        active = op("Mul", [gate, op("Sigmoid", [gate], f"{i}.sigmoid")], f"{i}.silu")
        product = multiply("down", op("Mul", [active, up], f"{i}.product"), i)
        x = op("Add", [x, product], "y" if i == copies - 1 else f"{i}.y")
        inputs += [value(name, f32, [1, shape.kv_heads, "past", d]) for name in past]
        outputs += [value(name, f32, [1, shape.kv_heads, "total", d]) for name in present]
    inputs = [
        value("x", f32, [1, "s", shape.hidden]),
        value("position_ids", TensorProto.INT64, [1, "s"]),
        value("seqlens_k", TensorProto.INT32, [1]),
        value("total_sequence_length", TensorProto.INT32, []),
        *inputs,
    ]
    graph = helper.make_graph(
        nodes,
        "blocks",
        inputs,
        [value("y", f32, [1, "s", shape.hidden]), *outputs],
        [numpy_helper.from_array(array, name) for name, array in initialisers.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString())
