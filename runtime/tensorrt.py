"""The TensorRT backend: what an engine's sizes mean for sequences on the GPU (on_device.py)."""

from __future__ import annotations

import numpy as np

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.artifact import ModelInfo
from specquant.runtime.choosing import ChoosingOnDevice
from specquant.runtime.engine import EngineInfo
from specquant.runtime.on_device import DeviceSequences, Graph, Memory


class TensorRT(ChoosingOnDevice):
    """Implements session.Backend with an engine.

    Its cache is the artifact's in a `custom` engine; in a `portable` one it is of the engine's float type, even where
    the artifact's has 4 bits.
    """

    def __init__(self, engine: Graph, memory: Memory, info: EngineInfo, model: ModelInfo, context: int) -> None:
        dtype: np.dtype[np.floating] = np.dtype(info.float_type)
        super().__init__(
            engine,
            memory,
            model,
            context,
            capacity=info.max_seq,
            prompt_block=info.block,
            dtype=dtype,
            cache_row=model.cache_row if info.profile == "custom" else (model.head_dim, dtype),
        )
        self.info = info

    def sequences(self, rows: int) -> DeviceSequences:
        if rows > self.info.max_batch:
            raise SpecQuantError(
                f"{rows} prompts at once exceed this engine's batch of {self.info.max_batch}: build it with "
                f"`--max-batch {rows}`, or give fewer"
            )
        return super().sequences(rows)

    def check_length(self, tokens: int) -> None:
        if tokens > self.context:
            raise SpecQuantError(
                f"{tokens} tokens exceed this engine's {self.context}: build it with `--max-seq {tokens}`"
            )
