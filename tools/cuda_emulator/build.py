"""Compile the CUDA kernels for the CPU, where their tests then run without a GPU.

    python tools/cuda_emulator/build.py /tmp/emulated
    SPECQUANT_CUDA_EMULATED=1 SPECQUANT_CUDA_LIBRARY=/tmp/emulated/libspecquant_cuda.so \\
        python -m pytest tests/custom_ops/test_cuda_kernels.py tests/custom_ops/test_cuda_attention.py

Needs g++ and the headers of the CUDA toolkit (--include). The sources are the kernels' own: launches, shared memory and
two lines of inline assembly are rewritten, and emulator.h and ptx.cuh stand in for the compiler and its instructions.
Says nothing about speed, and finds no race between blocks.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "custom_ops" / "kernels" / "cuda"


def translated(source: str) -> str:
    """CUDA C++ as C++."""

    def launch(match: re.Match[str]) -> str:
        kernel, parameters, arguments = match.groups()
        grid, block, shared = (part.strip() for part in parameters.split(",")[:3])
        body = f"auto body = [&] {{ {kernel}({arguments}); }};"
        return f"{{ {body} emulator::launch(dim3({grid}), dim3({block}), {shared}, body); }}"

    source = re.sub(r"([\w:]+(?:<[^<>;]*>)?)<<<(.*?)>>>\((.*?)\);", launch, source, flags=re.S)
    source = re.sub(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];", r"EMULATED_SHARED(\1, \2);", source)
    source = re.sub(r'asm volatile\("mov.b32 %0, (0x\w+);" : "=r"\((.*?)\)\);', r"\2 = \1;", source)
    source = re.sub(r"cudaFuncSetAttribute\([^;]*\)", "cudaSuccess", source)
    return '#include "emulator.h"\n' + source


def _current(work: Path, target: str, flags: list[str]) -> bool:
    """Whether an object is newer than all that it was made from, by the same flags."""
    stem = target.removesuffix(".o")
    rule, kept = work / f"{stem}.d", work / f"{stem}.flags"
    if not (work / target).is_file() or not rule.is_file() or not kept.is_file() or kept.read_text() != " ".join(flags):
        return False
    sources = rule.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    made = (work / target).stat().st_mtime
    return all((work / source).is_file() and (work / source).stat().st_mtime <= made for source in sources)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for libspecquant_cuda.so and what it is made of")
    parser.add_argument("--include", type=Path, default=Path("/usr/local/cuda/include"), help="default: %(default)s")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("--ort", action="store_true", help="also the ONNX Runtime library, for sessions on the CPU")
    args = parser.parse_args()
    if not (args.include / "cuda_fp16.h").is_file():
        print(f"{args.include} holds no cuda_fp16.h; name the toolkit's folder with --include", file=sys.stderr)
        return 2
    work = args.output
    work.mkdir(parents=True, exist_ok=True)
    # The emulator's files last: launch.h and the two of instructions take the place of the kernels' own.
    texts = {path.name: path.read_text(encoding="utf-8") for path in [*KERNELS.glob("*.h"), *KERNELS.glob("*.cc")]}
    for path in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")]:
        target = path.name if path.suffix == ".cuh" else f"{path.name}.cc"
        texts[target] = translated(path.read_text(encoding="utf-8"))
    for path in [*HERE.glob("*.h"), *HERE.glob("*.cc"), *HERE.glob("*.cuh")]:
        texts[path.name] = path.read_text(encoding="utf-8")
    for name, text in texts.items():
        if not (work / name).is_file() or (work / name).read_text(encoding="utf-8") != text:
            (work / name).write_text(text, encoding="utf-8")
    flags = ["-std=c++17", "-O2", "-g", "-fPIC", "-w", "-ffp-contract=off", "-fno-strict-aliasing"]
    flags += ["-I.", f"-I{args.include}"]
    if args.sanitize:
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    objects = []
    for source in sorted(name for name in texts if name.endswith(".cc")):
        objects.append(f"{source}.o")
        if not _current(work, objects[-1], flags):
            command = ["g++", *flags, "-MMD", "-MF", f"{source}.d", "-c", source, "-o", objects[-1]]
            subprocess.run(command, cwd=work, check=True)
            (work / f"{source}.flags").write_text(" ".join(flags), encoding="utf-8")
    subprocess.run(["g++", *flags, "-shared", *objects, "-o", "libspecquant_cuda.so"], cwd=work, check=True)
    print(work / "libspecquant_cuda.so")
    if args.ort:
        _build_ort(work)
        print(work / "libspecquant_cpu.so")
    return 0


def _build_ort(work: Path) -> None:
    """The ONNX Runtime library, its CUDA ops on the CPU provider: such sessions then run the kernels in `work`."""
    ops = KERNELS.parents[1]
    common = ["matmul", "few_tokens", "workers", "attention", "select", "cpu_features", "c_api", "scalar"]
    sources = [*(ops / "ort").glob("*.cc"), *(ops / "kernels" / "cpu" / f"{name}.cc" for name in common)]
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-w", "-ffp-contract=off", "-shared", "-ldl", "-pthread"]
    flags += [f"-I{ops / 'kernels' / 'cpu'}", f"-I{KERNELS}", '-DSPECQUANT_CUDA_PROVIDER="CPUExecutionProvider"']
    subprocess.run(["g++", *sorted(map(str, sources)), *flags, "-o", work / "libspecquant_cpu.so"], check=True)


if __name__ == "__main__":
    sys.exit(main())
