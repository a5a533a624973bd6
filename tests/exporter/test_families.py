"""Every family on a tiny random model: folding is exact, and the export computes what transformers does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.decoder import Decoder
from specquant.exporter.families import family_of, layer_attention
from specquant.exporter.linear import FloatStage, StageWeights
from specquant.exporter.quantize import decoder_config, fold_smoothing, quantize, rotate_values, stage_inputs
from specquant.exporter.recipe import Recipe
from specquant.exporter.simulate import simulate
from specquant.exporter.smooth import spread_over_heads
from tests.exporter.graph.running import Running
from tests.tiny import GEMMA3, MODELS, SIZES, float_decoder, randomised, tiny_model

VOCAB = SIZES["vocab_size"]


def logits_of(model: nn.Module, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """[tokens, vocab] of one prompt, computed at once."""
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return logits


def relative(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def prefill_and_steps(decoder: Decoder, ids: NDArray[np.int64], folder: Path) -> NDArray[np.float32]:
    """A prompt longer than the sliding windows of tests/tiny.py, single steps, and a second prompt."""
    running = Running(decoder, folder)
    pieces = [ids[:17], *(ids[t : t + 1] for t in range(17, 25)), ids[25:]]
    return np.concatenate([running.step(piece[None], [len(piece)])[0] for piece in pieces])


@pytest.mark.parametrize("name", MODELS)
def test_float_export_equals_transformers(rng: np.random.Generator, tmp_path: Path, name: str) -> None:
    model = tiny_model(name, int(rng.integers(2**31)))
    ids = rng.integers(3, VOCAB, 37)
    expected = logits_of(model, ids)
    decoder = float_decoder(model)
    for folder in ("whole", "steps"):
        (tmp_path / folder).mkdir()
    assert relative(Running(decoder, tmp_path / "whole").step(ids[None], [37])[0], expected) < 1e-4
    assert relative(prefill_and_steps(decoder, ids, tmp_path / "steps"), expected) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_folding_changes_nothing(rng: np.random.Generator, name: str) -> None:
    """In float64, with factors from e⁻² to e², and with no quantisation to hide what is wrong."""
    model = tiny_model(name, int(rng.integers(2**31))).double()
    family = family_of(model.config)
    config = decoder_config(model.config, family)
    ids = rng.integers(3, VOCAB, 19)
    before = logits_of(model, ids)
    for layer in model.get_submodule(family.decoder).get_submodule(family.layers):
        folded: dict[str, Any] = {}
        for stage in family.stages:
            n = stage_inputs(config)[stage.name]
            if stage.fold == "heads":
                n = n // config.num_heads * config.num_kv_heads
            factors = torch.from_numpy(np.exp(rng.uniform(-2, 2, n)))
            if stage.fold == "heads":
                factors = spread_over_heads(factors, config.num_heads, config.num_kv_heads)
            weights = StageWeights.of(layer, stage.linears).scaled(factors)
            fold_smoothing(layer, family, stage, factors, folded, config)
            folded[stage.name] = FloatStage(stage.name, weights)
        for stage in folded.values():
            put(layer, stage.weights)
    assert relative(logits_of(model, ids), before) < 1e-5


def put(layer: nn.Module, weights: StageWeights) -> None:
    """The stage's numbers back into the linears that they came from."""
    start = 0
    for path, width in weights.parts.items():
        part = slice(start, start := start + width)
        linear = layer.get_submodule(path)
        linear.weight.data = weights.matrix[:, part].T.contiguous()
        if weights.bias is not None:
            linear.bias.data = weights.bias[part]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("block", [8, 64])
def test_rotated_values_change_nothing(rng: np.random.Generator, name: str, block: int) -> None:
    """In float64, and the cache does hold other values."""
    model = tiny_model(name, int(rng.integers(2**31))).double()
    family = family_of(model.config)
    ids = rng.integers(3, VOCAB, 19)
    before = logits_of(model, ids)
    for layer in model.get_submodule(family.decoder).get_submodule(family.layers):
        output = layer.get_submodule(family.stages[1].linears[0])
        weight = output.weight.clone()
        assert rotate_values(layer, family, Recipe(hadamard=block), decoder_config(model.config, family))
        assert relative(output.weight.detach().numpy(), weight.detach().numpy()) > 0.1
    assert relative(logits_of(model, ids), before) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_blocks_in_stages_equal_the_model(rng: np.random.Generator, name: str) -> None:
    """What calibration sees of a block is what the model computes, beyond the sliding window too."""
    model = tiny_model(name, int(rng.integers(2**31)))
    tokens = torch.from_numpy(rng.integers(3, VOCAB, (2, 19)))
    seen: list[Tensor] = []
    family = family_of(model.config)
    base = model.get_submodule(family.decoder)
    for layer in base.get_submodule(family.layers):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(tokens)
        from specquant.exporter.calibrate import first_block_inputs

        hidden, ropes = first_block_inputs(model, family, tokens)
        places = layer_attention(model.config)
        for layer, (window, rotary), expected in zip(base.get_submodule(family.layers), places, seen, strict=True):
            stages = [stage.name for stage, _ in family.stage_inputs(layer, hidden, ropes[rotary], window)]
            assert stages == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
            assert relative(hidden[0].numpy(), expected.numpy()) < 1e-5


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "phi3", "gemma3"])
def test_quantised_export_equals_its_simulation(rng: np.random.Generator, tmp_path: Path, name: str) -> None:
    """4-bit weights with branches; activations stay whole, those of the head too, since one that falls half-way between
    two steps may go either way (tests/exporter/graph/test_quantised.py does them). So may a key or value in its float16
    cache, whose steps are smaller: 0.02 % of the logits, seen."""
    model = tiny_model(name, int(rng.integers(2**31)))
    tokens = torch.from_numpy(rng.integers(3, VOCAB, (4, 24)))
    whole = {"a_bits": 16, "act_group": 0, "head_bits": 16}
    recipe = Recipe(**whole, k=4, group_size=8, smooth_grid=(0.5,), samples=4, sequence_length=24)
    decoder = quantize(copy.deepcopy(model), recipe, tokens)
    ids = rng.integers(3, VOCAB, 37)
    original = logits_of(model, ids)
    expected = logits_of(simulate(model, family_of(model.config), decoder), ids)
    assert (
        relative(prefill_and_steps(decoder, ids, tmp_path), expected) < 3e-3
    )  # a key near half a step of float16 goes either way
    assert relative(expected, original) > 1e-2  # it is not the float model that was compared with itself


def test_text_part_of_a_model_that_sees(rng: np.random.Generator, tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**SIZES, **GEMMA3}, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    torch.manual_seed(int(rng.integers(2**31)))
    model = randomised(transformers.Gemma3ForConditionalGeneration(config))
    ids = rng.integers(3, VOCAB, 37)
    assert relative(prefill_and_steps(float_decoder(model), ids, tmp_path), logits_of(model, ids)) < 1e-4


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (transformers.GPT2Config(), "architecture 'gpt2'"),
        (transformers.Qwen2MoeConfig(), "architecture 'qwen2_moe'"),
        (transformers.LlamaConfig(hidden_act="gelu"), "activation 'gelu'"),
        (transformers.LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rotary type 'dynamic'"),
        (transformers.LlamaConfig(hidden_size=96, num_attention_heads=4), "head_dim 24"),
        (transformers.Gemma3TextConfig(final_logit_softcapping=30.0), "final_logit_softcapping"),
    ],
)
def test_what_is_not_supported_is_refused_in_a_line(config: Any, problem: str) -> None:
    with pytest.raises(SpecQuantError, match=rf"\A{problem} [^\n]*support[^\n]*\Z"):
        family_of(config)


def test_longrope_is_exported_as_far_as_its_short_factors_go(rng: np.random.Generator) -> None:
    config = tiny_model("phi3-longrope", int(rng.integers(2**31))).config
    assert decoder_config(config, family_of(config)).context_length == 48  # of 96
    with pytest.raises(SpecQuantError, match=r"\Acontext length 49 is not in 1…48, [^\n]*\Z"):
        decoder_config(config, family_of(config), 49)
