"""A model folder for the whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from specquant.exporter.text import BUILTIN, read_text
from tests.model_folder import fresh_seed, random_llama, save_model_folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Threads cost more than they save on matrices this small, far more when other programs run."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama of tests/model_folder.py with its tokenizer, as transformers saves them; not to be changed."""
    seed = fresh_seed()
    return save_model_folder(tmp_path_factory.mktemp("model") / f"seed-{seed}", random_llama(seed, bias=True))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The start of the text that the product brings: the whole of it takes a second to tokenise."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_text(BUILTIN, 0)[:20_000], encoding="utf-8")
    return path


@pytest.fixture
def llama(model_folder: Path) -> LlamaForCausalLM:
    """The model of `model_folder`, anew: quantising uses it up."""
    return LlamaForCausalLM.from_pretrained(model_folder).eval()
