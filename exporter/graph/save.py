"""A model on disk: model.onnx and model.onnx.data."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

EXTERNAL_BYTES = 1024  # larger tensors go to model.onnx.data


def save_model(model: ir.Model, folder: Path) -> None:
    """Write model.onnx, and every tensor over 1 kB to model.onnx.data, in `folder`, which must exist.

    Tensors are made and written one at a time. Raises OSError if the disk is full; the caller writes to a
    temporary folder, so nothing half-written is taken for a model.
    """
    ir.save(
        model,
        folder / "model.onnx",
        external_data="model.onnx.data",
        size_threshold_bytes=EXTERNAL_BYTES,
    )
