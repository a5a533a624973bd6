"""Does ONNX Runtime compute what the quantised model means? An artifact against its own numbers run in PyTorch.

    python tools/check_artifact.py build/smollm2 sample --text wiki.test.raw --windows 4

The integers, scales and branches are read back from model.onnx, put into the transformers model that the artifact
was made from, and run there by exporter/simulate.py: none of our kernels, nor ONNX Runtime, has a part in that side.
Prints perplexity of both and, for ten prompts, whether 64 tokens of greedy continuation are the same. Exit code 0 if
perplexity agrees within 0.5 % and nine of the ten are.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from specquant.custom_ops.packing import unpack_group_scales, unpack_int4
from specquant.exporter.decoder import FloatLinear, QuantLinear
from specquant.exporter.families import family_of
from specquant.exporter.head import DIGIT
from specquant.exporter.kv import set_key_offset, use_half_cache, use_int4_cache
from specquant.exporter.simulate import sim_linears
from specquant.exporter.sources import load_model, resolve
from specquant.runtime import load
from specquant.runtime.cli_common import Progress
from specquant.runtime.perplexity import perplexity

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "In 1969, the first human",
    "The three primary colours are",
    "To make bread you need flour,",
    "Photosynthesis is the process by which",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The main difference between a frog and a toad is",
    "Dear Sir or Madam,\n\nI am writing to",
)


class Twice(torch.nn.Module):
    """`inner` of x beside x / 16."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(torch.cat([x, x / DIGIT], dim=-1))


def simulated(folder: Path, source: str) -> torch.nn.Module:
    """The artifact's numbers in the transformers model of `source`."""
    model, _ = load_model(resolve(source), "float32")
    family = family_of(model.config)
    graph = ir.load(folder / "model.onnx").graph
    values = {name: value.const_value for name, value in graph.initializers.items()}
    nodes = {node.name: node for node in graph if node.domain == "specquant"}

    def array(name: str) -> np.ndarray:
        return np.array(values[name].numpy())

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(array(name)).float()

    def quantised(name: str, parts: dict[str, int], n: int) -> QuantLinear:
        at = {key: attribute.value for key, attribute in nodes[name].attributes.items()}
        branch, m = f"{name}.coef" in values, sum(parts.values())
        # With a gate, gates and ups take turns there.
        order = np.arange(m).reshape(-1, 2).T.reshape(-1) if at.get("gate", 0) else np.arange(m)
        return QuantLinear(
            name,
            parts,
            unpack_int4(array(f"{name}.qweight"), n, m)[:, order],
            unpack_group_scales(array(f"{name}.group_scales"), n // (at["group_size"] or n), m)[:, order],
            array(f"{name}.scales")[order],
            at["group_size"],
            at["act_bits"],
            at["act_group"],
            array(f"{name}.basis") if branch else None,
            array(f"{name}.coef")[:, order] if branch else None,
            bool(at.get("subtract", 0)),
            array(f"{name}.bias")[order] if f"{name}.bias" in values else None,
            at["hadamard"],
            at["act_clip"],
        )

    caches = [node for node in graph if node.op_type == "Int4KVAttention"]
    if caches:
        use_int4_cache(model, float(caches[0].attributes["clip"].value))
    if any(node.op_type == "HalfKVAttention" for node in graph):
        use_half_cache(model)
    base = model.get_submodule(family.decoder)
    base.get_submodule(family.embedding).weight.data = tensor("model.embed_tokens.weight")
    if "lm_head" in nodes:
        head = model.get_submodule(family.lm_head)
        twice = 8 * int(values["lm_head.qweight"].shape[1]) == 2 * head.in_features  # 8 bits: exporter/head.py
        inputs = (2 if twice else 1) * head.in_features
        inner = sim_linears(quantised("lm_head", {"lm_head": head.out_features}, inputs))["lm_head"]
        model.set_submodule(family.lm_head, Twice(inner) if twice else inner)
    else:
        name = "lm_head.weight" if "lm_head.weight" in values else "model.embed_tokens.weight"
        model.get_submodule(family.lm_head).weight.data = tensor(name)
    # The op of an 8-bit head norms the hidden state twice over (docs/formats.md): the first half is the norm's own.
    family.set_norm(base, family.final_norm, tensor("model.norm.weight")[: model.config.get_text_config().hidden_size])
    for index, layer in enumerate(base.get_submodule(family.layers).children()):
        for field, path in family.norms.items():
            family.set_norm(layer, path, tensor(f"model.layers.{index}.{field}.weight"))
        if caches:
            offset = caches[index].inputs[-1]
            assert offset is not None
            assert offset.const_value is not None
            set_key_offset(layer.get_submodule(family.attention), np.array(offset.const_value.numpy()))
        for stage in family.stages:
            name = f"{family.decoder}.{family.layers}.{index}.{stage.path}"
            parts = {path: layer.get_submodule(path).out_features for path in stage.linears}
            if name not in nodes:
                bias = array(f"{name}.bias") if f"{name}.bias" in values else None
                linear: Any = FloatLinear(name, parts, array(f"{name}.weight"), bias)
            else:
                linear = quantised(name, parts, layer.get_submodule(stage.linears[0]).in_features)
            for path, module in sim_linears(linear).items():
                layer.set_submodule(path, module)
    return model.eval()


@torch.inference_mode()
def greedy(model: torch.nn.Module, ids: list[int], count: int, eos: list[int]) -> list[int]:
    out, past, new = [], None, torch.tensor([ids])
    while len(out) < count:
        result = model(new, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = result.past_key_values
        out.append(int(result.logits[0, -1].argmax()))
        if out[-1] in eos:
            break
        new = torch.tensor([[out[-1]]])
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("source", help="what it was exported from, as given to `specquant export`")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, help="of 2,048 tokens (default: all)")
    parser.add_argument("--tokens", type=int, default=64, help="of greedy continuation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours, theirs = load(args.artifact, threads=args.threads, exact_logits=True), simulated(args.artifact, args.source)

    ids = ours.encode(args.text.read_bytes().decode(), add_special_tokens=False)
    windows = min(args.windows or len(ids), len(ids) // 2048)

    @torch.inference_mode()
    def logits(tokens: np.ndarray) -> np.ndarray:
        return theirs(torch.from_numpy(tokens)[None]).logits[0].numpy()

    results = {}
    for name, function in (("onnxruntime", ours.logit_blocks), ("simulation", logits)):
        with Progress(name, windows, "windows", quiet=False) as progress:
            results[name] = perplexity(function, ids, 2048, windows, progress.update).perplexity
    eos, same = ours.manifest.model.eos_token_ids, 0
    for prompt in PROMPTS:
        start = [int(i) for i in ours.encode(prompt)]
        text = ours.generate_batch([prompt], max_new_tokens=args.tokens)[0]
        other = greedy(theirs, start, args.tokens, eos)
        same += text == "".join(ours.tokenizer.decode([i for i in other if i not in eos]))
    off = abs(results["onnxruntime"] / results["simulation"] - 1)
    good = off <= 0.005 and same >= 9
    print(json.dumps(results | {"windows": windows, "relative_difference": off, "greedy_equal": same, "ok": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
