#!/usr/bin/env bash
# On a machine with an RTX GPU: builds both kinds of engine, compares their logits and text with ONNX Runtime's, and times
# them.   tools/verify_tensorrt.sh [ARTIFACT]   (default: exports SmolLM2 to build/verify, 10 minutes once, and for
# Int4KVAttention with a 4-bit cache to build/verify-kv4, rounded to nearest, 1 minute)
# The custom profile needs libspecquant_trt.so (docs/tensorrt.md, "Plugins"); without it, it is left out, and it says so.
# Exit code 0: all that ran agreed. 1: something did not, or nothing could run.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

command -v nvidia-smi >/dev/null || { echo "no nvidia-smi: this is for a machine with an NVIDIA GPU" >&2; exit 1; }
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -1
"$bin/python" -c 'import tensorrt_rtx as t; print("tensorrt_rtx", t.__version__)' || {
  echo "install it: $bin/python -m pip install -c constraints.txt -e '.[tensorrt-rtx]'" >&2; exit 1; }

artifacts=("$@")
if [ $# = 0 ]; then
  artifacts=(build/verify build/verify-kv4)
  quick=(--kv-bits 4 --rounding rtn --asymmetry 0 --no-smooth --samples 8 --sequence-length 128)
  [ -f build/verify/specquant.json ] || "$bin/specquant" export sample -o build/verify --float-type float16
  [ -f build/verify-kv4/specquant.json ] ||
    "$bin/specquant" export sample -o build/verify-kv4 --float-type float16 "${quick[@]}"
fi

echo "== tests that need no GPU, and those that do"
"$bin/python" -m pytest -q tests/exporter/lowering tests/exporter/test_engine.py tests/runtime/test_tensorrt.py \
  tests/custom_ops/test_tensorrt.py tests/custom_ops/test_tensorrt_plugins.py \
  tests/custom_ops/test_tensorrt_enqueue.py tests/custom_ops/test_tensorrt_attention.py

profiles=(portable)
if "$bin/python" -c 'from specquant.custom_ops.library_tensorrt import library_path; library_path()' 2>"$work/why"; then
  profiles+=(custom)
else
  echo "== custom profile left out: $(tail -1 "$work/why")"
fi

for artifact in "${artifacts[@]}"; do for profile in "${profiles[@]}"; do
  echo "== $artifact, $profile: build for sm$capability"
  engine=$work/$(basename "$artifact")-$profile
  "$bin/specquant" build "$artifact" --gpu "sm$capability" --profile "$profile" --max-batch 4 --max-seq 1024 \
    -o "$engine" --json | grep -A5 '"plugins"'
  echo "== $artifact, $profile: against ONNX Runtime on the CPU"
  "$bin/python" - "$artifact" "$engine" <<'PY'
import sys
from time import perf_counter

import numpy as np

from specquant.runtime.session import load

folder, engine = sys.argv[1:]
cpu, gpu = load(folder, context=1024), load(folder, backend="tensorrt", engine=engine)
rng = np.random.default_rng()
ids = rng.integers(3, cpu.manifest.model.vocab_size, 700)  # more than a block: the cache is appended to
expected, actual = cpu.logits(ids), gpu.logits(ids)
error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
same = float((actual.argmax(-1) == expected.argmax(-1)).mean())
# Portable engines do not round activations, and custom ones round a few of them to the other side.
bound = {16: 0.02, 8: 0.03}.get(min(layer.act_bits for layer in cpu.manifest.layers), 0.15)
if cpu.manifest.model.kv_bits == 4:  # in portable engines the cache is of floats
    bound = 0.15
print(f"relative difference of the logits {error:.4f} (at most {bound}), same likeliest token {same:.1%}")

prompts = ["The capital of France is", "Once upon a time", "Water boils at"]
texts = [model.generate_batch(prompts, max_new_tokens=32) for model in (cpu, gpu)]
for prompt, one, other in zip(prompts, *texts):
    print(f"  {prompt!r}\n    ORT      {one!r}\n    TensorRT {other!r}")

sequences = gpu._backend.sequences(1)
sequences.prefill_last(0, ids[:512])  # compiles kernels
sequences.rewind(0, 0)
since = perf_counter()
sequences.prefill_last(0, ids[:512])
prefill = perf_counter() - since
token = np.array([5])
for _ in range(8):
    sequences.decode(token)
since = perf_counter()
for _ in range(128):
    sequences.decode(token)
decode = perf_counter() - since
print(f"prefill of 512 tokens: {512 / prefill:,.0f} tokens/s; decode at batch 1: {128 / decode:,.0f} tokens/s")
sys.exit(0 if np.isfinite(actual).all() and error <= bound else 1)
PY
done; done
echo "== all agreed"
