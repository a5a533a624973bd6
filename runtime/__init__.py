"""Artifacts on the end user's device: load, generate, evaluate. Needs numpy, tokenizers and one onnxruntime.

from specquant.runtime import load
model = load("smollm2")
for piece in model.generate("The capital of France is", max_new_tokens=20):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specquant.runtime.generate import Model
    from specquant.runtime.session import load

    __version__: str

__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> object:
    # Each name is imported on first use: `import specquant.runtime` itself loads nothing.
    if name == "load":
        from specquant.runtime.session import load

        return load
    if name == "Model":
        from specquant.runtime.generate import Model

        return Model
    if name == "__version__":
        from specquant.runtime.stats import version

        return version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
