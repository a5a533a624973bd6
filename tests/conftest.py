"""Fixtures for every test."""

from __future__ import annotations

import os
import secrets
import signal

import numpy as np
import pytest

# A shell that starts the tests in the background has SIGINT ignored, in them and in every command that they interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random numbers. The seed is printed when a test fails; SPECQUANT_TEST_SEED runs it again with that."""
    seed = int(os.environ.get("SPECQUANT_TEST_SEED") or secrets.randbits(32))
    print(f"SPECQUANT_TEST_SEED={seed}")
    return np.random.default_rng(seed)
