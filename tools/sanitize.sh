#!/bin/sh
# The kernels and their ONNX Runtime binding under AddressSanitizer and UndefinedBehaviorSanitizer: builds them apart,
# then runs their tests. Usage: tools/sanitize.sh [python]
set -eu
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
cmake -S . -B build/sanitize -DCMAKE_BUILD_TYPE=Release -DSPECQUANT_SANITIZE=ON >/dev/null
cmake --build build/sanitize -j 2

# Python itself is not instrumented: the runtime comes first, leaks of the interpreter are not ours to report, and
# shared libraries may throw before the runtime has found __cxa_throw, so libstdc++ is loaded beside it.
export SPECQUANT_LIBRARY="$PWD/build/sanitize/custom_ops/libspecquant_cpu.so"
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
exec "$python" -m pytest -q -p no:cacheprovider \
  tests/custom_ops/test_kernels.py tests/custom_ops/test_kernel_tiles.py tests/custom_ops/test_prologue.py tests/custom_ops/test_gate.py \
  tests/custom_ops/test_ort_ops.py tests/custom_ops/test_attention.py tests/custom_ops/test_threads.py -k "not race"
