"""What it costs to leave out second digits of an 8-bit head (docs/formats.md): exact logits beside the usual ones.

A text is fed one token at a time to two sessions of one artifact, of which one reads all of its head. Printed are the
mean and the largest KL divergence of the next token's distribution, in nats, how often the likeliest token is the
same, the share of logits that stayed at their first digit, and the mean time of a token with either.

    python tools/head_digits.py build/smollm2 --text wiki.test.raw --tokens 512
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from specquant.runtime import load


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--json", action="store_true", help="one object instead of lines")
    args = parser.parse_args()
    models = [load(args.artifact, threads=args.threads, exact_logits=exact) for exact in (True, False)]
    ids = models[0].encode(args.text.read_text(encoding="utf-8")[: 20 * args.tokens])[: args.tokens]
    sequences = [model.sequences() for model in models]
    for one in sequences:
        one.prefill_last(0, np.array(ids[:1]))
    divergence, same, left_out, seconds = [], [], [], np.zeros(2)
    for token in ids[1:]:
        logits = []
        for i, one in enumerate(sequences):
            since = time.perf_counter()
            logits.append(one.decode(np.array([token]))[0].copy())
            seconds[i] += time.perf_counter() - since
        exact, usual = (log_softmax(row) for row in logits)
        divergence.append(float((np.exp(exact) * (exact - usual)).sum()))
        same.append(logits[0].argmax() == logits[1].argmax())
        left_out.append(np.mean(logits[0] != logits[1]))
    found = {
        "tokens": len(same),
        "kl_mean": np.mean(divergence),
        "kl_max": max(divergence),
        "same_likeliest": np.mean(same),
        "first_digit_only": np.mean(left_out),
        "exact_ms": 1e3 * seconds[0] / len(same),
        "usual_ms": 1e3 * seconds[1] / len(same),
    }
    if args.json:
        print(json.dumps({name: float(value) for name, value in found.items()}))
    else:
        print("\n".join(f"{name:16s} {float(value):.4g}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
