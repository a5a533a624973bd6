"""The loop over blocks: from a transformers model and calibration tokens to a `Decoder` ready for the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.kv_rows import row_bytes
from specquant.exporter.calibrate import InputStatistics, first_block_inputs, float_copy, in_step
from specquant.exporter.decoder import Decoder, DecoderConfig, DecoderLayer
from specquant.exporter.families import (
    ACTIVATIONS,
    Family,
    Stage,
    activation_name,
    family_of,
    head_dim,
    layer_attention,
    longest_context,
    rotary_tables,
    text_config,
    weight_of,
)
from specquant.exporter.kv import block_hadamard, key_offset, use_int4_cache
from specquant.exporter.linear import FloatStage, QuantStage, StageWeights
from specquant.exporter.ranks import spread_ranks
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
    family, text = family_of(model.config), text_config(model.config)
    attention = text._attn_implementation
    config = decoder_config(model.config, family, context_length)
    recipe.check_shapes(stage_inputs(config))
    base = model.get_submodule(family.decoder)
    layers = list(base.get_submodule(family.layers).children())
    calibrated = recipe.needs_calibration
    if calibrated and tokens is None:
        raise ValueError("a quantising recipe needs calibration tokens")
    ranks: dict[tuple[int, str], int] = {}
    if recipe.ranks == "fisher" and calibrated and tokens is not None:
        if progress:
            progress(0, len(layers), "ranks")
        ranks = spread_ranks(model, family, recipe, tokens)
    if recipe.kv_bits == 4:
        row_bytes(config.head_dim)
        use_int4_cache(
            model, recipe.kv_clip
        )  # what comes after the attention is calibrated on what the cache makes of it
    hidden, ropes = first_block_inputs(model, family, tokens) if tokens is not None and calibrated else ([], [])
    exact = list(hidden) if recipe.follows else None  # the same tokens as the float model carries them

    done: list[DecoderLayer] = []
    for index, (layer, (window, rotary)) in enumerate(zip(layers, layer_attention(text), strict=True)):
        if progress:
            progress(index, len(layers), f"block {index + 1}/{len(layers)}")
        where = f"{family.decoder}.{family.layers}.{index}"
        layer.float()
        _check_finite(layer, where)
        rotated = rotate_values(layer, family, recipe, config)
        stages: dict[str, QuantStage | FloatStage] = {}
        if calibrated:
            run = partial(family.stage_inputs, rope=ropes[rotary], window=window)
            whole = None if exact is None else (float_copy(layer, family, attention), exact)
            for stage, inputs, wanted in in_step(run, (layer, hidden), whole):
                at = recipe.at(stage.name)
                if rank := ranks.get((index, stage.name)):
                    at = replace(at, k=rank)
                if rotated and stage.fold == "heads":
                    at = replace(at, hadamard=0)
                stages[stage.name] = _quantize_stage(layer, family, stage, inputs, wanted, at, config, stages, where)
        else:
            for stage in family.stages:
                stages[stage.name] = FloatStage(f"{where}.{stage.path}", _weights(layer, stage))
        done.append(_finish_layer(layer, family, stages, window, rotary))
        layer.to("meta")  # its numbers live on in `done`: memory stays at one model
    if progress:
        progress(len(layers), len(layers), "done")

    embedding, head = weight_of(base, family.embedding), weight_of(model, family.lm_head)
    final_norm = family.norm_weight(base, family.final_norm)
    for name, weight in (
        (f"{family.decoder}.{family.embedding}", embedding),
        (f"{family.decoder}.{family.final_norm}", final_norm),
        (family.lm_head, head),
    ):
        if not torch.isfinite(weight).all():
            raise SpecQuantError(f"weights of {name} hold NaN or infinity; the model is damaged")
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    cos, sin = _stored_rotary_tables(base, family, text, config.context_length)
    return Decoder(
        config=replace(config, kv_bits=recipe.kv_bits, kv_clip=recipe.kv_clip, head_bits=recipe.head_bits),
        embedding=embedding.cpu().numpy(),
        layers=done,
        final_norm=final_norm.cpu().numpy(),
        lm_head=None if tied else head.cpu().numpy(),
        rope_cos=cos,
        rope_sin=sin,
        recipe=recipe.to_dict(),
    )


def _quantize_stage(
    layer: nn.Module,
    family: Family,
    stage: Stage,
    inputs: list[Tensor],
    wanted: list[Tensor] | None,
    at: Recipe,
    config: DecoderConfig,
    earlier: dict[str, Any],
    where: str,
) -> QuantStage | FloatStage:
    """Quantise one stage by its recipe, fold its smoothing factor away, and put the simulation into the block.

    inputs: what the stage sees; wanted: what it saw in the float model, or None.
    """
    weights = _weights(layer, stage)
    name = f"{where}.{stage.path}"
    if at.w_bits == 16:
        return FloatStage(name, weights)
    stats = InputStatistics.gather(inputs, name, exact=wanted)
    alpha, factors = best_smoothing(name, weights, stats, at, stage.fold == "heads", config)
    if factors is not None:
        for x in inputs:
            x /= factors
        fold_smoothing(layer, family, stage, factors, earlier, config)
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
    stats = replace(stats, drift=None)  # a trial rounds the weights as they are
    act_size, weight_max = stats.channel_size(recipe.smooth_by), weights.matrix.abs().amax(1)
    best: tuple[float, float, Tensor] | None = None
    for alpha in recipe.smooth_grid:
        if heads:
            shared = smoothing_factors(
                share_over_heads(act_size, config.num_heads, config.num_kv_heads),
                share_over_heads(weight_max, config.num_heads, config.num_kv_heads),
                alpha,
            )
            factors = spread_over_heads(shared, config.num_heads, config.num_kv_heads)
        else:
            factors = smoothing_factors(act_size, weight_max, alpha)
        trial = QuantStage.build(name, weights.scaled(factors), stats.scaled(factors), recipe, quick=True)
        if best is None or trial.error < best[0]:
            best = (trial.error, alpha, factors)
    assert best is not None
    return best[1:]


def fold_smoothing(
    layer: nn.Module,
    family: Family,
    stage: Stage,
    factors: Tensor,
    earlier: dict[str, QuantStage | FloatStage],
    config: DecoderConfig,
) -> None:
    """Divide whatever produces the stage's input by λ [N]: the norm before it, or output channels (weights and biases)
    of one of the `earlier` stages."""
    if stage.fold == "norm":
        norm = family.norm_weight(layer, stage.fold_into)
        family.set_norm(layer, stage.fold_into, norm / factors)
        return
    if stage.fold == "heads":
        factors = share_over_heads(factors, config.num_heads, config.num_kv_heads)
    earlier[stage.fold_into].scale_last_outputs(1 / factors)


def rotate_values(layer: nn.Module, family: Family, recipe: Recipe, config: DecoderConfig) -> bool:
    """Let v_proj make values that are rotated already, head by head, and o_proj expect them; whether that was done.

    Attention mixes values of different tokens, never features: (softmax · V) H = softmax · (V H). So the transform of
    o_proj's input costs nothing at run time, and a 4-bit cache holds rotated values too.
    """
    block = recipe.at("o_proj").hadamard_block(config.head_dim)
    if not block or (recipe.at("o_proj").w_bits == 16 and recipe.kv_bits == 16):
        return False
    modules: list[Any] = [layer.get_submodule(stage.linears[-1]) for stage in family.stages[:2]]
    qkv, o = modules
    values = slice(-config.num_kv_heads * config.head_dim, None)
    made: Tensor = qkv.weight.data[values]
    made.copy_(block_hadamard(made.T, block).T)
    if qkv.bias is not None:
        qkv.bias.data[values] = block_hadamard(qkv.bias.data[values], block)
    o.weight.data.copy_(block_hadamard(o.weight.data, block))
    return True


def _weights(layer: nn.Module, stage: Stage) -> StageWeights:
    return StageWeights.of(layer, stage.linears)


def _finish_layer(layer: nn.Module, family: Family, stages: dict[str, Any], window: int, rotary: int) -> DecoderLayer:
    qkv, o, gate_up, down = (stages[s.name].to_linear() for s in family.stages)
    norms = {name: family.norm_weight(layer, path).cpu().numpy() for name, path in family.norms.items()}
    offset = key_offset(layer.get_submodule(family.attention))
    return DecoderLayer(
        qkv=qkv, o=o, gate_up=gate_up, down=down, window=window, rotary=rotary, key_offset=offset, **norms
    )


def _check_finite(layer: nn.Module, where: str) -> None:
    for name, parameter in layer.named_parameters():
        if not torch.isfinite(parameter).all():
            raise SpecQuantError(f"weights of {where}.{name} hold NaN or infinity; the model is damaged")


def _stored_rotary_tables(base: nn.Module, family: Family, text: Any, context_length: int) -> list[Any]:
    """cos and sin, each float32 [tables, context_length, rotary_dim / 2]."""
    at = next(base.get_submodule(family.rotary).buffers())
    positions = torch.arange(context_length, device=at.device)[None]
    tables = rotary_tables(base, family, text, at.float(), positions)
    half = tables[0][0].shape[-1] // 2  # transformers repeats each half
    return [torch.stack([t[0, :, :half] for t in pair]).cpu().numpy() for pair in zip(*tables, strict=True)]


def decoder_config(config: Any, family: Family, context_length: int | None = None) -> DecoderConfig:
    """What the graph needs, from a transformers config."""
    whole, config = config, text_config(config)  # the same but for models that also see
    bos, eos = (getattr(whole, n, None) or getattr(config, n, None) for n in ("bos_token_id", "eos_token_id"))
    limit = longest_context(config)
    if context_length is not None and not 0 < context_length <= limit:
        raise SpecQuantError(f"context length {context_length} is not in 1…{limit}, what the model was made for")
    return DecoderConfig(
        family=family.name,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        vocab_size=config.vocab_size,
        context_length=context_length or limit,
        rms_norm_eps=config.rms_norm_eps,
        bos_token_id=bos,
        eos_token_ids=eos if isinstance(eos, list) else [] if eos is None else [eos],
        attention_scale=float(getattr(config, "query_pre_attn_scalar", head_dim(config))) ** -0.5,
        embedding_scale=family.embedding_scale(config),
        activation=ACTIVATIONS[activation_name(config)],
    )


def stage_inputs(config: DecoderConfig) -> dict[str, int]:
    """in_features N of every stage."""
    return {
        "qkv_proj": config.hidden_size,
        "o_proj": config.num_heads * config.head_dim,
        "gate_up_proj": config.hidden_size,
        "down_proj": config.intermediate_size,
    }
