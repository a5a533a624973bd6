"""The TensorRT backend. Its sequences run over the lowered graph itself, here by ONNX Runtime on memory of the host, at
the addresses and within the profiles that an engine would have; what opens an engine is tested up to the GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `cpu` is not installed")
import onnxruntime as ort
import torch

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library import register
from specquant.custom_ops.library_tensorrt import load_plugins
from specquant.exporter.engine_builder import Limits
from specquant.exporter.export import export
from specquant.exporter.graph import save_model
from specquant.exporter.lowering import lower
from specquant.exporter.recipe import Recipe
from specquant.runtime.artifact import open_artifact
from specquant.runtime.choosing import Chooser
from specquant.runtime.cuda_driver import Device
from specquant.runtime.engine import EngineInfo
from specquant.runtime.generate import Model
from specquant.runtime.on_device import PREFILL
from specquant.runtime.session import load
from specquant.runtime.tensorrt import TensorRT
from specquant.runtime.tensorrt_engine import check_engine, checked_context, find_engine
from tests.host_memory import HostMemory, HostSampler
from tests.logits import typical
from tests.model_folder import CORPUS, fresh_seed, random_llama, save_model_folder
from tests.rtx_network import rtx_network

MAX_BATCH, MAX_SEQ, BLOCK = 3, 80, 16
# Not quantised: portable engines have a cache of the graph's floats, where a quantised export has one of float16.
RECIPE = Recipe(w_bits=16, a_bits=16, head_bits=16)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # more cost more than they save on matrices this small
    source = save_model_folder(tmp_path_factory.mktemp("model") / "tiny", random_llama(fresh_seed()))
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(CORPUS[0] * 60, encoding="utf-8")
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    export(str(source), folder, RECIPE, calibration_text=str(text))
    return folder


def info_of(artifact: Path, **fields: Any) -> EngineInfo:
    manifest = open_artifact(artifact)
    graph = {name: file.sha256 for name, file in manifest.files.items() if name.startswith("model.onnx")}
    info = EngineInfo(
        2, "tensorrt-rtx", "1.7", "sm89", "portable", MAX_BATCH, MAX_SEQ, BLOCK, "float32", graph, 0, "", 0, [0, 0]
    )
    return replace(info, **fields)


class LoweredGraph:
    """The lowered graph by ONNX Runtime, its tensors where the backend says; in `custom`, with our kernels.

    Where TensorRT-RTX is installed, every call is one that its network and the engine's profiles take.
    """

    def __init__(self, artifact: Path, folder: Path, profile: str = "portable") -> None:
        save_model(lower(artifact, profile, MAX_SEQ), folder)
        self.engine = rtx_network(folder / "model.onnx", Limits(MAX_BATCH, MAX_SEQ, BLOCK))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if profile == "custom":
            register(options)
        self.session = ort.InferenceSession(str(folder / "model.onnx"), options, ["CPUExecutionProvider"])
        self.kinds = {v.name: v.type for v in [*self.session.get_inputs(), *self.session.get_outputs()]}

    def run(self, profile: int, tensors: dict[str, tuple[int, tuple[int, ...]]], keep: int) -> None:
        (rows, tokens), (_, total) = tensors["input_ids"][1], tensors["attention_mask"][1]
        most = (1, BLOCK) if profile == PREFILL else (MAX_BATCH, 1)
        assert 1 <= rows <= most[0]
        assert 1 <= tokens <= most[1]
        assert 1 <= total <= MAX_SEQ
        assert 1 <= keep <= tokens
        if self.engine:
            self.engine.check(profile, {name: shape for name, (_, shape) in tensors.items()}, keep, self.kinds)
        assert all(
            place == tensors[name.replace("present", "past_key_values")][0]
            for name, (place, _) in tensors.items()
            if name.startswith("present")
        )
        arrays = {name: self._at(name, *where) for name, where in tensors.items()}
        feeds = {name.name: arrays[name.name] for name in self.session.get_inputs() if name.name in arrays}
        outputs = [value.name for value in self.session.get_outputs()]
        for name, value in zip(outputs, self.session.run(outputs, feeds | {"logits_to_keep": [keep]}), strict=True):
            arrays[name][...] = value

    def _at(self, name: str, place: int, shape: tuple[int, ...]) -> NDArray[Any]:
        kinds = {"float": np.float32, "int64": np.int64, "int8": np.int8, "float16": np.float16}
        dtype = np.dtype(kinds[self.kinds[name][len("tensor(") : -1]])
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_byte * size).from_address(place), dtype).reshape(shape)


@pytest.fixture(scope="module")
def graph(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> LoweredGraph:
    return LoweredGraph(artifact, tmp_path_factory.mktemp("lowered"))


@pytest.fixture
def model(artifact: Path, graph: LoweredGraph) -> Model:
    manifest = open_artifact(artifact)
    backend = TensorRT(graph, HostMemory(), info_of(artifact), manifest.model, MAX_SEQ)
    return Model(artifact, manifest, backend, MAX_SEQ)


def test_logits_are_those_of_onnxruntime(rng: np.random.Generator, artifact: Path, model: Model) -> None:
    """A prompt of several blocks, the last one cut short."""
    ids = rng.integers(3, 300, 3 * BLOCK + 5)
    expected = load(artifact).logits(ids)
    np.testing.assert_allclose(model.logits(ids), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_generation_is_that_of_onnxruntime(rng: np.random.Generator, artifact: Path, model: Model) -> None:
    """Rows of unequal length that end at different steps: dropped rows leave their places to the last ones."""
    prompts = [rng.integers(3, 300, count).tolist() for count in (2, 37, MAX_SEQ - 5)]
    original = load(artifact, context=MAX_SEQ)
    expected = original.generate_batch(prompts, max_new_tokens=24)
    assert model.generate_batch(prompts, max_new_tokens=24) == expected
    assert "".join(model.generate(prompts[1], max_new_tokens=12)) == "".join(
        original.generate(prompts[1], max_new_tokens=12)
    )


@pytest.mark.parametrize("slow", [False, True])
def test_tokens_that_the_device_chooses(
    rng: np.random.Generator, artifact: Path, graph: LoweredGraph, model: Model, slow: bool
) -> None:
    """With a mask that grows, in rows that end at different steps."""
    prompts = [rng.integers(3, 300, count).tolist() for count in (2, 37, MAX_SEQ - 5)]
    backend: Any = model._backend
    backend.memory.slow = slow
    for options in ({}, {"temperature": 1.1, "top_k": 30, "seed": 2}):
        backend.chooser = None
        expected = model.generate_batch(prompts, max_new_tokens=24, **options)
        backend.chooser = Chooser(backend.memory, HostSampler())
        assert model.generate_batch(prompts, max_new_tokens=24, **options) == expected


@pytest.fixture(params=["int4_cache_folder", "folder"])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    """Of profile `custom`: a cache of 4 bits, or quantised linears with one of float16, as the artifact has it."""
    source: Path = request.getfixturevalue(request.param)
    manifest = open_artifact(source)
    info = info_of(source, profile="custom")
    backend = TensorRT(LoweredGraph(source, tmp_path, "custom"), HostMemory(), info, manifest.model, MAX_SEQ)
    return Model(source, manifest, backend, MAX_SEQ)


def test_custom_engines_keep_the_artifacts_cache(rng: np.random.Generator, packed: Model) -> None:
    """Prompts of several blocks; a level that the last bit of a sum moves may be another, but not in all of them."""
    original = load(packed.folder, context=MAX_SEQ)
    errors = []
    for _ in range(4):
        ids = rng.integers(3, 300, 3 * BLOCK + 5)
        errors.append(typical(packed.logits(ids), original.logits(ids)))
    assert min(errors) < 1e-4
    memory = packed._backend.memory  # type: ignore[attr-defined]
    sequences = packed._backend.sequences(2)
    model = packed.manifest.model
    row, dtype = model.cache_row
    size = 2 * model.num_kv_heads * MAX_SEQ * row * dtype.itemsize  # of keys, or of values, of a layer
    assert 2 * model.num_layers * -(-size // 256) * 256 in [array.nbytes for array in memory.arrays.values()]
    del sequences


def test_generation_with_the_artifacts_cache(rng: np.random.Generator, packed: Model) -> None:
    """Rows of unequal length, of which the last ones take the places of those that are done; then a rewind."""
    prompts = [rng.integers(3, 300, count).tolist() for count in (2, 37, MAX_SEQ - 5)]
    original = load(packed.folder, context=MAX_SEQ)
    assert packed.generate_batch(prompts, max_new_tokens=24) == original.generate_batch(prompts, max_new_tokens=24)
    sequences = packed._backend.sequences(2)
    ids = rng.integers(3, 300, 20)
    sequences.prefill_last(1, ids[:9])
    first = sequences.prefill_last(1, ids[9:]).copy()
    sequences.rewind(1, 9)
    np.testing.assert_array_equal(sequences.prefill_last(1, ids[9:]), first)


def test_rewinding(rng: np.random.Generator, model: Model) -> None:
    sequences = model._backend.sequences(2)
    ids = rng.integers(3, 300, 20)
    sequences.prefill_last(1, ids[:9])
    first = sequences.prefill_last(1, ids[9:]).copy()
    sequences.rewind(1, 9)
    again = sequences.prefill_last(1, ids[9:])
    np.testing.assert_allclose(again, first, rtol=0, atol=1e-4 * np.abs(first).max())
    with pytest.raises(ValueError, match="cannot keep 21"):
        sequences.rewind(1, 21)


def test_memory_is_given_back(model: Model) -> None:
    memory = model._backend.memory  # type: ignore[attr-defined]
    sequences = model._backend.sequences(2)
    assert memory.arrays
    del sequences
    assert memory.arrays == {}


def test_more_than_the_engine_takes(rng: np.random.Generator, artifact: Path, model: Model) -> None:
    with pytest.raises(SpecQuantError, match="exceed this engine's batch of 3: build it with `--max-batch 4`"):
        model._backend.sequences(4)
    with pytest.raises(SpecQuantError, match="exceed this engine's 80: build it with `--max-seq 81`"):
        model._backend.sequences(1).prefill_last(0, rng.integers(3, 300, 81))
    with pytest.raises(SpecQuantError, match=r"takes 1 to 80 tokens; for more, run `.* --max-seq 90 --force`"):
        checked_context(artifact, info_of(artifact), 90)
    assert checked_context(artifact, info_of(artifact), None) == MAX_SEQ


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": {"model.onnx": "0" * 64}}, "is of another export of .*: run `specquant build .* --gpu sm89"),
    ({"gpu": "sm120"}, "is for sm120 and this GPU is sm89: run `specquant build .* --gpu sm89 "),
    ({"host_code": True}, "--allow-host-code"),
    ({"target": "openvino"}, "does not know: upgrade specquant"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_engines_that_are_refused(artifact: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecQuantError, match=message):
        check_engine(artifact, open_artifact(artifact), info_of(artifact, **fields), "sm89", False)


def test_an_engine_of_another_version(artifact: Path) -> None:
    api = pytest.importorskip("tensorrt_rtx", reason="the extra `tensorrt-rtx` is not installed")
    manifest = open_artifact(artifact)
    with pytest.raises(SpecQuantError, match=r"built by tensorrt-rtx 1\.7 and .* is installed: run .* install 1\.7"):
        check_engine(artifact, manifest, info_of(artifact), "sm89", False)
    fits = info_of(artifact, version=api.__version__, host_code=True)
    assert check_engine(artifact, manifest, fits, "sm89", True) is api


def test_no_engine_for_this_gpu(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecQuantError, match=r"no engine for this GPU: run .* --gpu sm86"):
        find_engine(artifact, "sm86")
    (tmp_path / "engine" / "tensorrt-rtx-sm89").mkdir(parents=True)
    with pytest.raises(SpecQuantError, match=r"\(there are tensorrt-rtx-sm89\)"):
        find_engine(tmp_path, "sm86")
    assert find_engine(tmp_path, "sm89").name == "tensorrt-rtx-sm89"


def test_a_missing_plugin_library(monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("tensorrt_rtx", reason="the extra `tensorrt-rtx` is not installed")
    monkeypatch.setenv("SPECQUANT_TENSORRT_LIBRARY", "/nowhere/x.so")
    with pytest.raises(SpecQuantError, match="which is not there"):
        load_plugins(api, api.get_plugin_registry())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorflow"}, "onnxruntime, tensorrt"),
        ({"backend": "tensorrt", "rank": 1}, "specquant build --rank"),
        ({"engine": "e"}, "is for backend tensorrt"),
    ],
)
def test_options_that_do_not_fit(artifact: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecQuantError, match=message):
        load(artifact, **options)


def test_a_machine_without_a_gpu(artifact: Path, check_no_driver: Callable[[], None]) -> None:
    check_no_driver()
    with pytest.raises(SpecQuantError, match="NVIDIA driver"):
        load(artifact, backend="tensorrt")


@pytest.fixture
def check_no_driver() -> Callable[[], None]:
    def check() -> None:
        try:
            Device()
        except SpecQuantError:
            return
        pytest.skip("this machine has a GPU")

    return check
