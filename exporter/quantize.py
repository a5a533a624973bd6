"""The loop over blocks: from a transformers model and calibration tokens to a `Decoder` ready for the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.calibrate import InputStatistics, first_block_inputs
from specquant.exporter.decoder import Decoder, DecoderConfig, DecoderLayer
from specquant.exporter.families import Family, Stage, family_of, weight_of
from specquant.exporter.linear import FloatStage, QuantStage, StageWeights
from specquant.exporter.recipe import Recipe
from specquant.exporter.smooth import share_over_heads, smoothing_factors, spread_over_heads

Progress = Callable[[int, int, str], None]  # done, total, what


@torch.inference_mode()
def quantize(
    model: nn.Module,
    recipe: Recipe,
    tokens: Tensor | None = None,
    context_length: int | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Quantise every linear of the decoder blocks. The model's blocks are consumed: it cannot be used afterwards.

    tokens int64 [samples, length] (needed unless the recipe is all 16 bit); context_length cuts the rotary tables
    (default: the model's). Deterministic for given tokens and recipe. Raises SpecQuantError for an unsupported
    architecture, a recipe that does not fit its sizes, and NaN or infinity in weights or activations.
    """
    family = family_of(model.config)
    config = decoder_config(model.config, family, context_length)
    recipe.check_shapes(stage_inputs(config))
    base = model.get_submodule(family.decoder)
    layers = list(base.get_submodule(family.layers).children())
    quantised = any(recipe.at(s.name).w_bits != 16 for s in family.stages)
    if quantised and tokens is None:
        raise ValueError("a quantising recipe needs calibration tokens")
    hidden, rope = first_block_inputs(model, family, tokens) if tokens is not None and quantised else ([], None)

    done: list[DecoderLayer] = []
    for index, layer in enumerate(layers):
        if progress:
            progress(index, len(layers), f"block {index + 1}/{len(layers)}")
        where = f"{family.decoder}.{family.layers}.{index}"
        layer.float()
        _check_finite(layer, where)
        stages: dict[str, QuantStage | FloatStage] = {}
        if quantised:
            for stage, inputs in family.stage_inputs(layer, hidden, rope):
                stages[stage.name] = _quantize_stage(layer, stage, inputs, recipe, config, stages, where)
        else:
            for stage in family.stages:
                stages[stage.name] = FloatStage(f"{where}.{stage.path}", _weights(layer, stage))
        done.append(_finish_layer(layer, family, stages))
        layer.to("meta")  # its numbers live on in `done`: memory stays at one model
    if progress:
        progress(len(layers), len(layers), "done")

    embedding, head = weight_of(base, family.embedding), weight_of(model, family.lm_head)
    for name, weight in ((family.embedding, embedding), (family.lm_head, head)):
        if not torch.isfinite(weight).all():
            raise SpecQuantError(f"weights of {name} hold NaN or infinity; the model is damaged")
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    cos, sin = _rotary_tables(base.get_submodule(family.rotary), config)
    return Decoder(
        config=config,
        embedding=embedding.cpu().numpy(),
        layers=done,
        final_norm=weight_of(base, family.final_norm).cpu().numpy(),
        lm_head=None if tied else head.cpu().numpy(),
        rope_cos=cos,
        rope_sin=sin,
        recipe=recipe.to_dict(),
    )


def _quantize_stage(
    layer: nn.Module,
    stage: Stage,
    inputs: list[Tensor],
    recipe: Recipe,
    config: DecoderConfig,
    earlier: dict[str, Any],
    where: str,
) -> QuantStage | FloatStage:
    """Quantise one stage, fold its smoothing factor away, and put the simulation into the block."""
    at = recipe.at(stage.name)
    weights = _weights(layer, stage)
    name = f"{where}.{stage.path}"
    if at.w_bits == 16:
        return FloatStage(name, weights)
    stats = InputStatistics.gather(inputs, name)
    alpha, factors = best_smoothing(name, weights, stats, at, stage.fold == "heads", config)
    if factors is not None:
        for x in inputs:
            x /= factors
        _fold(layer, stage, factors, earlier, config)
    if factors is not None:
        weights, stats = weights.scaled(factors), stats.scaled(factors)
    done = QuantStage.build(name, weights, stats, at)
    done.alpha = alpha
    for path, module in done.modules().items():
        layer.set_submodule(path, module)
    return done


def best_smoothing(
    name: str,
    weights: StageWeights,
    stats: InputStatistics,
    recipe: Recipe,
    heads: bool,
    config: DecoderConfig,
) -> tuple[float | None, Tensor | None]:
    """The smoothing exponent of the grid whose output error, rounded to nearest, is smallest, and its λ [N]; None
    where the recipe does not smooth."""
    if not recipe.smooth:
        return None, None
    largest, weight_max = stats.largest, weights.matrix.abs().amax(1)
    best: tuple[float, float, Tensor] | None = None
    for alpha in recipe.smooth_grid:
        if heads:
            shared = smoothing_factors(
                share_over_heads(largest, config.num_heads, config.num_kv_heads),
                share_over_heads(weight_max, config.num_heads, config.num_kv_heads),
                alpha,
            )
            factors = spread_over_heads(shared, config.num_heads, config.num_kv_heads)
        else:
            factors = smoothing_factors(largest, weight_max, alpha)
        trial = QuantStage.build(name, weights.scaled(factors), stats.scaled(factors), recipe, quick=True)
        if best is None or trial.error < best[0]:
            best = (trial.error, alpha, factors)
    assert best is not None
    return best[1:]


def _fold(layer: nn.Module, stage: Stage, factors: Tensor, earlier: dict[str, Any], config: DecoderConfig) -> None:
    """Divide whatever produces the stage's input by λ: a norm's weight, or output channels of an earlier linear."""
    if stage.fold == "norm":
        weight_of(layer, stage.fold_into).div_(factors)
        return
    if stage.fold == "heads":
        factors = share_over_heads(factors, config.num_heads, config.num_kv_heads)
    for before in earlier.values():
        if stage.fold_into in before.parts:
            before.scale_outputs(stage.fold_into, 1 / factors)


def _weights(layer: nn.Module, stage: Stage) -> StageWeights:
    return StageWeights.of(layer, stage.linears)


def _finish_layer(layer: nn.Module, family: Family, stages: dict[str, Any]) -> DecoderLayer:
    qkv, o, gate_up, down = (stages[s.name].to_linear() for s in family.stages)
    norms = [weight_of(layer, n).cpu().numpy() for n in (family.input_norm, family.mlp_norm)]
    return DecoderLayer(norms[0], qkv, o, norms[1], gate_up, down)


def _check_finite(layer: nn.Module, where: str) -> None:
    for name, parameter in layer.named_parameters():
        if not torch.isfinite(parameter).all():
            raise SpecQuantError(f"weights of {where}.{name} hold NaN or infinity; the model is damaged")


def _rotary_tables(rotary: nn.Module, config: DecoderConfig) -> tuple[Any, Any]:
    """cos and sin [context_length, head_dim / 2], scaling included, from the model's own rotary module."""
    at = next(rotary.buffers())
    cos, sin = rotary(at.float(), position_ids=torch.arange(config.context_length, device=at.device)[None])
    half = cos.shape[-1] // 2  # transformers repeats each half
    return tuple(t[0, :, :half].float().cpu().contiguous().numpy() for t in (cos, sin))


def decoder_config(config: Any, family: Family, context_length: int | None = None) -> DecoderConfig:
    """The sizes the graph needs, from a transformers config."""
    eos = config.eos_token_id
    limit = config.max_position_embeddings
    if context_length is not None and not 0 < context_length <= limit:
        raise SpecQuantError(f"context length {context_length} is not in 1…{limit}, what the model was made for")
    return DecoderConfig(
        family=family.name,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        context_length=context_length or limit,
        rms_norm_eps=config.rms_norm_eps,
        bos_token_id=config.bos_token_id,
        eos_token_ids=eos if isinstance(eos, list) else [] if eos is None else [eos],
    )


def stage_inputs(config: DecoderConfig) -> dict[str, int]:
    """in_features N of every stage."""
    return {
        "qkv_proj": config.hidden_size,
        "o_proj": config.num_heads * config.head_dim,
        "gate_up_proj": config.hidden_size,
        "down_proj": config.intermediate_size,
    }
