"""Questions that are answered elsewhere give the metrics that `specquant eval zeroshot` gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `cpu` is not installed")

from specquant.runtime import zeroshot
from specquant.runtime.lm_eval_model import ArtifactLM
from specquant.runtime.session import load
from tests.runtime.test_zeroshot import DOCUMENTS
from tools.zeroshot_away import main


def test_three_steps_are_one(float_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["lambada_openai", "arc_easy", "winogrande"]
    for name in names:
        lines = [json.dumps(row) for row in DOCUMENTS[name]]
        (tmp_path / zeroshot.TASKS[name][1]).write_text("\n".join(lines), encoding="utf-8")
    data, asked, scores = f"--data-dir={tmp_path}", str(tmp_path / "asked.json"), str(tmp_path / "scores.json")
    assert main(["ask", str(float_folder), data, "--tasks", ",".join(names), "-o", asked]) == 0
    assert main(["score", str(float_folder), asked, "-o", scores, "--processes", "2", "--threads", "1"]) == 0
    capsys.readouterr()
    assert main(["report", asked, scores, data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    results = zeroshot.run_tasks(ArtifactLM(load(float_folder)), zeroshot.local_tasks(names, tmp_path))
    assert found["tasks"] == {name: result.value for name, result in results.items()}
    assert found["average"] == zeroshot.average(results)
