"""What an engine of TensorRT-RTX takes, as its own parser and profiles say it on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specquant.exporter.engine_builder import Limits, optimization_profiles
from tests.python_plugins import registered

TYPES = {"FLOAT": "float", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64"}


class RtxNetwork:
    """A lowered graph, parsed, and the profiles that its engine would be built with."""

    def __init__(self, api: Any, path: Path, limits: Limits) -> None:
        log = api.Logger(api.Logger.ERROR)
        builder = api.Builder(log)
        network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = api.OnnxParser(network, log)
        with pytest.MonkeyPatch.context() as patch, registered(api, patch):
            assert parser.parse_from_file(str(path)), parser.get_error(0).desc()
        self.inputs = {t.name: t for t in map(network.get_input, range(network.num_inputs))}
        self.outputs = {t.name: t for t in map(network.get_output, range(network.num_outputs))}
        self.profiles = optimization_profiles(builder, network, limits)
        self._alive = (log, builder, network, parser)

    def check(self, profile: int, shapes: dict[str, tuple[int, ...]], keep: int, kinds: dict[str, str]) -> None:
        """Assert that a call has every tensor, of a type and shape that the profile takes; kinds: ONNX Runtime's."""
        assert shapes.keys() | {"logits_to_keep"} == self.inputs.keys() | self.outputs.keys()
        for name, tensor in (self.inputs | self.outputs).items():
            assert kinds[name] == f"tensor({TYPES[tensor.dtype.name]})"
            if name == "logits_to_keep":
                least, _, most = self.profiles[profile].get_shape_input(name)
                assert least[0] <= keep <= most[0]
            elif name in self.inputs:
                least, _, most = map(tuple, self.profiles[profile].get_shape(name))
                shape = shapes[name]
                assert len(shape) == len(least)
                assert all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)), (name, shape, least, most)
            else:
                fixed = tuple(tensor.shape)
                assert all(a in (-1, b) for a, b in zip(fixed, shapes[name], strict=True)), (name, shapes[name], fixed)


def rtx_network(path: Path, limits: Limits) -> RtxNetwork | None:
    """None where TensorRT-RTX is not installed."""
    try:
        import tensorrt_rtx
    except ImportError:
        return None
    return RtxNetwork(tensorrt_rtx, path, limits)
