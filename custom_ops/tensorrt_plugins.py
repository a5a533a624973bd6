"""The plugins of library_tensorrt.py in Python, made from the schema, for a machine without the compiled ones.

They call the same kernels through library_cuda.py, so they need libspecquant_cuda.so but none of TensorRT's headers.
Every call passes through Python: the compiled library is faster, and the only one that an engine can carry.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from specquant.custom_ops import library_cuda
from specquant.custom_ops.library_tensorrt import PLUGINS, prepare_plugins
from specquant.custom_ops.schema import DOMAIN, FLOAT, OPS, VERSION, Op, core

_ALIGNMENT = 256  # of the workspace; TensorRT promises none
# TensorRT has no int16: row_sums are int32 in a lowered graph.
_TYPES = {"float16": "HALF", "float": "FLOAT", "int8": "INT8", "int16": "INT32", "int64": "INT64"}


def register(api: Any) -> None:
    """Register a creator for each op of PLUGINS with `api`, the module tensorrt or tensorrt_rtx. Idempotent.

    Raises SpecQuantError if the kernels are not installed, or TensorRT-RTX cannot run plugins here.
    """
    library_cuda.loaded()
    prepare_plugins(api)
    registry = api.get_plugin_registry()
    for name in PLUGINS:
        if registry.get_creator(name, str(VERSION), DOMAIN) is None:
            creator = _creator_class(api)(core(OPS[name]))
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
    class Plugin(api.IPluginV3, api.IPluginV3OneCore, api.IPluginV3OneBuild, api.IPluginV3OneRuntime):
        """One call of a matmul op; has no state but its attributes."""

        def __init__(self, op: Op, attributes: dict[str, Any]) -> None:
            for base in (api.IPluginV3, api.IPluginV3OneCore, api.IPluginV3OneBuild, api.IPluginV3OneRuntime):
                base.__init__(self)
            self.op, self.attributes = op, attributes
            self.at = {tensor.name: index for index, tensor in enumerate(op.inputs)}
            self.num_outputs = 1
            self.plugin_name, self.plugin_version, self.plugin_namespace = op.name, str(VERSION), DOMAIN
            self.timing_cache_id = ""

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.op, dict(self.attributes))

        def get_output_data_types(self, types: Any) -> Any:
            return [types[0]]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> Any:
            x, scales = inputs[0], inputs[self.at["scales"]]
            y = api.DimsExprs(len(x))
            for axis in range(len(x) - 1):
                y[axis] = x[axis]
            y[len(x) - 1] = scales[1]
            return [y]

        def supports_format_combination(self, position: int, tensors: Any, inputs: int) -> bool:
            desc = tensors[position].desc
            if desc.format != api.TensorFormat.LINEAR:
                return False
            if position == inputs:
                return bool(desc.type == tensors[0].desc.type)
            kind = self.op.inputs[position].types
            wanted = ("FLOAT", "HALF") if kind == (FLOAT,) else (_TYPES[kind[0]],)
            return desc.type in [getattr(api.DataType, name) for name in wanted]

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            shapes = [tuple(x.desc.dims) for x in inputs]
            problem = self.problem([tuple(inputs[0].max), *shapes[1:]], inputs[0].desc.type == api.DataType.HALF)
            return library_cuda.workspace_bound(problem) + _ALIGNMENT

        def enqueue(
            self, descs: Any, output_descs: Any, inputs: Any, outputs: Any, workspace: int, stream: int
        ) -> None:
            problem = self.problem([tuple(desc.dims) for desc in descs], descs[0].type == api.DataType.HALF)
            for name in ("x", "basis", "coef", "qweight", "scales", "row_sums", "bias"):
                if name in self.at and (problem.basis_rank or name not in ("basis", "coef")):
                    setattr(problem, name, inputs[self.at[name]])
            problem.y = outputs[0]
            start = -(-workspace // _ALIGNMENT) * _ALIGNMENT
            library_cuda.run(problem, start, library_cuda.workspace_bound(problem), stream)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def set_tactic(self, tactic: int) -> None:
            pass

        def get_fields_to_serialize(self) -> Any:
            return _fields(api, self.op, self.attributes)

        def problem(self, shapes: list[tuple[int, ...]], half: bool) -> library_cuda.Problem:
            """Sizes and attributes of a call, from the shapes of its inputs; all columns of a branch are used."""
            *leading, n = shapes[0]
            rank = shapes[self.at["basis"]][1] if "basis" in self.at else 0
            problem = library_cuda.Problem(tokens=int(np.prod(leading, dtype=np.int64)), in_features=n, half=half)
            problem.out_features = shapes[self.at["scales"]][1]
            problem.basis_rank = problem.rank = rank
            problem.wide_sums = 1
            for name, value in self.attributes.items():
                setattr(problem, name, value)
            return problem

    return Plugin
