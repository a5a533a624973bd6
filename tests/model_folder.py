"""A tiny Llama with random weights and its own tokenizer, saved as the folder that a user would export."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = ["The capital of France is Paris, and the river there is the Seine. She said that it was the best of times. "]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB, CONTEXT = 320, 96
# A recipe that the model's sizes allow and that is done in a second, as options of the command line.
QUICK = ["--samples", "8", "--sequence-length", "32", "--k", "5", "--group-size", "8", "--act-group", "8"]


def fresh_seed() -> int:
    """Random, printed; SPECQUANT_TEST_SEED runs it again with that."""
    seed = int(os.environ.get("SPECQUANT_TEST_SEED") or secrets.randbits(32))
    print(f"SPECQUANT_TEST_SEED={seed}")
    return seed


def random_llama(seed: int, bias: bool = False, tied: bool = True, init: float = 0.1, **sizes: Any) -> LlamaForCausalLM:
    """Two layers, hidden 64, intermediate 88, 4 heads on 2 kv heads; some channels are far larger than others."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 88,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
        }
        | sizes,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=init,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.randn_like(parameter).exp())
            elif name.endswith(".bias"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as SmolLM2 has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[2], chat_template=TEMPLATE)


def save_model_folder(folder: Path, model: LlamaForCausalLM) -> Path:
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder
