"""A tiny Llama with random weights, its Decoder, in floating point or INT4, and what that computes in torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specquant.custom_ops.packing import pack_int4, row_sums, segment_length
from specquant.custom_ops.reference import int4_residual_matmul, specquant_matmul
from specquant.exporter.decoder import Decoder, DecoderConfig, DecoderLayer, FloatLinear, Linear, QuantLinear


def tiny_llama(seed: int, tied: bool = True, bias: bool = False) -> tuple[LlamaForCausalLM, Decoder]:
    """Two layers, hidden 64, 4 heads on 2 kv heads, vocabulary 128, context 96."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        tie_word_embeddings=tied,
        attention_bias=bias,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,  # large enough that attention and the gate leave their linear range
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):  # transformers starts them at one and zero
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model, float_decoder(model)


def float_decoder(model: LlamaForCausalLM) -> Decoder:
    """The Decoder of an unquantised transformers Llama."""
    config, rotary = model.config, LlamaRotaryEmbedding(model.config)
    cos, sin = rotary(torch.zeros(1), torch.arange(config.max_position_embeddings)[None])
    half = cos.shape[-1] // 2
    layers = []
    for i, layer in enumerate(model.model.layers):
        attn, mlp, name = layer.self_attn, layer.mlp, f"model.layers.{i}"
        layers.append(
            DecoderLayer(
                _array(layer.input_layernorm.weight),
                _linear(f"{name}.self_attn.qkv_proj", q_proj=attn.q_proj, k_proj=attn.k_proj, v_proj=attn.v_proj),
                _linear(f"{name}.self_attn.o_proj", o_proj=attn.o_proj),
                _array(layer.post_attention_layernorm.weight),
                _linear(f"{name}.mlp.gate_up_proj", gate_proj=mlp.gate_proj, up_proj=mlp.up_proj),
                _linear(f"{name}.mlp.down_proj", down_proj=mlp.down_proj),
            )
        )
    eos = config.eos_token_id
    return Decoder(
        DecoderConfig(
            family="llama",
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=attn.head_dim,
            vocab_size=config.vocab_size,
            context_length=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            bos_token_id=config.bos_token_id,
            eos_token_ids=eos if isinstance(eos, list) else [eos],
        ),
        embedding=_array(model.model.embed_tokens.weight),
        layers=layers,
        final_norm=_array(model.model.norm.weight),
        lm_head=None if config.tie_word_embeddings else _array(model.lm_head.weight),
        rope_cos=_array(cos[0, :, :half]),
        rope_sin=_array(sin[0, :, :half]),
    )


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = np.ascontiguousarray(tensor.detach().float().numpy())
    return array


def _linear(name: str, **modules: Any) -> FloatLinear:
    weight = np.concatenate([_array(module.weight).T for module in modules.values()], axis=1)
    biases = [_array(module.bias) for module in modules.values() if module.bias is not None]
    parts = {part: module.out_features for part, module in modules.items()}
    return FloatLinear(name, parts, weight, np.concatenate(biases) if biases else None)


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
        step = float(entry.weight.std()) / 4.6  # 4.6: standard deviation of −8…7
        branch = rng.standard_normal((rank, m)) * entry.weight.std() if rank else None
        return QuantLinear(
            entry.name,
            entry.parts,
            rng.integers(-8, 8, (n, m), dtype=np.int8),
            (step * rng.uniform(0.8, 1.2, (n // (group_size or n), m))).astype(np.float16),
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


def simulate(model: LlamaForCausalLM, decoder: Decoder, rank: int) -> None:
    """Let the linears of `model` compute what `decoder`'s do, in NumPy, with `rank` columns of each branch."""
    for block, layer in zip(model.model.layers, decoder.layers, strict=True):
        for entry in layer.linears:
            if isinstance(entry, FloatLinear):
                continue
            owner = block.self_attn if ".self_attn." in entry.name else block.mlp
            start = 0
            for part, width in entry.parts.items():
                setattr(owner, part, _Simulated(entry, slice(start, start + width), rank))
                start += width


class _Simulated(torch.nn.Module):
    """Some columns of a quantised call, by the reference."""

    def __init__(self, entry: QuantLinear, columns: slice, rank: int) -> None:
        super().__init__()
        self.entry, self.columns, self.rank = entry, columns, rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        e = self.entry
        n, m = e.q.shape
        bias = np.zeros(m, np.float32) if e.bias is None else e.bias
        sums = row_sums(e.q, segment_length(n, e.group_size, e.act_group))
        weights = pack_int4(e.q), e.scales, sums, bias
        groups = {"group_size": e.group_size, "act_bits": e.act_bits, "act_group": e.act_group}
        if e.basis is None or e.coef is None:
            y = int4_residual_matmul(x.numpy(), *weights, **groups)
        else:
            branch = e.basis, e.coef, np.array([self.rank], np.int64)
            y = specquant_matmul(x.numpy(), *branch, *weights, **groups, subtract=int(e.subtract))
        return torch.from_numpy(y[..., self.columns])
