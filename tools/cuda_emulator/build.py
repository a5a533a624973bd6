"""Compile the CUDA kernels for the CPU, where their tests then run without a GPU.

    python tools/cuda_emulator/build.py /tmp/emulated
    SPECQUANT_CUDA_EMULATED=1 SPECQUANT_CUDA_LIBRARY=/tmp/emulated/libspecquant_cuda.so \\
        python -m pytest tests/custom_ops/test_cuda_kernels.py

Needs g++ and the headers of the CUDA toolkit (--include). The sources are the kernels' own: launches, shared memory and
two lines of inline assembly are rewritten, and emulator.h and ptx.cuh stand in for the compiler and its instructions.
Says nothing about speed, and finds no race between blocks.
"""

from __future__ import annotations

import argparse
import re
import shutil
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for libspecquant_cuda.so and what it is made of")
    parser.add_argument("--include", type=Path, default=Path("/usr/local/cuda/include"), help="default: %(default)s")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    args = parser.parse_args()
    if not (args.include / "cuda_fp16.h").is_file():
        print(f"{args.include} holds no cuda_fp16.h; name the toolkit's folder with --include", file=sys.stderr)
        return 2
    work = args.output
    work.mkdir(parents=True, exist_ok=True)
    # The emulator's files last: launch.h and the two of instructions take the place of the kernels' own.
    own = [*KERNELS.glob("*.h"), *KERNELS.glob("*.cc")]
    for path in [*own, *HERE.glob("*.h"), *HERE.glob("*.cc"), *HERE.glob("*.cuh")]:
        shutil.copy(path, work)
    for path in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")]:
        if not (HERE / path.name).exists():
            target = path.name if path.suffix == ".cuh" else f"{path.name}.cc"
            (work / target).write_text(translated(path.read_text(encoding="utf-8")), encoding="utf-8")
    flags = ["-std=c++17", "-O2", "-g", "-fPIC", "-w", "-ffp-contract=off", "-fno-strict-aliasing"]
    flags += ["-I.", f"-I{args.include}"]
    if args.sanitize:
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    objects = []
    for source in sorted(work.glob("*.cc")):
        objects.append(f"{source.name}.o")
        subprocess.run(["g++", *flags, "-c", source.name, "-o", objects[-1]], cwd=work, check=True)
    subprocess.run(["g++", *flags, "-shared", *objects, "-o", "libspecquant_cuda.so"], cwd=work, check=True)
    print(work / "libspecquant_cuda.so")
    return 0


if __name__ == "__main__":
    sys.exit(main())
