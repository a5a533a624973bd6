"""tools/gpu_session.py as far as it goes without a GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tools.gpu_session import ROOT, Step, run_step, steps


def test_a_step_that_fails_or_hangs_is_only_that(tmp_path: Path) -> None:
    log, variables = tmp_path / "log", dict(os.environ)
    failed = run_step(Step("a", 'echo text; echo \'{"us": 3}\'; echo "{no json"; exit 3', 9), 9, log, variables)
    assert (failed["rc"], failed["lines"]) == (3, [{"us": 3}])
    assert failed["tail"].startswith("text\n")
    hung = run_step(Step("b", "echo before; sleep 60", 1), 1, log, variables)
    assert hung["rc"] == 124
    assert hung["seconds"] < 30
    assert "== a:" in (text := log.read_text())
    assert "before" in text


def test_what_steps_call_is_there() -> None:
    plan = steps("90-real")
    assert len({step.name for step in plan}) == len(plan)
    for step in plan:
        assert 0 < step.limit <= 600
        modules = [name.replace(".", "/") + ".py" for name in re.findall(r"-m (tools\.\w+)", step.command)]
        for name in [*modules, *re.findall(r"(?:tests|tools)/[\w/]+\.py", step.command)]:
            assert (ROOT / name).is_file(), name
