"""The block that tools/bench_block.py times, against Hugging Face's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tools.bench_block import EPSILON, HEAD, HalfBlock, Shape, sizes

llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_block_is_llamas(kv_heads: int) -> None:
    """Fused linears, rotary embedding, masks, grouped heads and residuals, in float32 on the CPU."""
    shape, sequence = Shape(2 * HEAD, 2, kv_heads, 96), 7
    config = llama.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=EPSILON,
        num_hidden_layers=1,
        vocab_size=8,
        attn_implementation="sdpa",
    )
    model = llama.LlamaModel(config).eval()
    layer = model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    weights = [
        torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
        attention.o_proj.weight,
        torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        mlp.down_proj.weight,
    ]
    assert [tuple(weight.shape) for weight in weights] == [(m, n) for n, m in sizes(shape)]

    def linear(weight: Tensor):  # type: ignore[no-untyped-def]
        return lambda x: x @ weight.T

    x = torch.randn(3, sequence, shape.hidden)
    places = torch.arange(sequence)[None]
    with torch.no_grad():
        block = HalfBlock(shape, [linear(weight) for weight in weights], sequence, x)
        expected = model(inputs_embeds=x, position_ids=places.expand(3, -1)).last_hidden_state
        found = block(x)
        found = found * torch.rsqrt(found.square().mean(-1, keepdim=True) + EPSILON)  # the model's last norm
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
