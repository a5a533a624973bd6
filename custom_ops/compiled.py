"""Which of the compiled libraries this installation has."""

from __future__ import annotations

from importlib import resources

PARTS = {
    "CPU kernels": "libspecquant_cpu.so",
    "CUDA kernels": "libspecquant_cuda.so",
    "TensorRT plugins": "libspecquant_trt.so",
}


def compiled() -> str:
    """`with CPU kernels, CUDA kernels; without TensorRT plugins`, or such."""
    folder = resources.files("specquant.custom_ops")
    parts: dict[str, list[str]] = {"with": [], "without": []}
    for part, file in PARTS.items():
        parts["with" if folder.joinpath(file).is_file() else "without"].append(part)
    return "; ".join(f"{word} {', '.join(names)}" for word, names in parts.items() if names)
