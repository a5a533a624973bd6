"""The plugins in Python in TensorRT-RTX's registry, where they must not stay: other tests look for an op that is not
registered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from specquant.custom_ops import library_cuda, library_cuda_attention, library_cuda_branch, tensorrt_plugins
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library_tensorrt import PLUGINS
from specquant.custom_ops.schema import DOMAIN, VERSION

WORKSPACE = 1 << 20


@contextlib.contextmanager
def registered(api: Any, patch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Their creators, by name. Where there are no kernels, which building asks for nothing but the size of a workspace,
    that is a number of ours: an engine then has the layers that it would have, and cannot be run."""
    try:
        library_cuda.loaded()
    except SpecQuantError:
        patch.setattr(library_cuda, "loaded", lambda: None)
        patch.setattr(library_cuda, "workspace_bound", lambda problem: WORKSPACE)
        patch.setattr(library_cuda_attention, "attention_bound", lambda problem: WORKSPACE)
        patch.setattr(library_cuda_branch, "branch_workspace", lambda problem: WORKSPACE)
    try:
        tensorrt_plugins.register(api)
    except SpecQuantError as error:
        pytest.skip(str(error))
    registry = api.get_plugin_registry()
    found = {name: registry.get_creator(name, str(VERSION), DOMAIN) for name in PLUGINS}
    try:
        yield found
    finally:
        for creator in found.values():
            registry.deregister_creator(creator)
