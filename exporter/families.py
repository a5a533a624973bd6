"""One row per architecture family: which linears share an input, what smoothing folds into, what its graph needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from specquant.custom_ops.errors import SpecQuantError


@dataclass(frozen=True)
class Stage:
    """Linears of a block that share one input, in the order the block computes them.

    `fold` says where the inverse of a smoothing factor goes: into the weight of the norm before (`norm`), or into the
    output channels of an earlier linear: `heads` (v_proj, one factor per value channel), `rows` (up_proj).
    """

    name: str
    linears: tuple[str, ...]
    fold: Literal["norm", "heads", "rows"]
    fold_into: str

    @property
    def path(self) -> str:
        """Where a person looks for it in the block: `self_attn.qkv_proj`."""
        return f"{self.linears[0].rsplit('.', 1)[0]}.{self.name}"


@dataclass(frozen=True)
class Family:
    """Module paths of a decoder-only architecture as transformers names them."""

    name: str
    model_types: tuple[str, ...]
    stages: tuple[Stage, ...]
    decoder: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    final_norm: str = "norm"
    lm_head: str = "lm_head"
    rotary: str = "rotary_emb"
    input_norm: str = "input_layernorm"
    attention: str = "self_attn"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")

    def stage_inputs(self, layer: nn.Module, hidden: list[Tensor], rope: Any) -> Iterator[tuple[Stage, list[Tensor]]]:
        """Run a block stage by stage over chunks of hidden states (each [batch, tokens, hidden]).

        Yields every stage with its inputs. Before asking for the next, the caller may replace the stage's linears and,
        where it folded a smoothing factor, must divide the inputs by it in place: the block goes on from them.
        At the end `hidden` holds the block's outputs.
        """
        qkv, o, gate_up, down = self.stages
        attention, mlp = layer.get_submodule(self.attention), layer.get_submodule(self.mlp)
        norm, mlp_norm = layer.get_submodule(self.input_norm), layer.get_submodule(self.mlp_norm)

        x = [norm(h) for h in hidden]
        yield qkv, x
        with _bypassed(layer, o.linears[0]):
            x = [attention(hidden_states=v, position_embeddings=rope, attention_mask=None)[0] for v in x]
        yield o, x
        for i, v in enumerate(x):
            hidden[i] = hidden[i] + layer.get_submodule(o.linears[0])(v)
        x = [mlp_norm(h) for h in hidden]
        yield gate_up, x
        with _bypassed(layer, down.linears[0]):
            x = [mlp(v) for v in x]
        yield down, x
        for i, v in enumerate(x):
            hidden[i] = hidden[i] + layer.get_submodule(down.linears[0])(v)


class _bypassed:  # noqa: N801  a context manager reads like a function
    """Within the block, `path` passes its input through: what its parent returns is what `path` would have seen."""

    def __init__(self, layer: nn.Module, path: str) -> None:
        self.layer, self.path = layer, path

    def __enter__(self) -> None:
        self.module = self.layer.get_submodule(self.path)
        self.layer.set_submodule(self.path, nn.Identity())

    def __exit__(self, *_: object) -> None:
        self.layer.set_submodule(self.path, self.module)


def weight_of(module: nn.Module, path: str) -> Tensor:
    """The weight of the submodule at `path`, as a plain float32 tensor (a view where it is float32 already)."""
    weight = module.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


LLAMA = Family(
    name="llama",
    model_types=("llama",),
    stages=(
        Stage(
            "qkv_proj",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "norm",
            "input_layernorm",
        ),
        Stage("o_proj", ("self_attn.o_proj",), "heads", "self_attn.v_proj"),
        Stage("gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "norm", "post_attention_layernorm"),
        Stage("down_proj", ("mlp.down_proj",), "rows", "mlp.up_proj"),
    ),
)

FAMILIES = (LLAMA,)


def family_of(config: Any) -> Family:
    """The family of a transformers config. Raises SpecQuantError for what cannot be exported, and says what can."""
    supported = ", ".join(t for f in FAMILIES for t in f.model_types)
    for family in FAMILIES:
        if config.model_type in family.model_types:
            break
    else:
        raise SpecQuantError(f"architecture '{config.model_type}' is not supported; supported: {supported}")
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        raise SpecQuantError(f"activation '{config.hidden_act}' of {config.model_type} is not supported; only silu is")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in family.rope_types:
        raise SpecQuantError(f"rotary type '{rope}' is not supported; supported: {', '.join(family.rope_types)}")
    return family
