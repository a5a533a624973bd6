"""Tiny models with random weights, one of each family, their Decoders, and what those compute in torch."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from specquant.custom_ops.packing import MOST, pack_group_scales, pack_int4
from specquant.custom_ops.reference import int4_residual_matmul, specquant_matmul
from specquant.exporter.decoder import Decoder, FloatLinear, Linear, QuantLinear
from specquant.exporter.kv import use_half_cache
from specquant.exporter.quantize import quantize
from specquant.exporter.recipe import float_recipe

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # large enough that attention and the gate leave their linear range
}
GEMMA3 = {
    "head_dim": 32,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 24,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    },
}


LONGROPE = {
    "original_max_position_embeddings": 48,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "original_max_position_embeddings": 48,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [4.0] * 8,
    },
}


def _rope(rope_type: str, **parameters: float) -> dict[str, Any]:
    original = {"original_max_position_embeddings": 24}
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 100.0, "factor": 4.0, **original, **parameters}}


# name -> (transformers' name of the architecture, what its config has besides SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 32}),
    "llama-tied-biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {**_rope("linear"), "num_key_value_heads": 4}),
    "llama-llama3": ("Llama", _rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama-yarn": ("Llama", _rope("yarn")),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": 7}),
    "phi3": ("Phi3", {"sliding_window": 7}),
    "phi3-partial-rotary": ("Phi3", {"hidden_size": 128, "rope_parameters": {"partial_rotary_factor": 0.5}}),
    "phi3-longrope": ("Phi3", LONGROPE),
    "gemma3": ("Gemma3", GEMMA3),
}


def tiny_model(name: str, seed: int) -> Any:
    """A transformers model of MODELS: random weights, norms and biases too, in float32."""
    torch.manual_seed(seed)
    architecture, settings = MODELS[name]
    text = "Text" if architecture == "Gemma3" else ""
    config = getattr(transformers, f"{architecture}{text}Config")(**{**SIZES, **settings})
    return randomised(getattr(transformers, f"{architecture}ForCausalLM")(config))


def randomised(model: Any) -> Any:
    """`model` with norms and biases as uneven as those of a trained one: transformers starts them at 1 or 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tiny_llama(seed: int, tied: bool = True, bias: bool = False) -> tuple[Any, Decoder]:
    """Two layers, hidden 64, 4 heads on 2 kv heads, vocabulary 128, context 96; and its float Decoder."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**SIZES, "tie_word_embeddings": tied, "attention_bias": bias})
    model = randomised(transformers.LlamaForCausalLM(config))
    return model, float_decoder(model)


def float_decoder(model: Any) -> Decoder:
    """The Decoder of an unquantised transformers model, which is left as it is."""
    return quantize(copy.deepcopy(model), float_recipe())


def quantised_decoder(
    decoder: Decoder,
    rng: np.random.Generator,
    act_bits: int,
    group_size: int,
    act_group: int,
    rank: int,
    subtract: bool,
) -> Decoder:
    """`decoder` with random INT4 weights in each linear, about as large as those they replace.

    rank 0: no branch. The last layer's down_proj stays in floating point.
    """

    def quantised(entry: Linear) -> QuantLinear:
        assert isinstance(entry, FloatLinear)
        n, m = entry.weight.shape
        groups = n // (group_size or n)
        most = MOST if groups > 1 else 1
        step = float(entry.weight.std()) / 4.6 / most  # 4.6: standard deviation of −8…7
        branch = rng.standard_normal((rank, m)) * entry.weight.std() if rank else None
        return QuantLinear(
            entry.name,
            entry.parts,
            rng.integers(-8, 8, (n, m), dtype=np.int8),
            rng.integers(most - most // 4, most + 1, (groups, m), dtype=np.int8),
            (step * rng.uniform(0.9, 1.3, m)).astype(np.float16),
            group_size,
            act_bits,
            act_group,
            np.linalg.qr(rng.standard_normal((n, rank)))[0].astype(np.float16) if rank else None,
            None if branch is None else branch.astype(np.float16),
            subtract,
            entry.bias,
        )

    layers = [
        replace(
            layer,
            qkv=quantised(layer.qkv),
            o=quantised(layer.o),
            gate_up=quantised(layer.gate_up),
            down=layer.down if layer is decoder.layers[-1] else quantised(layer.down),
        )
        for layer in decoder.layers
    ]
    return replace(decoder, layers=layers)


def simulate(model: Any, decoder: Decoder, rank: int) -> None:
    """Let the linears of `model` compute what `decoder`'s do, in NumPy, with `rank` columns of each branch, and its
    attention see keys and values as a float16 cache holds them."""
    use_half_cache(model)
    for block, layer in zip(model.model.layers, decoder.layers, strict=True):
        for entry in layer.linears:
            start = 0
            for part, width in entry.parts.items():
                if isinstance(entry, QuantLinear):
                    block.set_submodule(part, _Simulated(entry, slice(start, start + width), rank))
                start += width


class _Simulated(nn.Module):
    """Some columns of a quantised call, by the reference."""

    def __init__(self, entry: QuantLinear, columns: slice, rank: int) -> None:
        super().__init__()
        self.entry, self.columns, self.rank = entry, columns, rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        e = self.entry
        bias = np.zeros(e.q.shape[1], np.float32) if e.bias is None else e.bias
        weights = pack_int4(e.q), pack_group_scales(e.group_scales), e.scales, bias
        groups: dict[str, Any] = {"group_size": e.group_size, "act_bits": e.act_bits, "act_group": e.act_group}
        groups |= {"act_clip": e.act_clip, "hadamard": e.hadamard}
        if e.basis is None or e.coef is None:
            y = int4_residual_matmul(x.numpy(), *weights, **groups)
        else:
            branch = e.basis, e.coef, np.array([self.rank], np.int64)
            y = specquant_matmul(x.numpy(), *branch, *weights, **groups, subtract=int(e.subtract))
        return torch.from_numpy(y[..., self.columns])
