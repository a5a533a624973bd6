"""Opening an artifact's graph with ONNX Runtime, whatever provider runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library import check_onnxruntime, register
from specquant.runtime.artifact import ModelInfo


def open_graph(
    folder: Path,
    model: ModelInfo,
    threads: int,
    custom_ops: bool,
    providers: Sequence[Any],
    rank: int | None,
    own_threads: bool = False,
    within: float = 0.0,
) -> tuple[Any, NDArray[np.int64] | None]:
    """A session of model.onnx, and what to bind as its `rank`, int64 [1] (None: nothing).

    own_threads: our ops have threads of their own, and ONNX Runtime's sleep. within: see `register`.
    Raises SpecQuantError: ONNX Runtime or our library missing, a damaged graph, one of another model.
    """
    check_onnxruntime()
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors reach the user as ours, in one line
    # Threads wait actively, for speed, during a run and for a moment after it, which lasts to the next token unless its
    # reader is slow: waking them costs 0.1 ms. Before 1.31 that moment has no length of ours, so there is none.
    if own_threads:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    elif tuple(int(part) for part in ort.__version__.split(".")[:2]) >= (1, 31):
        options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    else:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if custom_ops:
        register(options, threads if own_threads else 0, within)
    path = folder / "model.onnx"
    try:
        session = ort.InferenceSession(str(path), options, providers=list(providers))
    except MemoryError:
        raise
    except Exception as error:
        raise SpecQuantError(_open_failure(path, error)) from error
    names = {item.name for item in session.get_overridable_initializers()}
    if rank is not None and "rank" not in names:
        raise SpecQuantError(f"{path} has no `rank` to set: re-export the model")
    if "logits_to_keep" not in names:
        raise SpecQuantError(f"{path} has no `logits_to_keep`: re-export the model")
    _check_graph(folder, session, model)
    return session, None if rank is None else np.array([rank], np.int64)


def _open_failure(path: Path, error: Exception) -> str:
    if "external" in str(error).lower():  # ONNX's word for what lies in model.onnx.data
        path = path.with_name(f"{path.name}.data")
    return f"{path} cannot be loaded, it is damaged or made for another version: re-export the model ({reason(error)})"


def _check_graph(folder: Path, session: Any, model: ModelInfo) -> None:
    """The graph has the inputs and outputs of docs/formats.md, in the sizes that the manifest gives."""
    past = [f"past_key_values.{i}.{kind}" for i in range(model.num_layers) for kind in ("key", "value")]
    present = [name.replace("past_key_values", "present") for name in past]
    inputs = {item.name: item for item in session.get_inputs()}
    outputs = {item.name: item for item in session.get_outputs()}
    names = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}
    width, dtype = model.cache_row
    fits = set(inputs) == {"input_ids", "attention_mask", "position_ids", *past}
    fits = fits and set(outputs) == {"logits", *present}
    fits = fits and all(
        inputs[name].type == names[dtype.name] and list(inputs[name].shape[1::2]) == [model.num_kv_heads, width]
        for name in past
    )
    fits = fits and outputs["logits"].type == names[model.float_type]
    fits = fits and outputs["logits"].shape[-1] == model.vocab_size
    if not fits:
        raise SpecQuantError(f"{folder / 'model.onnx'} is not the graph that specquant.json describes: re-export it")


def reason(error: Exception) -> str:
    """ONNX Runtime's message in a line, without the codes and function names before it."""
    return " ".join(str(error).split()).rsplit(" : ", 1)[-1][:200]


def run_graph(session: Any, binding: Any, options: Any = None) -> None:
    """Run with an IOBinding. Raises SpecQuantError if ONNX Runtime fails."""
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:  # onnxruntime's classes share no base of their own
        raise SpecQuantError(f"ONNX Runtime failed on this model: {reason(error)}") from error
