#!/usr/bin/env bash
# On a machine with an RTX GPU, or with TensorRT: builds engines of both profiles, compares their logits and text with
# ONNX Runtime's, and times them.   tools/verify_tensorrt.sh [ARTIFACT…]   (default: exports SmolLM2 to build/verify, 10
# minutes once, and for Int4KVAttention with a 4-bit cache to build/verify-kv4, rounded to nearest, 1 minute)
# TARGETS: tensorrt-rtx, tensorrt or both; default, those whose Python module is installed. PROFILES: portable, custom.
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
"$bin/specquant" --version

targets=()
for target in ${TARGETS:-tensorrt-rtx tensorrt}; do
  module=${target//-/_}
  if "$bin/python" -c "import $module as t; print('$module', t.__version__)" 2>"$work/why"; then
    targets+=("$target")
  else
    echo "== $target left out: $(tail -1 "$work/why")"
  fi
done
[ ${#targets[@]} -gt 0 ] || {
  echo "install one: $bin/python -m pip install -c constraints.txt -e '.[tensorrt-rtx]', or '.[tensorrt]'" >&2; exit 1; }

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
  tests/custom_ops/test_tensorrt.py tests/custom_ops/test_tensorrt_plugins.py tests/custom_ops/test_cuda_branch.py \
  tests/custom_ops/test_tensorrt_enqueue.py tests/custom_ops/test_tensorrt_attention.py

read -ra profiles <<<"${PROFILES:-portable custom}"
if [[ " ${profiles[*]} " == *" custom "* ]] &&
  ! "$bin/python" -c 'from specquant.custom_ops.library_tensorrt import library_path; library_path()' 2>"$work/why"; then
  echo "== custom profile left out: $(tail -1 "$work/why")"
  profiles=(portable)
fi

build() { # TARGET ARTIFACT PROFILE ENGINE [OPTION…]
  local gpu=()
  [ "$1" = tensorrt ] || gpu=(--gpu "sm$capability")
  "$bin/specquant" build "$2" --target "$1" "${gpu[@]}" --profile "$3" --max-batch 4 --max-seq 1024 -o "$4" --json \
    "${@:5}" | grep -A5 '"plugins"'
}

for target in "${targets[@]}"; do for artifact in "${artifacts[@]}"; do for profile in "${profiles[@]}"; do
  engine=$work/$target-$(basename "$artifact")-$profile
  echo "== $target, $artifact, $profile: build"
  build "$target" "$artifact" "$profile" "$engine"
  echo "== $target, $artifact, $profile: against ONNX Runtime on the CPU"
  "$bin/python" -m tools.verify_tensorrt "$artifact" "$engine"
  if [ "$target" = tensorrt-rtx ]; then
    echo "== $target, $artifact, $profile: once more, with the kernels that were compiled"
    "$bin/python" -m tools.verify_tensorrt "$artifact" "$engine" --cached
  fi
done; done; done

if [[ " ${profiles[*]} " == *" custom "* ]]; then
  target=${targets[0]} artifact=${artifacts[0]}
  for option in --embed-plugins --copy-plugins; do
    engine=$work/with$option
    echo "== $target, $artifact, custom, $option: build"
    build "$target" "$artifact" custom "$engine" "$option"
    if "$bin/python" -m tools.verify_tensorrt "$artifact" "$engine" 2>"$work/why"; then
      echo "host code ran although it was not allowed" >&2; exit 1
    fi
    grep -q allow-host-code "$work/why" || { cat "$work/why" >&2; exit 1; }
    "$bin/python" -m tools.verify_tensorrt "$artifact" "$engine" --allow-host-code
  done
fi
echo "== all agreed"
