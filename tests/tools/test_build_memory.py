"""What is watched of a command, and the artifact of random weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.build_memory import watched


def test_peaks_of_a_command_that_prints_much() -> None:
    """More than a pipe holds, on both sides; the memory that it has freed again counts."""
    program = "import sys, time; a = b'1' * (150 << 20); time.sleep(0.3); del a; "
    program += "sys.stderr.write('x' * 300_000); print('y' * 300_000)"
    done, peaks = watched([sys.executable, "-c", program])
    assert (done.returncode, len(done.stdout), len(done.stderr)) == (0, 300_001, 300_000)
    if not Path("/proc/self/status").is_file():
        pytest.skip("there is no /proc")
    assert peaks["RssAnon"] > 150 << 20
    assert peaks["RssFile"] > 0


def test_a_failure_is_handed_on() -> None:
    done, _ = watched([sys.executable, "-c", "import sys; sys.exit('no')"])
    assert (done.returncode, done.stderr) == (1, "no\n")
