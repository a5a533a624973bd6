"""The lowered graph, run by ONNX Runtime's own CPU kernels, against the artifact's graph with our ops as functions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library import register
from specquant.custom_ops.onnx_binding import register_schemas
from specquant.custom_ops.schema import OPS
from specquant.exporter.decoder import Decoder, Linear, QuantLinear
from specquant.exporter.graph import build_model, save_model
from specquant.exporter.graph.writer import FloatType
from specquant.exporter.lowering import lower
from tests.exporter.graph.running import Running
from tests.tiny import MODELS, float_decoder, quantised_decoder, tiny_llama, tiny_model

CAPACITY = 40
FLOAT16_CACHE = 3e-2  # what rounding keys and values to float16 does to these models: 0.2 to 0.6 %, measured


class Lowered:
    """The lowered graph of the artifact in `folder` in a session, with its cache of CAPACITY tokens a row."""

    def __init__(self, folder: Path, decoder: Decoder, rank: int | None = None, profile: str = "portable") -> None:
        (folder / "lowered").mkdir()
        save_model(lower(folder, profile, CAPACITY, rank), folder / "lowered")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # it warns that TensorScatter copies
        # Else it rounds activations to int8 where it fuses DequantizeLinear and MatMul.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        path = str(folder / "lowered" / "model.onnx")
        if profile == "custom":  # its ops' schemas are checked too; our kernels run them
            register_schemas()
            register(options)
        onnx.checker.check_model(path, full_check=profile == "custom")
        self.session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
        self.config = decoder.config
        self.cache: dict[str, NDArray[Any]] = {}
        self.tokens = np.zeros(0, np.int64)

    def step(self, input_ids: NDArray[np.int64], new_tokens: list[int], keep: int = 0) -> NDArray[Any]:
        """As Running.step; keep: logits of so many last positions, 0 for all."""
        batch, sequence = input_ids.shape
        inputs = {value.name: value for value in self.session.get_inputs()}
        if not self.cache:
            past = inputs["past_key_values.0.key"]
            shape = (batch, *past.shape[1:])
            assert shape[2] == CAPACITY
            kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}[past.type]
            # What a cache holds beyond a row's tokens is never used, but must be finite: 0 · inf is NaN.
            self.cache = {name: np.full(shape, 7, kind) for name in inputs if name.startswith("past")}
            self.tokens = np.zeros(batch, np.int64)
        positions = self.tokens[:, None] + np.arange(sequence)
        self.tokens = self.tokens + new_tokens
        mask = np.arange(self.tokens.max())[None] < self.tokens[:, None]
        feeds = {"input_ids": input_ids, "attention_mask": mask.astype(np.int64), "position_ids": positions}
        feeds["logits_to_keep"] = np.array([keep])
        logits, *present = self.session.run(None, feeds | self.cache)
        self.cache = dict(zip(self.cache, present, strict=True))
        return logits


def difference(
    rng: np.random.Generator,
    decoder: Decoder,
    folder: Path,
    float_type: FloatType = "float32",
    rank: int | None = None,
) -> float:
    """Largest difference in logits, over the largest logit, of a prefill, a block after it and two single steps."""
    original = Running(decoder, folder, float_type, **({} if rank is None else {"rank": np.array([rank])}))
    lowered = Lowered(folder, decoder, rank)
    ids = rng.integers(3, 128, 20)
    pieces = [ids[:11], ids[11:18], ids[18:19], ids[19:]]
    expected, actual = (
        np.concatenate([running.step(piece[None], [len(piece)])[0] for piece in pieces]).astype(np.float32)
        for running in (original, lowered)
    )
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def changed(decoder: Decoder, **fields: Any) -> Decoder:
    """`decoder` with these fields in all its quantised linears."""

    def one(entry: Linear) -> Linear:
        return replace(entry, **fields) if isinstance(entry, QuantLinear) else entry

    names = ("qkv", "o", "gate_up", "down")
    return replace(decoder, layers=[replace(x, **{n: one(getattr(x, n)) for n in names}) for x in decoder.layers])


@pytest.mark.parametrize("name", MODELS)
def test_every_family_in_floating_point(rng: np.random.Generator, tmp_path: Path, name: str) -> None:
    decoder = float_decoder(tiny_model(name, int(rng.integers(2**31))))
    assert difference(rng, decoder, tmp_path) < 1e-4


@pytest.mark.parametrize("group_size", [0, 8])
@pytest.mark.parametrize(("rank", "subtract"), [(0, False), (5, False), (5, True)])
@pytest.mark.parametrize("hadamard", [0, 8])
def test_quantised_weights(
    rng: np.random.Generator, tmp_path: Path, group_size: int, rank: int, subtract: bool, hadamard: int
) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)), bias=True)
    decoder = quantised_decoder(decoder, rng, 16, group_size, 0, rank, subtract)
    assert difference(rng, changed(decoder, hadamard=hadamard), tmp_path) < FLOAT16_CACHE


@pytest.mark.parametrize("name", ["gemma3", "phi3", "qwen3"])
@pytest.mark.parametrize("float_type", ["float32", "float16"])
def test_norms_gates_and_residuals_become_nodes(
    rng: np.random.Generator, tmp_path: Path, name: str, float_type: FloatType
) -> None:
    decoder = float_decoder(tiny_model(name, int(rng.integers(2**31))))
    decoder = quantised_decoder(decoder, rng, 16, 8, 0, 5, True)
    assert difference(rng, decoder, tmp_path, float_type) < (2 * FLOAT16_CACHE if float_type == "float32" else 5e-2)


def test_quantised_activations_become_floats(rng: np.random.Generator, tmp_path: Path) -> None:
    """8-bit activations are close to none; the lowered graph is that of the same weights with 16-bit ones."""
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    decoder = quantised_decoder(decoder, rng, 8, 8, 8, 5, True)
    save_model(build_model(decoder, "float32", {}), tmp_path)
    eight = Lowered(tmp_path, decoder)
    (tmp_path / "16").mkdir()
    sixteen = Running(changed(decoder, act_bits=16, act_group=0), tmp_path / "16")
    ids = rng.integers(3, 128, (1, 16))
    actual, expected = eight.step(ids, [16]), sixteen.step(ids, [16])
    assert np.abs(actual - expected).max() < FLOAT16_CACHE * np.abs(expected).max()


@pytest.mark.parametrize("rank", [0, 2])
def test_a_lower_rank(rng: np.random.Generator, tmp_path: Path, rank: int) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    decoder = quantised_decoder(decoder, rng, 16, 8, 0, 5, True)
    assert difference(rng, decoder, tmp_path, rank=rank) < FLOAT16_CACHE


def test_float16(rng: np.random.Generator, tmp_path: Path) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)), bias=True)
    decoder = quantised_decoder(decoder, rng, 16, 8, 0, 5, True)
    assert difference(rng, decoder, tmp_path, "float16") < 3e-2


def test_a_4_bit_cache_becomes_a_float_one(rng: np.random.Generator, tmp_path: Path) -> None:
    """Its key offset and Hadamard matrix change no score: the logits are those of the model with a float cache."""
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    offsets = rng.standard_normal((len(decoder.layers), 2, 16)).astype(np.float32)
    layers = [replace(layer, key_offset=offset) for layer, offset in zip(decoder.layers, offsets, strict=True)]
    packed = replace(decoder, layers=layers, config=replace(decoder.config, kv_bits=4))
    save_model(build_model(packed, "float32", {}), tmp_path)
    lowered = Lowered(tmp_path, decoder)
    (tmp_path / "float").mkdir()
    original = Running(decoder, tmp_path / "float")
    ids = rng.integers(3, 128, (1, 12))
    for piece in (ids[:, :9], ids[:, 9:10], ids[:, 10:]):
        actual, expected = (running.step(piece, [piece.shape[1]]) for running in (lowered, original))
        assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


def test_rows_of_unequal_length(rng: np.random.Generator, tmp_path: Path) -> None:
    decoder = float_decoder(tiny_model("mistral", int(rng.integers(2**31))))
    original = Running(decoder, tmp_path)
    lowered = Lowered(tmp_path, decoder)
    steps = [(rng.integers(3, 128, (2, 13)), [13, 6]), *((rng.integers(3, 128, (2, 1)), [1, 1]) for _ in range(3))]
    for ids, new in steps:
        actual, expected = lowered.step(ids, new), original.step(ids, new)
        for row, count in enumerate(new):
            assert np.abs(actual - expected)[row, :count].max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("float_type", ["float32", "float16"])
def test_a_quantised_head(rng: np.random.Generator, tmp_path: Path, bits: int, float_type: FloatType) -> None:
    """The original rounds to 8 bits what its head reads, the lowered one does not."""
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    decoder = replace(decoder, config=replace(decoder.config, head_bits=bits))
    assert difference(rng, decoder, tmp_path, float_type) < 3e-2


def test_logits_to_keep(rng: np.random.Generator, tmp_path: Path) -> None:
    decoder = float_decoder(tiny_model("llama", int(rng.integers(2**31))))
    save_model(build_model(decoder, "float32", {}), tmp_path)
    lowered, ids = Lowered(tmp_path, decoder), rng.integers(3, 128, (1, 9))
    whole = lowered.step(ids, [9])
    lowered.cache = {}
    kept = lowered.step(ids, [9], keep=2)
    assert kept.shape == (1, 2, 128)
    np.testing.assert_allclose(kept, whole[:, -2:], rtol=1e-4, atol=1e-4)


def test_weights_stay_four_bits_and_a_tied_table_is_stored_once(rng: np.random.Generator, tmp_path: Path) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)), tied=True)
    decoder = quantised_decoder(decoder, rng, 16, 8, 0, 5, True)
    save_model(build_model(decoder, "float32", {}), tmp_path)
    model = lower(tmp_path, "portable", CAPACITY)
    assert {node.domain for node in model.graph} == {""}
    caches = [f"present.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [value.name for value in model.graph.outputs] == ["logits", *caches]
    kinds = [value.const_value.dtype for value in model.graph.initializers.values()]
    quantised = sum(isinstance(x, QuantLinear) for layer in decoder.layers for x in layer.linears)
    assert kinds.count(ir.DataType.INT4) == quantised == 7
    tables = [v for v in model.graph.initializers.values() if tuple(v.const_value.shape) == decoder.embedding.shape]
    assert len(tables) == 1


def test_the_custom_profile_keeps_our_ops(rng: np.random.Generator, tmp_path: Path) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    decoder = quantised_decoder(decoder, rng, 8, 8, 8, 5, True)
    decoder = replace(decoder, config=replace(decoder.config, head_bits=8))
    save_model(build_model(decoder, "float32", {}), tmp_path)
    model = lower(tmp_path, "custom", CAPACITY, rank=3)
    ours = [node for node in model.graph if node.domain == "specquant"]
    assert [node.op_type for node in ours].count("HalfKVAttention") == 2
    assert len(ours) == 8 + 2
    assert ours[-1].op_type == "Int4ResidualMatMul"
    assert ours[-1].outputs[0].name == "logits"
    # A layer is five nodes, all ours: its norms, gate and residuals are within them.
    first = [node.domain for node in model.graph if str(node.name).startswith("model.layers.0.")]
    assert first == 5 * ["specquant"]
    for node in ours[:-1]:
        assert len(node.inputs) == len(OPS[node.op_type].inputs)
        names = [tensor.name for tensor in OPS[node.op_type].inputs]
        constants = {n: v.const_value.numpy() for n, v in zip(names, node.inputs, strict=True) if v.const_value}
        if node.op_type == "HalfKVAttention":
            assert constants["total_sequence_length"] == CAPACITY
            assert constants["cos"].dtype == constants["sin"].dtype == np.float32
            assert constants["cos"].shape == (CAPACITY, 8)  # of a context of 96
            continue
        assert constants["basis"].shape[1] == constants["coef"].shape[0] == constants["rank"][0] == 3
        assert constants["qweight"].dtype == np.int8
    names = [str(value.name) for value in model.graph.initializers.values()]
    assert sum("rotary" in name for name in names) == 2  # shared by the layers


def test_the_custom_profile_of_a_float_model_is_portable(rng: np.random.Generator, tmp_path: Path) -> None:
    save_model(build_model(float_decoder(tiny_model("llama", int(rng.integers(2**31)))), "float32", {}), tmp_path)
    nodes = [[(n.op_type, n.name) for n in lower(tmp_path, p, CAPACITY).graph] for p in ("portable", "custom")]
    assert nodes[0] == nodes[1]


def test_a_custom_engine_without_branches(rng: np.random.Generator, tmp_path: Path) -> None:
    """With rank 0 the op is the one that has none: no tensor is without elements."""
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    decoder = quantised_decoder(decoder, rng, 16, 8, 0, 5, True)
    original = Running(decoder, tmp_path, kernels=True, rank=np.array([0]))
    lowered = Lowered(tmp_path, decoder, 0, "custom")
    kinds = {node.op_type for node in lower(tmp_path, "custom", CAPACITY, 0).graph if node.domain}
    assert kinds == {"Int4ResidualMatMul", "HalfKVAttention"}
    ids = rng.integers(3, 128, (1, 12))
    actual, expected = (running.step(ids, [12]) for running in (lowered, original))
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kv_bits", [4, 16])
@pytest.mark.parametrize("float_type", ["float32", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-partial-rotary", "qwen3"])
def test_the_custom_profile_computes_the_same(
    rng: np.random.Generator, tmp_path: Path, name: str, float_type: FloatType, kv_bits: int
) -> None:
    """By the CPU's kernels: prompts of unequal length, steps, and a window; activations and cache rounded alike."""
    decoder = quantised_decoder(float_decoder(tiny_model(name, int(rng.integers(2**31)))), rng, 8, 8, 8, 5, True)
    decoder = replace(decoder, config=replace(decoder.config, kv_bits=kv_bits, head_bits=8))
    original = Running(decoder, tmp_path, float_type, kernels=True, rank=np.array([3]))
    lowered = Lowered(tmp_path, decoder, 3, "custom")
    # Gemma 3 keeps norms as nodes of their own, which ONNX Runtime does not round the same in both graphs' float16.
    bound = FLOAT16_CACHE if (name, float_type) == ("gemma3", "float16") else 1e-5
    steps = [(rng.integers(3, 128, (2, 13)), [13, 6]), *((rng.integers(3, 128, (2, 1)), [1, 1]) for _ in range(3))]
    for ids, new in steps:
        actual, expected = (running.step(ids, new).astype(np.float32) for running in (lowered, original))
        for row, count in enumerate(new):
            assert np.abs(actual - expected)[row, :count].max() <= bound * np.abs(expected).max()


def test_a_damaged_graph(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(SpecQuantError, match=r"cannot be read .*: re-export the model"):
        lower(tmp_path, "portable", CAPACITY)
