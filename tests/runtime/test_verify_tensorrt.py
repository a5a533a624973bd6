"""What the comparison with an engine calls far apart; the script around it where there is no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra `cpu` is not installed")

from specquant.runtime.session import load
from tools.verify_tensorrt import agreement, largest_error, times

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "verify_tensorrt.sh"


def test_a_model_agrees_with_itself(folder: Path) -> None:
    model = load(folder)
    assert agreement(model, model, 40) == (0.0, 1.0)
    assert all(rate > 0 for rate in times(model, 20, 4))


def test_what_is_not_finite_is_far_apart(folder: Path) -> None:
    model = load(folder)
    broken: Any = SimpleNamespace(logits=lambda ids: np.full((len(ids), 320), np.nan, np.float32))
    assert agreement(model, broken, 40)[0] == np.inf


def test_the_bound_is_the_coarsest_steps(folder: Path) -> None:
    manifest = load(folder).manifest
    layers = [replace(layer, act_bits=bits) for layer, bits in zip(manifest.layers, (16, 8), strict=False)]
    assert largest_error(replace(manifest, layers=layers)) == 0.03
    assert largest_error(replace(manifest, layers=layers, model=replace(manifest.model, kv_bits=4))) == 0.15


def test_without_a_gpu_the_script_says_so() -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU")
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stderr) == (1, "no nvidia-smi: this is for a machine with an NVIDIA GPU\n")
