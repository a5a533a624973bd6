"""One row per architecture family: which linears share an input, what smoothing folds into, what its graph needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.decoder import NORMS


@dataclass(frozen=True)
class Stage:
    """Linears of a block that share one input, in the order the block computes them, outputs side by side.

    `fold` says where the inverse of a smoothing factor goes: into the norm before (`norm`, fold_into is its path), or
    into the last output channels of an earlier stage (fold_into is its name): `heads`, one factor per value channel of
    v_proj, or `rows`, those of up_proj. Whether the earlier stage is several linears or one fused is all the same.
    """

    name: str
    linears: tuple[str, ...]
    fold: Literal["norm", "heads", "rows"]
    fold_into: str

    @property
    def path(self) -> str:
        """Where a person looks for it in the block: `self_attn.qkv_proj`."""
        return f"{self.linears[0].rsplit('.', 1)[0]}.{self.name}"


STAGES = (
    Stage("qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "norm", "input_layernorm"),
    Stage("o_proj", ("self_attn.o_proj",), "heads", "qkv_proj"),
    Stage("gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "norm", "post_attention_layernorm"),
    Stage("down_proj", ("mlp.down_proj",), "rows", "gate_up_proj"),
)


@dataclass(frozen=True)
class Family:
    """Module paths of a decoder-only architecture as transformers names them, and where it departs from Llama.

    The fields named like a norm of `DecoderLayer` are paths in the block, None where the architecture has no such norm.
    norm_offset: what the norms add to the weight they store. scaled_embedding: hidden states start as √hidden_size
    times the embedding.
    """

    name: str
    model_types: tuple[str, ...]
    stages: tuple[Stage, ...] = STAGES
    decoder: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    final_norm: str = "norm"
    lm_head: str = "lm_head"
    rotary: str = "rotary_emb"
    attention: str = "self_attn"
    mlp: str = "mlp"
    input_norm: str = "input_layernorm"
    attention_output_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    mlp_output_norm: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    norm_offset: float = 0.0
    scaled_embedding: bool = False

    @property
    def norms(self) -> dict[str, str]:
        """Field of `DecoderLayer` -> path in the block, of the norms this architecture has."""
        return {name: path for name in NORMS if (path := getattr(self, name)) is not None}

    def embedding_scale(self, config: Any) -> float:
        return float(config.hidden_size**0.5) if self.scaled_embedding else 1.0

    def norm_weight(self, module: nn.Module, path: str) -> Tensor:
        """What the norm at `path` multiplies by, its offset included: a new tensor, float32 (float64 if stored so)."""
        return weight_of(module, path) + self.norm_offset

    def set_norm(self, module: nn.Module, path: str, weight: Tensor) -> None:
        """Let the norm at `path` multiply by `weight`, its offset included."""
        module.get_submodule(path).weight.data = weight - self.norm_offset

    def stage_inputs(
        self, layer: nn.Module, hidden: list[Tensor], rope: Any, window: int = 0
    ) -> Iterator[tuple[Stage, list[Tensor]]]:
        """Run a block stage by stage over chunks of hidden states (each [batch, tokens, hidden]).

        rope: (cos, sin) for the block's attention; window: tokens that a query sees, 0 for all before it.
        Yields every stage with its inputs. Before asking for the next, the caller may replace the stage's linears and,
        where it folded a smoothing factor, must divide the inputs by it in place: the block goes on from them.
        At the end `hidden` holds the block's outputs.
        """
        qkv, o, gate_up, down = self.stages
        attention, mlp = layer.get_submodule(self.attention), layer.get_submodule(self.mlp)
        norm, mlp_norm = layer.get_submodule(self.input_norm), layer.get_submodule(self.mlp_norm)
        mask = _window_mask(hidden[0].shape[1], window, hidden[0].device)

        x = [norm(h) for h in hidden]
        yield qkv, x
        with _bypassed(layer, o.linears[0]):
            x = [attention(hidden_states=v, position_embeddings=rope, attention_mask=mask)[0] for v in x]
        yield o, x
        for i, v in enumerate(x):
            hidden[i] = hidden[i] + _then(layer, o.linears[0], self.attention_output_norm, v)
        x = [mlp_norm(h) for h in hidden]
        yield gate_up, x
        with _bypassed(layer, down.linears[0]):
            x = [mlp(v) for v in x]
        yield down, x
        for i, v in enumerate(x):
            hidden[i] = hidden[i] + _then(layer, down.linears[0], self.mlp_output_norm, v)


class _bypassed:  # noqa: N801  a context manager reads like a function
    """Within the block, `path` passes its input through: what its parent returns is what `path` would have seen."""

    def __init__(self, layer: nn.Module, path: str) -> None:
        self.layer, self.path = layer, path

    def __enter__(self) -> None:
        self.module = self.layer.get_submodule(self.path)
        self.layer.set_submodule(self.path, nn.Identity())

    def __exit__(self, *_: object) -> None:
        self.layer.set_submodule(self.path, self.module)


def _then(layer: nn.Module, linear: str, norm: str | None, x: Tensor) -> Tensor:
    y: Tensor = layer.get_submodule(linear)(x)
    return y if norm is None else layer.get_submodule(norm)(y)


def _window_mask(tokens: int, window: int, device: torch.device) -> Tensor | None:
    """bool [1, 1, tokens, tokens], True where a query (row) sees a key; None where plain causal attention is meant."""
    if not 0 < window < tokens:
        return None
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position
    return ((distance >= 0) & (distance < window))[None, None]


def weight_of(module: nn.Module, path: str) -> Tensor:
    """The weight of the submodule at `path`, a view if it is float32 or float64, else a float32 copy."""
    weight = module.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight.detach() if weight.dtype == torch.float64 else weight.detach().float()


LLAMA = Family("llama", ("llama",))
QWEN2 = Family("qwen2", ("qwen2",))
QWEN3 = Family("qwen3", ("qwen3",), q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
MISTRAL = Family("mistral", ("mistral",))
PHI3 = Family(
    "phi3",
    ("phi3",),
    stages=(
        replace(STAGES[0], linears=("self_attn.qkv_proj",)),
        STAGES[1],
        replace(STAGES[2], linears=("mlp.gate_up_proj",)),
        STAGES[3],
    ),
)
GEMMA3 = Family(
    "gemma3",
    ("gemma3_text",),
    stages=(*STAGES[:2], replace(STAGES[2], fold_into="pre_feedforward_layernorm"), STAGES[3]),
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
    norm_offset=1.0,
    scaled_embedding=True,
)
GEMMA3_WITH_VISION = replace(GEMMA3, model_types=("gemma3",), decoder="model.language_model")  # its text part

FAMILIES = (LLAMA, QWEN2, QWEN3, MISTRAL, PHI3, GEMMA3, GEMMA3_WITH_VISION)
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Those whose frequencies do not depend on the prompt's length; those of longrope do not up to `longest_context`.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_UNSUPPORTED_SETTINGS = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


def family_of(config: Any) -> Family:
    """The family of a transformers config. Raises SpecQuantError for what cannot be exported, and says what can."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            break
    else:
        supported = ", ".join(t for f in FAMILIES for t in f.model_types)
        raise SpecQuantError(f"architecture '{config.model_type}' is not supported; supported: {supported}")
    text = text_config(config)
    what = f"of this {config.model_type} model is not supported"
    if activation_name(text) not in ACTIVATIONS:
        raise SpecQuantError(f"activation '{activation_name(text)}' {what}; supported: {', '.join(ACTIVATIONS)}")
    for rope in _rope_parameters(text):
        if (kind := rope.get("rope_type", "default")) not in _ROPE_TYPES:
            raise SpecQuantError(f"rotary type '{kind}' {what}; supported: {', '.join(_ROPE_TYPES)}")
        rotated = int(head_dim(text) * (rope.get("partial_rotary_factor") or 1.0))
        if head_dim(text) % 16 or rotated % 16:  # what GroupQueryAttention takes
            size = f"head_dim {head_dim(text)} ({rotated} of it rotated)"
            raise SpecQuantError(f"{size} {what}; both must be multiples of 16")
    for kind in getattr(text, "layer_types", None) or ():
        if kind not in _LAYER_TYPES:
            raise SpecQuantError(f"layer type '{kind}' {what}; supported: {', '.join(_LAYER_TYPES)}")
    for setting in _UNSUPPORTED_SETTINGS:
        if getattr(text, setting, None):
            raise SpecQuantError(f"{setting} {what}; it must be off")
    return family


def text_config(config: Any) -> Any:
    """The language model's part of a transformers config: all of it, but for models that also see."""
    return config.get_text_config()


def activation_name(config: Any) -> str:
    """The activation as a transformers config names it: Gemma calls the setting otherwise than the others."""
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu"))


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def longest_context(config: Any) -> int:
    """Tokens that one rotary table serves: the model's context, or for longrope what its short factors are for."""
    short = [
        rope["original_max_position_embeddings"]
        for rope in _rope_parameters(config)
        if rope.get("rope_type") == "longrope"
    ]
    return int(min([config.max_position_embeddings, *short]))


def rotary_kinds(config: Any) -> list[str | None]:
    """One entry a rotary table: the kinds of layer, where each has a table of its own (Gemma 3), else [None]."""
    nested = any(isinstance(v, dict) for v in (config.rope_parameters or {}).values())
    return sorted(set(config.layer_types)) if nested else [None]


def layer_attention(config: Any) -> list[tuple[int, int]]:
    """(window, row of the rotary tables) of every layer; window 0 where a query sees all tokens before it.

    Without `layer_types` a sliding window holds for every layer (Mistral, Phi-3).
    """
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window, tables = getattr(config, "sliding_window", None) or 0, rotary_kinds(config)
    return [(window if k == "sliding_attention" else 0, tables.index(k) if k in tables else 0) for k in kinds]


def rotary_tables(base: nn.Module, family: Family, config: Any, x: Tensor, positions: Tensor) -> list[Any]:
    """(cos, sin) [1, tokens, rotary_dim] of every table, in x's dtype, scaling included, from the model's own module.

    positions int64 [1, tokens].
    """
    rotary = base.get_submodule(family.rotary)
    kinds = rotary_kinds(config)
    return [rotary(x, position_ids=positions, **({} if k is None else {"layer_type": k})) for k in kinds]


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [v for v in parameters.values() if isinstance(v, dict)]
    return nested or [parameters]
