"""Sessions whose ops have threads of their own (kernels/cpu/workers.h), and what they leave out of a head."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from specquant.custom_ops import library
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import pack_group_scales, pack_int4
from specquant.custom_ops.schema import PROLOGUES
from tests.ops import op_model, random_weights

ort = pytest.importorskip("onnxruntime")
try:
    ISAS = [name for name, supported in library.isas().items() if supported]
except SpecQuantError as missing:
    pytest.skip(str(missing), allow_module_level=True)

ROOT = Path(__file__).parents[2]
GROUPS = {"group_size": 64, "act_group": 64}
HEAD = GROUPS | {"act_bits": 8, "prologue": PROLOGUES.index("rms_norm"), "epsilon": 1e-5}


def session(model: onnx.ModelProto, threads: int = 0, within: float = 0.0) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    library.register(options, threads, within)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def linear(rng: np.random.Generator, m: int = 1000) -> onnx.ModelProto:
    weights = random_weights(rng, "SpecQuantMatMul", 512, m, 31, 64)
    attributes = {"act_bits": 8, "act_clip": 1.0, "hadamard": 64, "subtract": 1, "prologue": 0, "epsilon": 1e-5}
    return op_model("SpecQuantMatMul", 512, weights, np.float32, GROUPS | attributes)


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_of_ours_change_no_bit(rng: np.random.Generator, threads: int) -> None:
    model = linear(rng)
    one, ours = session(model), session(model, threads)
    for tokens in (1, 1, 1, 2, 8, 1, 9, 70, 1, 300):
        x = rng.standard_normal((1, tokens, 512)).astype(np.float32)
        np.testing.assert_array_equal(one.run(None, {"x": x})[0], ours.run(None, {"x": x})[0])


def test_runs_of_one_session_at_the_same_time(rng: np.random.Generator) -> None:
    """Whoever comes second works alone, and nobody waits for ever."""
    model = linear(rng)
    one, ours = session(model), [session(model, 3), session(model, 3)]
    inputs = [rng.standard_normal((1, tokens, 512)).astype(np.float32) for tokens in (1, 3, 40, 1)]
    expected = [one.run(None, {"x": x})[0] for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for i in range(60):
            which = (index + i) % len(inputs)
            y = ours[index % 2].run(None, {"x": inputs[which]})[0]
            if not np.array_equal(y, expected[which]):
                wrong.append(which)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert not wrong


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux shows them")
def test_threads_end_with_their_session_and_sleep_when_there_is_nothing_to_do(rng: np.random.Generator) -> None:
    model, x = linear(rng), rng.standard_normal((1, 1, 512)).astype(np.float32)
    before = tasks()
    for _ in range(3):  # the second session takes over what the first one left
        run = session(model, 4)
        assert tasks() == before + 3
        y = run.run(None, {"x": x})[0]
        time.sleep(0.05)
        busy = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - busy < 0.1
        np.testing.assert_array_equal(run.run(None, {"x": x})[0], y)  # they wake up
        del run
        assert tasks() == before


def two_digits(rng: np.random.Generator, m: int) -> dict[str, NDArray[Any]]:
    """A head of 128 features as docs/formats.md says."""
    q = rng.integers(-119, 120, (128, m))
    high = (q + 8) // 16
    digits = np.concatenate([high, q - 16 * high]).astype(np.int8)
    groups, norm = rng.integers(1, 17, (2, m), dtype=np.int8), rng.uniform(-2, 2, 128).astype(np.float32)
    return {
        "qweight": pack_int4(digits),
        "group_scales": pack_group_scales(np.concatenate([groups, groups])),
        "scales": rng.uniform(0.004, 0.008, m).astype(np.float16),
        "bias": rng.standard_normal(m).astype(np.float32),
        "norm": np.concatenate([norm, norm / 16]),
    }


def first_digits(weights: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The same with zeros for the second ones."""
    qweight = weights["qweight"].copy()
    qweight[:, 16:] = -120  # two nibbles of 8
    return weights | {"qweight": qweight}


def expected_within(first: NDArray[Any], full: NDArray[Any], within: float) -> tuple[NDArray[Any], int]:
    """What lies within reach of the largest goes on, 16 outputs at a time; and how many of these do."""
    starts = range(0, first.shape[1], 16)
    wanted = [first[0, i : i + 16].max() >= first.max() - np.float32(within) for i in starts]
    y = np.concatenate([(full if on else first)[:, i : i + 16] for i, on in zip(starts, wanted, strict=True)], axis=1)
    return y, sum(wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", [1, 16, 333, 4000])
def test_what_lies_far_below_the_largest_stays_at_its_first_digit(rng: np.random.Generator, isa: str, m: int) -> None:
    weights, options = two_digits(rng, m), HEAD | {"isa": isa}
    x = np.tile(rng.standard_normal((1, 128)).astype(np.float32), 2)
    full, _ = library.specquant_matmul(x, **weights, **options)
    first, _ = library.specquant_matmul(x, **first_digits(weights), **options)
    some, spread = 0, float(np.ptp(first))
    for within in (1e-6, 0.2 * spread, 0.5 * spread, 1e9):
        y, _ = library.specquant_matmul(x, **weights, **options, within=within)
        expected, count = expected_within(first, full, within)
        np.testing.assert_array_equal(y, expected)
        some += 1 < count < m // 16
    assert some or m < 4000
    np.testing.assert_array_equal(library.specquant_matmul(x, **weights, **options, within=1e9)[0], full)


def test_a_session_leaves_out_second_digits_of_one_token_alone(rng: np.random.Generator) -> None:
    weights = two_digits(rng, 3000)
    model = op_model("Int4ResidualMatMul", 256, weights, np.float32, HEAD)
    x = np.tile(rng.standard_normal((1, 2, 128)).astype(np.float32), 2)
    exact, one, four = session(model), session(model, 0, 4.0), session(model, 4, 4.0)
    first, _ = library.specquant_matmul(x[0, :1], **first_digits(weights), **HEAD)
    full = exact.run(None, {"x": x[:, :1]})[0]
    expected, count = expected_within(first, full[0], 4.0)
    assert 0 < count < 3000 // 16
    for run in (one, four):
        np.testing.assert_array_equal(run.run(None, {"x": x[:, :1]})[0][0], expected)
        np.testing.assert_array_equal(run.run(None, {"x": x})[0], exact.run(None, {"x": x})[0])


@pytest.mark.parametrize("change", ["a norm", "a sign", "a group's scale", "the prologue"])
def test_a_session_leaves_nothing_out_of_other_weights(rng: np.random.Generator, change: str) -> None:
    weights, attributes = two_digits(rng, 3000), dict(HEAD)
    if change == "the prologue":
        attributes["prologue"] = 0
    elif change == "a group's scale":
        weights["group_scales"][2, 3, 5] ^= 1
    else:
        weights["norm"][200] *= np.float32(-1 if change == "a sign" else 1 + 2**-20)
    model = op_model("Int4ResidualMatMul", 256, weights, np.float32, attributes)
    x = np.tile(rng.standard_normal((1, 1, 128)).astype(np.float32), 2)
    np.testing.assert_array_equal(*(session(model, 0, within).run(None, {"x": x})[0] for within in (0.0, 1e-6)))


@pytest.mark.parametrize(
    "change",
    [
        {"within": -1.0},
        {"within": float("nan")},
        {"group_size": 0, "act_group": 0},
        {"act_bits": 16},
        {"group_size": 256},
    ],
)
def test_within_is_refused_where_it_has_no_meaning(rng: np.random.Generator, change: dict[str, Any]) -> None:
    options = GROUPS | {"act_bits": 8, "within": 1.0} | change
    weights = random_weights(rng, "Int4ResidualMatMul", 256, 40, 0, options["group_size"])
    with pytest.raises(SpecQuantError, match="within"):
        library.specquant_matmul(rng.standard_normal((1, 256)).astype(np.float32), **weights, **options)


def test_no_race_between_threads(tmp_path: Path) -> None:
    """tests/workers.cc under ThreadSanitizer: tasks, reading ahead, sleeping, two callers."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    kernels = ROOT / "custom_ops" / "kernels" / "cpu"
    program = tmp_path / "workers"
    command = ["g++", "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", "-w", f"-I{kernels}"]
    sources = [kernels / f"{name}.cc" for name in ("workers", "few_tokens")]
    command += [*map(str, sources), str(ROOT / "tests" / "workers.cc"), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip("g++ has no ThreadSanitizer here")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not know this kernel's addresses")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
