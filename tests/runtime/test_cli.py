"""The commands as a user runs them: output, one line for a mistake, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="the extra `cpu` is not installed")

from specquant.custom_ops import compiled, library, library_cuda, library_tensorrt
from specquant.runtime.artifact import open_artifact
from specquant.runtime.cli import main
from specquant.runtime.cli_common import run_cli
from specquant.runtime.perplexity import perplexity
from specquant.runtime.session import load

COMMAND = [sys.executable, "-m", "specquant.runtime.cli"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    expected = "".join(load(folder, custom_ops=False).generate("Paris", max_new_tokens=8))
    code, out, err = run(capsys, "generate", folder, "--no-custom-ops", "-n", 8, "Paris", "--stats")
    assert (code, out) == (0, expected + "\n")
    assert "8 new tokens" in err
    code, out, err = run(capsys, "generate", folder, "Paris", "--no-custom-ops", "-n", 8, "--json", "--stats")
    answer = json.loads(out)
    assert (code, answer["text"], answer["stats"]["new_tokens"], err) == (0, expected, 8, "")
    assert answer["machine"]["physical_cores"] >= 1


def test_generate_chat(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}]
    expected = "".join(load(folder, custom_ops=False).chat(messages, max_new_tokens=8))
    _, out, _ = run(capsys, "generate", folder, "--system", "Be.", "Hi", "--no-custom-ops", "-n", 8)
    assert out == expected + "\n"


def test_chat_from_a_pipe(folder: Path) -> None:
    model = load(folder, custom_ops=False)
    history = [{"role": "user", "content": "a"}]
    history.append({"role": "assistant", "content": "".join(model.chat(history, max_new_tokens=4))})
    history.append({"role": "user", "content": "b"})
    second = "".join(model.chat(history, max_new_tokens=4))
    command = [*COMMAND, "chat", str(folder), "--no-custom-ops", "-n", "4", "--json"]
    done = subprocess.run(command, input="a\nb\n/reset\na\n", capture_output=True, text=True, check=True)
    texts = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    assert texts == [history[1]["content"], second, history[1]["content"]]


def test_inspect(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, out, err = run(capsys, "inspect", folder, "--verify")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["name", "tiny"]
    assert "5.000 in the linears" in out
    assert "all verified" in out
    table = lines[lines.index("") + 1 :]
    assert len(table) == 1 + 8
    assert len({len(line) for line in table}) == 1
    code, out, _ = run(capsys, "inspect", folder, "--json")
    assert json.loads(out)["layers"][0]["rank"] == 4


def test_eval(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.raw"
    text.write_bytes("The capital\r\nof France is Paris. 日本\n".encode() * 30)
    model = load(folder, custom_ops=False)
    ids = model.encode(text.read_bytes().decode(), add_special_tokens=False)
    expected = perplexity(model.logits, ids, 96, 3)
    common = ("eval", "ppl", folder, "--text", text, "--no-custom-ops", "--windows", 3)
    code, out, err = run(capsys, *common, "--json", "--record")
    result = json.loads(out)
    assert code == 0
    assert result["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert (result["window"], result["windows"], result["tokens"]) == (96, 3, 3 * 95)
    assert "windows are that long" in err  # the context is shorter than 2,048
    recorded = open_artifact(folder, verify=True).evaluation["text.raw"]
    assert recorded["perplexity"] == result["perplexity"]
    _, out, _ = run(capsys, "inspect", folder)
    assert f"{result['perplexity']:.4f} on text.raw" in out
    code, out, err = run(capsys, *common, "--window", 50, "-q")
    assert (code, err) == (0, "")
    assert "3 windows of 50" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "invalid choice: 'bogus'"),
        (["generate"], "required: DIR"),
        (["generate", "{folder}", "x", "--top"], "unrecognized arguments: --top"),
        (["generate", "{folder}", "x", "--top-p", "2"], "top_p = 2.0 is out of range"),
        (["generate", "{folder}", "x", "--temperature", "warm"], "invalid float value: 'warm'"),
        (["generate", "{folder}", ""], "prompt is empty"),
        (["generate", "{tmp}/nothing", "x"], "is not a folder"),
        (["generate", "{tmp}", "x"], "no specquant.json"),
        (["inspect", "{tmp}"], "no specquant.json"),
        (["chat", "{folder}", "--rank", "9", "--no-custom-ops"], "rank = 9 is out of range"),
        (["eval", "ppl", "{folder}", "--text", "{tmp}/nothing"], "nothing cannot be read: No such file"),
        (["eval", "ppl", "{folder}", "--text", "{folder}/model.onnx.data"], "is not UTF-8 text"),
        (["eval", "ppl", "{folder}", "--text", "{folder}/tokenizer.json", "--window", "97", "--no-custom-ops"], "97"),
        (["eval", "ppl", "{tmp}", "--text", "{folder}/tokenizer.json", "--record"], "--record needs an exported"),
    ],
)
def test_mistakes_are_one_line_and_2(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, *(item.format(folder=folder, tmp=tmp_path) for item in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("specquant: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_failures_are_one_line_and_1(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise RuntimeError("first\nsecond")

    assert run_cli(fail) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert run_cli(fail, verbose=True) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "generate", "chat", "eval", "inspect"])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"examples:\n  specquant {command}" in capsys.readouterr().out


def test_the_version_says_what_was_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / library_tensorrt.FILE).write_bytes(b"")
    monkeypatch.setattr(compiled.resources, "files", lambda package: tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert said.endswith(", with TensorRT plugins; without CPU kernels, CUDA kernels\n")
    assert set(compiled.PARTS.values()) == {library.FILE, library_cuda.FILE, library_tensorrt.FILE}


def test_a_closed_pipe_is_quiet(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, "inspect", str(folder)], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_ctrl_c(folder: Path) -> None:
    command = [*COMMAND, "chat", str(folder), "--no-custom-ops", "-n", "3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"a\n")
        process.stdin.flush()
        process.stdout.read(1)  # the model is loaded and answers
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_importing_the_package_is_quick() -> None:
    heavy = "{'numpy', 'onnxruntime', 'tokenizers', 'torch'}"
    code = f"import sys, specquant.runtime; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_running_needs_no_exporter(folder: Path) -> None:
    """Nothing of the export extra is imported on the device."""
    code = (
        "import sys; from specquant.runtime.cli import main; main(sys.argv[1:]);"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnx_ir'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "generate", str(folder), "x", "-n", "2", "--no-custom-ops", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
