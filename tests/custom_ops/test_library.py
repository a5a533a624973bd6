"""What a user reads when the compiled library or ONNX Runtime is missing, doubled, too old or for another machine."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specquant.custom_ops import library
from specquant.custom_ops.errors import SpecQuantError


def built() -> Path:
    try:
        return library.library_path()
    except SpecQuantError as missing:
        pytest.skip(str(missing))


def pretend_installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)


def refused(monkeypatch: pytest.MonkeyPatch, path: Path, message: str) -> None:
    monkeypatch.setenv("SPECQUANT_LIBRARY", str(path))
    library.loaded.cache_clear()
    try:
        with pytest.raises(SpecQuantError, match=message) as error:
            library.isas()
    finally:
        library.loaded.cache_clear()
    assert "\n" not in str(error.value)


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused(monkeypatch, tmp_path / "none.so", r"not there; run `pip install .*g\+\+")


def test_a_library_for_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    foreign = bytearray(built().read_bytes())
    foreign[18:20] = (0xF3).to_bytes(2, "little")  # e_machine: RISC-V
    (tmp_path / "foreign.so").write_bytes(foreign)
    refused(monkeypatch, tmp_path / "foreign.so", "does not load on")


def test_a_truncated_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cut.so").write_bytes(built().read_bytes()[:40])
    refused(monkeypatch, tmp_path / "cut.so", "does not load on")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('extern "C" int other() { return 0; }', "is not SpecQuant's library"),
        (
            'extern "C" int specquant_abi() { return 99; } extern "C" long specquant_problem_size() { return 8; }',
            "has ABI 99, this package needs",
        ),
    ],
)
def test_a_library_of_another_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, message: str
) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    (tmp_path / "other.cc").write_text(source)
    command = [compiler, "-shared", "-fPIC", "-o", str(tmp_path / "other.so"), str(tmp_path / "other.cc")]
    subprocess.run(command, check=True)
    refused(monkeypatch, tmp_path / "other.so", message)


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({}, r"not installed; run `pip install onnxruntime`"),
        ({"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}, r"pip uninstall -y onnxruntime onnxruntime-gpu"),
        ({"onnxruntime": "1.19.2"}, r"onnxruntime 1.19.2 is too old; run `pip install -U 'onnxruntime>=1.20'`"),
        ({"onnxruntime-gpu": "1.9.0"}, r"onnxruntime-gpu 1.9.0 is too old"),
    ],
)
def test_an_onnxruntime_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], message: str
) -> None:
    pretend_installed(monkeypatch, versions)
    with pytest.raises(SpecQuantError, match=message) as error:
        library.register(None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu"])
def test_an_onnxruntime_that_fits(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend_installed(monkeypatch, {name: "1.20.0"})
    library.check_onnxruntime()


def test_the_slowest_path_is_always_there() -> None:
    built()
    assert next(iter(library.isas().items())) == ("scalar", True)


def test_an_older_onnxruntime_gets_a_status_not_a_crash() -> None:
    """RegisterCustomOps with an OrtApiBase whose GetApi knows only API 1, as our minimum's predecessors do."""
    code = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p)
    said: list[bytes] = []

    def create_status(_: int, message: bytes) -> int:
        said.append(message)
        return 42

    callback = code(create_status)
    table = (ctypes.c_void_p * 1)(ctypes.cast(callback, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version == 1 else None
    )
    text = ctypes.create_string_buffer(b"1.2.0")
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(text))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p) for f in (get_api, get_version)))
    register = ctypes.CDLL(str(built())).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 42
    assert said == [b"ONNX Runtime 1.2.0 is too old for SpecQuant"]


def test_the_minimum_onnxruntime_has_the_api_that_the_library_asks_for() -> None:
    assert (1, ctypes.CDLL(str(built())).specquant_ort_api()) <= library.ORT_MINIMUM


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": np.zeros(4, np.float32)}, r"bias is float32 \[4\]; it should be float32 \[5\]"),
        ({"scales": np.ones(5, np.float32)}, r"scales is float32 \[5\]; it should be float16 \[5\]"),
        ({"scales": np.ones((1, 5), np.float16)}, r"neither scales \[M\] nor coef"),
        (
            {"group_scales": np.zeros((1, 2, 8), np.int8)},
            r"group_scales is int8 \[1, 2, 8\]; it should be int8 \[1, 1, 8\]",
        ),
        ({"group_scales": None}, "group_scales are missing"),
        ({"x": np.ones((2, 16), np.float64)}, "x is float64"),
        ({"scales": None}, r"neither scales \[M\] nor coef"),
    ],
)
def test_operands_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    built()
    operands: dict[str, Any] = {
        "x": np.ones((2, 16), np.float32),
        "qweight": np.full((1, 2, 64), 0x79, np.int8),
        "group_scales": np.zeros((1, 1, 8), np.int8),
        "scales": np.ones(5, np.float16),
    }
    library.specquant_matmul(**operands)
    with pytest.raises(SpecQuantError, match=message):
        library.specquant_matmul(**operands | changes)
