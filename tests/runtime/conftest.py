"""A tokenizer trained here and a tiny quantised Llama exported with it: a real artifact in half a second."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from specquant.runtime.artifact import FORMAT

CORPUS = ["The capital of France is Paris. Der Fluß fließt. 日本の首都は東京です。 👩‍👩‍👧‍👦 e\u0301 नमस्ते " * 3]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 320


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it: most characters outside ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def llama() -> Any:
    """A random transformers Llama of the tokenizer's vocabulary; context 96."""
    torch = pytest.importorskip("torch", reason="the extra `export` is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `export` is not installed")
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def float_folder(llama: Any, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of the tiny Llama, not quantised."""
    from tests.tiny import float_decoder

    return _export(float_decoder(llama), tokenizer, tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="session")
def half_folder(llama: Any, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with float16 weights, logits and KV cache."""
    from tests.tiny import float_decoder

    return _export(float_decoder(llama), tokenizer, tmp_path_factory.mktemp("half"), "float16")


@pytest.fixture(scope="session")
def folder(llama: Any, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of the tiny Llama with 4-bit weights, branches of rank 4 and 8-bit activations."""
    from tests.tiny import float_decoder

    decoder = float_decoder(llama)
    layers = [
        dataclasses.replace(
            layer, **{part: _quantized(getattr(layer, part)) for part in ("qkv", "o", "gate_up", "down")}
        )
        for layer in decoder.layers
    ]
    return _export(dataclasses.replace(decoder, layers=layers), tokenizer, tmp_path_factory.mktemp("quantised"))


@pytest.fixture(scope="session")
def int4_cache_decoder(llama: Any) -> Any:
    """The tiny Llama in floating point with a 4-bit KV cache, whose key offsets are measured on random tokens."""
    import copy

    import torch

    from specquant.exporter.quantize import quantize
    from specquant.exporter.recipe import float_recipe

    recipe = dataclasses.replace(float_recipe(), kv_bits=4)
    tokens = torch.from_numpy(np.random.default_rng(5).integers(3, VOCAB, (4, 32)))
    return quantize(copy.deepcopy(llama), recipe, tokens)


@pytest.fixture(scope="session")
def int4_cache_folder(int4_cache_decoder: Any, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its artifact."""
    return _export(int4_cache_decoder, tokenizer, tmp_path_factory.mktemp("int4_cache"))


def _quantized(linear: Any) -> Any:
    """Round-to-nearest in groups of 16, after the projection on four random directions."""
    from specquant.exporter.decoder import QuantLinear
    from specquant.exporter.head import two_levels

    n, m = linear.weight.shape
    basis = np.linalg.qr(np.random.default_rng(n + m).standard_normal((n, 4)))[0].astype(np.float16)
    coef = (basis.T.astype(np.float32) @ linear.weight).astype(np.float16)
    rest = linear.weight - basis.astype(np.float32) @ coef.astype(np.float32)
    groups = rest.reshape(n // 16, 16, m)
    of_groups, scales = two_levels((np.abs(groups).max(axis=1) / 7).T)
    products = (of_groups * scales.astype(np.float32)[:, None]).T
    q = np.clip(np.rint(groups / products[:, None]), -8, 7).astype(np.int8).reshape(n, m)
    branch = {"basis": basis, "coef": coef, "subtract": True}
    return QuantLinear(linear.name, linear.parts, q, of_groups.T, scales, 16, 8, 16, **branch, bias=linear.bias)


def _export(decoder: Any, tokenizer: Tokenizer, folder: Path, float_type: Any = "float32") -> Path:
    pytest.importorskip("onnx_ir", reason="the extra `export` is not installed")
    from specquant.exporter.decoder import QuantLinear
    from specquant.exporter.graph import build_model, save_model

    save_model(build_model(decoder, float_type, {}), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    layers = [
        {
            "name": linear.name,
            "linears": list(linear.parts),
            "in_features": linear.q.shape[0],
            "out_features": linear.q.shape[1],
            "rank": linear.basis.shape[1],
            "group_size": linear.group_size,
            "act_bits": linear.act_bits,
            "alpha": 0.5,
            "bits_per_weight": 5.0,
            "error": 0.01,
        }
        for layer in decoder.layers
        for linear in layer.linears
        if isinstance(linear, QuantLinear)
    ]
    described = {"float_type": float_type, "attention": decoder.attention_op}
    write_manifest(folder, model_info(decoder.config) | described, layers)
    return folder


def model_info(config: Any) -> dict[str, Any]:
    names = "family hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim vocab_size context_length"
    names += " bos_token_id eos_token_ids kv_bits"
    return {name: getattr(config, name) for name in names.split()} | {"tied_embeddings": True}


def write_manifest(folder: Path, model: dict[str, Any], layers: list[dict[str, Any]]) -> None:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != "specquant.json"
    }
    manifest = {
        "format": FORMAT,
        "name": "tiny",
        "model": model,
        "recipe": {"preset": "test"},
        "source": {"kind": "folder", "id": "tiny", "revision": None},
        "calibration": None,
        "versions": {},
        "created": "2026-01-01T00:00:00+00:00",
        "files": files,
        "bits": {"linear_bits_per_weight": 5.0, "model_bits_per_weight": None, "tensor_bytes": {"int4": 1024}},
        "layers": layers,
        "evaluation": {},
    }
    (folder / "specquant.json").write_text(json.dumps(manifest))


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    """A folder whose manifest is right and whose graph is not one: for tests that stop before the graph."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"not a graph")
    (folder / "model.onnx.data").write_bytes(bytes(range(200)))
    (folder / "tokenizer.json").write_text("{}")
    write_manifest(
        folder,
        {
            "family": "llama",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_layers": 1,
            "num_heads": 1,
            "num_kv_heads": 1,
            "head_dim": 8,
            "vocab_size": 16,
            "context_length": 8,
            "bos_token_id": None,
            "eos_token_ids": [2],
            "float_type": "float32",
            "tied_embeddings": False,
        },
        [],
    )
    return folder


@pytest.fixture
def edit_manifest() -> Callable[[Path, Callable[[dict[str, Any]], object]], None]:
    """Change specquant.json of a folder in place."""

    def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
        path = folder / "specquant.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit
