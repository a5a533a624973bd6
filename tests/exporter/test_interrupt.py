"""A real `specquant-export` that is interrupted or killed while it writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from specquant.exporter.export import export
from specquant.exporter.recipe import float_recipe
from specquant.runtime.artifact import open_artifact

SIGNALS = {"SIGINT": 130, "SIGTERM": 130, "SIGKILL": -signal.SIGKILL}  # -> exit code
# Imports what takes seconds, then runs the command in a process of its own for each target, one after the other.
DRIVER = """
import os, sys
import specquant.exporter.export
from specquant.exporter.cli import main
from transformers import LlamaForCausalLM
for target in sys.argv[2:]:
    pid = os.fork()
    if pid == 0:
        sys.argv[1:] = [sys.argv[1], "-o", target, "--force", "--w-bits", "16", "--a-bits", "16", "-q"]
        os.dup2(os.open(target + ".stderr", os.O_WRONLY | os.O_CREAT), 2)
        sys.exit(main())
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    target: Path
    code: int
    stderr: str


def temporary_folder(target: Path) -> Path:
    """Waits until it is there: its name ends in the id of the process that writes it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if found := list(target.parent.glob(f".{target.name}.partial-*")):
            return found[0]
        time.sleep(0.001)
    raise TimeoutError(f"nothing is written to {target}")


@pytest.fixture(scope="module")
def ended(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Exports over an old artifact, each sent its signal as soon as its temporary folder is there."""
    targets = {name: tmp_path_factory.mktemp(name) / "model" for name in SIGNALS}
    for target in targets.values():
        export(str(model_folder), target, float_recipe("float16"))
    command = [sys.executable, "-c", DRIVER, str(model_folder), *map(str, targets.values())]
    results = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        try:
            for name, target in targets.items():
                os.kill(int(temporary_folder(target).name.rsplit("-", 1)[1]), getattr(signal, name))
                code = int(driver.stdout.readline())
                stderr = Path(f"{target}.stderr")
                results[name] = Ended(target, code, stderr.read_text())
                stderr.unlink()
        finally:
            driver.terminate()
    return results


@pytest.mark.parametrize("name", SIGNALS)
def test_the_old_artifact_stays(ended: dict[str, Ended], name: str) -> None:
    one = ended[name]
    assert one.code == SIGNALS[name], one.stderr
    assert open_artifact(one.target, verify=True).model.float_type == "float16"
    if name == "SIGKILL":
        assert one.stderr == ""
        assert len(list(one.target.parent.iterdir())) == 2
    else:
        assert one.stderr.strip() == "specquant-export: error: interrupted"
        assert list(one.target.parent.iterdir()) == [one.target]


def test_the_next_export_cleans_up_after_a_killed_one(ended: dict[str, Ended], model_folder: Path) -> None:
    target = ended["SIGKILL"].target
    export(str(model_folder), target, float_recipe(), force=True)
    assert open_artifact(target, verify=True).model.float_type == "float32"
    assert list(target.parent.iterdir()) == [target]
