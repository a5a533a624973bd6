"""What bad input gets on the command line: one line on stderr that helps, exit code 2, and no output folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="the extra `cpu` is not installed")
pytest.importorskip("transformers", reason="the extra `export` is not installed")

import torch

from specquant.custom_ops import library
from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.export import export
from specquant.exporter.recipe import float_recipe
from specquant.runtime.cli import main
from tests.model_folder import CONTEXT, CORPUS, QUICK, fresh_seed, random_llama, save_model_folder

Edit = Callable[[Path], object]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command owns its process: what it sets there is put back."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; not to be changed."""
    return save_model_folder(tmp_path_factory.mktemp("source") / "tiny", random_llama(fresh_seed()))


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact; not to be changed."""
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    export(str(model), folder, float_recipe())
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Enough for QUICK."""
    path = tmp_path / "text.txt"
    path.write_text(CORPUS[0] * 30)
    return path


def one_line(stderr: str, message: str) -> None:
    assert stderr.startswith("specquant: error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert message in stderr


class Refusal:
    """Runs the command here and asserts how it fails."""

    def __init__(self, capfd: pytest.CaptureFixture[str], place: Path) -> None:
        self.capfd, self.target = capfd, place / "place" / "model"
        self.target.parent.mkdir()

    def export(self, message: str, *arguments: object) -> None:
        self(message, "export", *arguments, "-o", self.target, "-q")
        assert list(self.target.parent.iterdir()) == []

    def __call__(self, message: str, *arguments: object) -> None:
        self.capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = self.capfd.readouterr()
        assert out == ""
        one_line(err, message)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Refusal:
    return Refusal(capfd, tmp_path)


def changed(model: Path, tmp_path: Path, edit: Edit) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(model, folder)
    edit(folder)
    return folder


def configure(**values: object) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def cut(name: str) -> Edit:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors file"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "can run code"),
        (cut("model.safetensors"), "changed: the model cannot be read"),
        (cut("config.json"), "changed: the model cannot be read"),
        (cut("tokenizer.json"), "changed: the model cannot be read"),
        (configure(model_type="gpt2"), "architecture 'gpt2' is not supported; supported: llama"),
        (configure(model_type="mixtral"), "architecture 'mixtral' is not supported; supported: llama"),
        (configure(model_type="no_such"), "cannot be read"),
        (configure(hidden_act="relu"), "activation 'relu'"),
        (
            configure(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rotary type 'dynamic'",
        ),
    ],
)
def test_models_that_cannot_be_read(refused: Refusal, model: Path, tmp_path: Path, edit: Edit, message: str) -> None:
    refused.export(message, changed(model, tmp_path, edit))


def test_models_that_are_not_there(refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused.export("no such folder or file", tmp_path / "nothing")
    refused.export("cannot be reached and the model is not in its cache", "nobody/nothing-of-this-name")
    (tmp_path / "model.gguf").write_bytes(b"GGML")
    refused.export("not a GGUF file", tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    refused.export("cannot be read", tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--a-bits 4 --group-size 24", "group_size 24 and act_group 64 do not nest"),
        (
            "--group-size 24 --act-group 24",
            "group_size 24 does not divide the 64 input features of qkv_proj; nearest: ",
        ),
        ("--group-size 64 --act-group 64", "does not divide the 88 input features of down_proj; nearest: "),
        ("--group-size 8 --act-group 8 --k 65", "k = 65 is too large for basis klt of qkv_proj"),
        ("--basis dft --group-size 8 --act-group 8 --k 33", "nearest: 32"),
        ("--a-bits 1", "a_bits = 1 is not available; nearest: 2"),
        ("--w-bits 3", "w_bits = 3 is not available; nearest: 4"),
        ("--kv-bits 20", "kv_bits = 20 is not available; nearest: 16"),
        ("--w-bits 16", "quantised activations need --w-bits 4"),
        ("--preset best", "no preset 'best'; there are klt, refined, fast, paper"),
        ("--k many", "invalid int value: 'many'"),
        ("--seed -1", "seed -1 is not in"),
        ("--recipe nothing.yaml", "cannot be read"),
        ("--preset klt --recipe nothing.yaml", "exclude each other"),
        ("--basis none --subtract", "subtract needs a basis"),
        (f"--w-bits 16 --a-bits 16 --context-length {CONTEXT + 1}", f"is not in 1…{CONTEXT}"),
        ("--threads 0", "--threads must be 1 or more"),
        ("--calibration nothing.txt --group-size 8 --act-group 8", "calibration text nothing.txt cannot be read"),
    ],
)
def test_recipes_that_cannot_be(refused: Refusal, model: Path, options: str, message: str) -> None:
    refused.export(message, model, *options.split())


def test_too_little_text(refused: Refusal, model: Path, text: Path) -> None:
    refused.export("give more text, or --samples ", model, "--calibration", text, *QUICK, "--samples", 4000)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.down_proj.weight", float("nan"), "weights of model.layers.1.mlp.down_proj.weight hold"),
        ("model.layers.0.input_layernorm.weight", float("inf"), "weights of model.layers.0.input_layernorm"),
        ("model.norm.weight", float("nan"), "weights of model.norm hold NaN"),
        (
            "model.layers.1.input_layernorm.weight",
            1e30,
            "activations going into model.layers.1.self_attn.qkv_proj hold",
        ),
    ],
)
def test_damaged_numbers_name_the_layer(
    refused: Refusal, tmp_path: Path, text: Path, name: str, value: float, message: str
) -> None:
    llama = random_llama(fresh_seed())
    with torch.no_grad():
        llama.get_parameter(name)[3] = value
    refused.export(message, save_model_folder(tmp_path / "damaged", llama), "--calibration", text, *QUICK)


def test_places_that_are_taken(refused: Refusal, model: Path, exported: Path, tmp_path: Path) -> None:
    before = (exported / "specquant.json").read_bytes()
    refused("exists; use --force", "export", model, "-o", exported, "-q")
    assert (exported / "specquant.json").read_bytes() == before
    refused("--force replaces only exported models", "export", model, "-o", model, "--force", "-q")
    (tmp_path / "file").write_text("x")
    refused("cannot be written to", "export", model, "-o", tmp_path / "file" / "model", "-q")


def test_a_full_disk(refused: Refusal, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    refused.export("no space for it", model, "--w-bits", 16, "--a-bits", 16)


def other_data(folder: Path, tmp_path: Path) -> None:
    """The data of a wider model."""
    other = save_model_folder(tmp_path / "other", random_llama(fresh_seed(), intermediate_size=96))
    export(str(other), tmp_path / "other_exported", float_recipe())
    shutil.copy(tmp_path / "other_exported" / "model.onnx.data", folder)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "edited"])
def test_data_that_are_not_those_of_the_export(refused: Refusal, exported: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    data = folder / "model.onnx.data"
    if damage == "truncated":
        os.truncate(data, data.stat().st_size - 1)
    elif damage == "foreign":
        other_data(folder, tmp_path)
    elif damage == "missing":
        data.unlink()
    else:
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    message = {"foreign": "not the file that was exported", "edited": "changed after the export"}.get(
        damage, f"model.onnx.data is {damage}"
    )
    refused(message, "generate", folder, "Paris", "-q", *(["--verify"] if damage == "edited" else []))


def test_a_prompt_longer_than_the_context(refused: Refusal, exported: Path) -> None:
    refused(f"the context holds {CONTEXT}: shorten the prompt", "generate", exported, "?" * (CONTEXT + 1), "-q")


def generate(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """In a process of its own: a library is loaded once."""
    command = [sys.executable, "-m", "specquant.runtime.cli", "generate", str(folder), "Paris", "-n", "1"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_a_library_for_another_cpu(exported: Path, tmp_path: Path) -> None:
    try:
        elf = bytearray(library.library_path().read_bytes())
    except SpecQuantError as missing:
        pytest.skip(str(missing))
    elf[18:20] = (0xF3).to_bytes(2, "little")  # e_machine: RISC-V
    path = tmp_path / "libspecquant_cpu.so"
    path.write_bytes(elf)
    done = generate(exported, {"SPECQUANT_LIBRARY": str(path)})
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, f"{path} does not load on ")


def test_a_library_of_another_version(exported: Path, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source = f'extern "C" int specquant_abi() {{ return {library.ABI + 1}; }} '
    (tmp_path / "other.cc").write_text(source + 'extern "C" long specquant_problem_size() { return 8; }')
    path = tmp_path / "other.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, tmp_path / "other.cc"], check=True)
    done = generate(exported, {"SPECQUANT_LIBRARY": str(path)})
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, f"has ABI {library.ABI + 1}, this package needs {library.ABI}")


def test_an_onnxruntime_that_is_too_old(exported: Path, tmp_path: Path) -> None:
    about = tmp_path / "onnxruntime-1.10.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime\nVersion: 1.10.0\n")
    done = generate(exported, {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"})
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, "onnxruntime 1.10.0 is too old")
