#!/usr/bin/env bash
# Does optimum load an artifact and generate the same text as our runtime?   tools/check_optimum.sh build/smollm2
# optimum-onnx pins an old transformers, so it gets an environment of its own (build/optimum; about 3 minutes once).
set -euo pipefail
artifact=$(cd "$1" && pwd); cd "$(dirname "$0")/.."
env=build/optimum
if [ ! -f "$env/.ready" ]; then
  python3 -m venv "$env"
  "$env/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 optimum-onnx==0.1.0 "transformers<4.58" onnxruntime==1.31.1
  touch "$env/.ready"
fi
prompt="The capital of France is"
ours=$(.venv/bin/specquant generate "$artifact" "$prompt" -n 24 -q --no-custom-ops)
theirs=$("$env/bin/python" - "$artifact" "$prompt" <<'PY'
import sys
import onnxruntime
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

folder, prompt = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
tokenizer = AutoTokenizer.from_pretrained(folder)
model = ORTModelForCausalLM.from_pretrained(folder, session_options=options, use_io_binding=False)
ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=True)
out = model.generate(**ids, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True), end="")
PY
)
printf 'ours:    %s\noptimum: %s\n' "${ours//$'\n'/\\n}" "${theirs//$'\n'/\\n}"
[ "$ours" = "$theirs" ]
