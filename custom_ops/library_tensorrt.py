"""The plugins of the op set for TensorRT: the compiled library, and what TensorRT-RTX needs before it takes plugins."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from functools import cache
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from specquant.custom_ops.errors import SpecQuantError

FILE = "libspecquant_trt.so"
PLUGINS = ("SpecQuantMatMul", "Int4ResidualMatMul", "SpectralBranch", "Int4KVAttention", "HalfKVAttention")
REBUILD = (
    "install nvcc of CUDA 12.8 or later and TensorRT's headers, set SPECQUANT_CUDA=ON and TENSORRT_INCLUDE_DIR for "
    "cmake and reinstall (docs/tensorrt.md), or use --profile portable"
)
_NAME_FILE = "libspecquant_rtx_name.so"
_RTX = "libtensorrt_rtx.so"


def library_path() -> Path:
    """The plugin library: SPECQUANT_TENSORRT_LIBRARY if it is set, else the file installed beside this module.

    Raises SpecQuantError if there is no such file.
    """
    named = os.environ.get("SPECQUANT_TENSORRT_LIBRARY")
    path = Path(named) if named else _installed(FILE)
    if not path.is_file():
        if named:
            raise SpecQuantError(f"SPECQUANT_TENSORRT_LIBRARY names {path}, which is not there; correct or unset it")
        raise SpecQuantError(f"this installation has no TensorRT plugins ({path}); {REBUILD}")
    return path


def load_plugins(api: Any, registry: Any, library: Path | None = None) -> None:
    """Make the plugins known to `registry` of `api` (the module tensorrt or tensorrt_rtx), for engines that call them.

    Those of `library`; for None the installed ones, or those of tensorrt_plugins.py where SPECQUANT_TENSORRT_LIBRARY is
    `python`. Raises SpecQuantError if there are none.
    """
    if library is None and os.environ.get("SPECQUANT_TENSORRT_LIBRARY") == "python":
        from specquant.custom_ops.tensorrt_plugins import register  # imports this module

        register(api)
        return
    path = library or library_path()
    prepare_plugins(api)
    if registry.load_library(str(path)) is None:
        raise SpecQuantError(f"{api.__name__} cannot load {path}; {REBUILD}")


def prepare_plugins(api: Any) -> None:
    """What has to be done before `api` builds or runs any plugin. Raises SpecQuantError if it cannot be."""
    if api.__name__ == "tensorrt_rtx":
        _name_rtx()


@cache
def _name_rtx() -> None:
    """Make `libtensorrt_rtx.so` a name of the loaded libtensorrt_rtx.so.1, as TensorRT-RTX needs to run plugins.

    It opens that name when the first plugin is built or run, and aborts the process if the loader does not find it;
    the pip package has only libtensorrt_rtx.so.1. A library that depends on the plain name, loaded from a folder where
    the name is a link to the one file, makes it known. Raises SpecQuantError if that does not work here.
    """
    try:
        ctypes.CDLL(_RTX)
        return
    except OSError:
        pass
    found = sorted(Path(str(import_module("tensorrt_rtx_libs").__file__)).parent.glob(f"{_RTX}.*"))
    helper = _installed(_NAME_FILE)
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, _RTX).symlink_to(found[0])
            ctypes.CDLL(shutil.copy(helper, folder))
        ctypes.CDLL(_RTX)
    except (OSError, IndexError):
        raise SpecQuantError(
            f"TensorRT-RTX runs plugins only where the loader finds {_RTX}: make a link of that name to {_RTX}.1, in a "
            "folder that is on LD_LIBRARY_PATH when the process starts"
        ) from None


def _installed(file: str) -> Path:
    return Path(str(resources.files("specquant.custom_ops").joinpath(file)))
