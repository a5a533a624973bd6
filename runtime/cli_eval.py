"""`specquant eval`: what can be measured, a module each."""

from __future__ import annotations

COMMANDS = {
    "ppl": ("specquant.runtime.cli_ppl", "perplexity on a text"),
    "zeroshot": ("specquant.runtime.cli_zeroshot", "nine multiple-choice tasks, by lm-eval (needs the extra `eval`)"),
    "compare": ("specquant.runtime.cli_compare", "two models on a text: perplexity, KL divergence, agreement"),
}
EPILOG = """examples:
  specquant eval ppl build/smollm2 --text wiki.test.raw --record
  specquant eval zeroshot build/smollm2 --limit 100
  specquant eval compare sample build/smollm2 --text wiki.test.raw --windows 20

`specquant eval COMMAND --help` says more of each.
"""
