"""The NEON kernels, as CMake builds them for aarch64, under qemu: the other tests of the kernels once more.

Needs Debian's g++-aarch64-linux-gnu, qemu-user-static and cmake.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64-static", "/usr/aarch64-linux-gnu"
CHOSEN = "not (scalar and kernel_tiles)"  # half of the time, and compiled from the same text as on this machine
TESTS = ["test_kernels.py", "test_kernel_tiles.py", "test_attention.py", "test_prologue.py", "test_gate.py"]

missing = [tool for tool in (COMPILER, EMULATOR, "cmake") if not shutil.which(tool)]
if missing:
    pytest.skip(f"{', '.join(missing)} not installed: apt-get install g++-aarch64-linux-gnu qemu-user-static cmake",
                allow_module_level=True)  # fmt: skip
if platform.machine() == "aarch64":
    pytest.skip("the other tests run on this CPU itself", allow_module_level=True)


def run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/emulated.cc over the library, both compiled for aarch64."""
    build = tmp_path_factory.mktemp("aarch64")
    system = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}")
    run("cmake", "-S", ROOT, "-B", build, *system, "-DCMAKE_BUILD_TYPE=Release", "-DSPECQUANT_CUDA=OFF")
    run("cmake", "--build", build, "--target", "specquant_cpu", "-j2")
    program, folder = build / "driver", build / "custom_ops"
    source = ROOT / "tests" / "emulated.cc"
    run(COMPILER, "-std=c++17", "-O2", source, "-o", program, f"-L{folder}", "-lspecquant_cpu", f"-Wl,-rpath,{folder}")
    return program


@pytest.mark.parametrize(
    ("cpu", "isas"), [("max", {"scalar", "neon", "dotprod", "i8mm"}), ("cortex-a72", {"scalar", "neon"})]
)
def test_kernels_under_emulation(driver: Path, cpu: str, isas: set[str]) -> None:
    """qemu's CPU with every extension, and a Raspberry Pi 4's: the second must find that it lacks the dot products."""
    command = f"{EMULATOR} -cpu {cpu} -L {LIBRARIES} {driver}"
    tests = [str(ROOT / "tests" / "custom_ops" / name) for name in (TESTS if cpu == "max" else TESTS[:1])]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "tests.emulated", "-p", "no:cacheprovider", "-k", CHOSEN, *tests],
        env=os.environ | {"SPECQUANT_EMULATED": command, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    passed = "".join(line for line in done.stdout.splitlines() if "PASSED" in line)
    assert {isa for isa in ("scalar", "neon", "dotprod", "i8mm") if re.search(rf"\b{isa}\b", passed)} == isas
