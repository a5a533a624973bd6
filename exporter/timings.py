"""What TensorRT measured of its kernels while it built, kept for the next build of the same GPU and version.

TensorRT-RTX measures nothing: it picks kernels where the engine runs, and keeps those in the engine's runtime.cache.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any


def use_timings(config: Any, path: Path) -> None:
    """Let a build start from the timings at `path`, or from none if there are none, or of another GPU or version."""
    data = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def keep_timings(config: Any, path: Path) -> None:
    """Keep what a build has measured; where nothing can be written, nothing is kept."""
    data = bytes(config.get_timing_cache().serialize())
    try:
        path.parent.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError:
        return
