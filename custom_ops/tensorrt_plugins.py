"""The plugins of library_tensorrt.py in Python, made from the schema, for a machine without the compiled ones.

They call the same kernels through library_cuda.py, so they need libspecquant_cuda.so but none of TensorRT's headers.
Every call passes through Python: the compiled library is faster, and the only one that an engine can carry.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from specquant.custom_ops import library_cuda
from specquant.custom_ops.library_tensorrt import PLUGINS, prepare_plugins
from specquant.custom_ops.schema import DOMAIN, FLOAT, OPS, VERSION, Op, Tensor
from specquant.custom_ops.tensorrt_calls import CALLS

_ALIGNMENT = 256  # of the workspace; TensorRT promises none
_TYPES = {name: name.upper() for name in ("float", "int8", "int32", "int64")} | {"float16": "HALF"}


def register(api: Any) -> None:
    """Register a creator for each op of PLUGINS with `api`, the module tensorrt or tensorrt_rtx. Idempotent.

    Raises SpecQuantError if the kernels are not installed, or TensorRT-RTX cannot run plugins here.
    """
    library_cuda.loaded()
    prepare_plugins(api)
    registry = api.get_plugin_registry()
    for name in PLUGINS:
        if registry.get_creator(name, str(VERSION), DOMAIN) is None:
            creator = _creator_class(api)(OPS[name])
            registry.register_creator(creator, DOMAIN)
            _REGISTERED.append(creator)


_REGISTERED: list[Any] = []  # the registry does not keep them alive


def _creator_class(api: Any) -> type:
    plugin_class = _plugin_class(api)

    class Creator(api.IPluginCreatorV3One):
        """Makes plugins of one op from its fields, at build and at run time alike."""

        def __init__(self, op: Op) -> None:
            super().__init__()
            self.op = op
            self.name, self.plugin_version, self.plugin_namespace = op.name, str(VERSION), DOMAIN
            self.field_names = _fields(api, op, {a.name: a.default for a in op.attributes})

        def create_plugin(self, name: str, given: Any, phase: Any) -> Any:
            attributes = {a.name: a.default for a in self.op.attributes}
            for field in given:
                if field.name not in attributes:
                    return None
                kind = type(attributes[field.name])
                attributes[field.name] = kind(np.asarray(field.data).reshape(-1)[0])
            return plugin_class(self.op, attributes)

    return Creator


def _fields(api: Any, op: Op, attributes: dict[str, Any]) -> Any:
    kinds = {int: (np.int64, api.PluginFieldType.INT64), float: (np.float32, api.PluginFieldType.FLOAT32)}
    made = []
    for attribute in op.attributes:
        dtype, kind = kinds[type(attribute.default)]
        made.append(api.PluginField(attribute.name, np.array([attributes[attribute.name]], dtype), kind))
    return api.PluginFieldCollection(made)


def _plugin_class(api: Any) -> type:
    # The one with aliases came with TensorRT 10.3.
    build: Any = getattr(api, "IPluginV3OneBuildV2", None) or api.IPluginV3OneBuild
    bases = (api.IPluginV3, api.IPluginV3OneCore, build, api.IPluginV3OneRuntime)

    class Plugin(*bases):  # type: ignore[misc]
        """One node; has no state but its attributes."""

        def __init__(self, op: Op, attributes: dict[str, Any]) -> None:
            for base in bases:
                base.__init__(self)
            self.op, self.attributes, self.call = op, attributes, CALLS[op.name](op, attributes)
            self.num_outputs = len(op.outputs)
            self.plugin_name, self.plugin_version, self.plugin_namespace = op.name, str(VERSION), DOMAIN
            self.timing_cache_id = ""

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.op, dict(self.attributes))

        def get_output_data_types(self, types: Any) -> Any:
            return [types[0] if tensor.types == (FLOAT,) else _type(api, tensor) for tensor in self.op.outputs]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> Any:
            def scaled(dimension: Any, times: int, over: int) -> Any:
                product = builder.operation(api.DimensionOperation.PROD, dimension, builder.constant(times))
                return builder.operation(api.DimensionOperation.FLOOR_DIV, product, builder.constant(over))

            shapes = [[shape[axis] for axis in range(len(shape))] for shape in inputs]
            made = []
            for dimensions in self.call.output_shapes(shapes, scaled):
                made.append(api.DimsExprs(len(dimensions)))
                for axis, dimension in enumerate(dimensions):
                    made[-1][axis] = dimension
            return made

        def get_aliased_input(self, output_index: int) -> int:
            return self.call.aliased_input(output_index)

        def supports_format_combination(self, position: int, tensors: Any, inputs: int) -> bool:
            desc, tensor = tensors[position].desc, (*self.op.inputs, *self.op.outputs)[position]
            if desc.format != api.TensorFormat.LINEAR:
                return False
            if tensor.types != (FLOAT,):
                return bool(desc.type == _type(api, tensor))
            return desc.type == tensors[0].desc.type and desc.type in (api.DataType.FLOAT, api.DataType.HALF)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            shapes = [tuple(each.max) for each in inputs]
            return self.call.workspace(shapes, inputs[0].desc.type == api.DataType.HALF) + _ALIGNMENT

        def enqueue(
            self, descs: Any, output_descs: Any, inputs: Any, outputs: Any, workspace: int, stream: int
        ) -> None:
            shapes, half = [tuple(desc.dims) for desc in descs], descs[0].type == api.DataType.HALF
            start = -(-workspace // _ALIGNMENT) * _ALIGNMENT
            self.call.run(shapes, half, inputs, outputs, start, stream)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def set_tactic(self, tactic: int) -> None:
            pass

        def get_fields_to_serialize(self) -> Any:
            return _fields(api, self.op, self.attributes)

    return Plugin


def _type(api: Any, tensor: Tensor) -> Any:
    return getattr(api.DataType, _TYPES[tensor.types[0]])
