"""Runs an exported graph in ONNX Runtime, a step at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from specquant.custom_ops.library import register
from specquant.exporter.decoder import Decoder
from specquant.exporter.graph import build_model, save_model
from specquant.exporter.graph.writer import FloatType


class Running:
    """A session and its KV cache. Rows are prompts, padded on the right. kernels: ours, else the ops' functions."""

    def __init__(
        self,
        decoder: Decoder,
        folder: Path,
        float_type: FloatType = "float32",
        kernels: bool = False,
        **overrides: Any,
    ) -> None:
        save_model(build_model(decoder, float_type, {}), folder)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # it warns that `rank` is an input
        if kernels:
            register(options)
        self.session = ort.InferenceSession(str(folder / "model.onnx"), options, ["CPUExecutionProvider"])
        self.config, self.overrides = decoder.config, overrides
        past = next(value for value in self.session.get_inputs() if value.name.startswith("past_key_values."))
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
        self.cache_type, self.cache_row = np.dtype(kinds[past.type]), past.shape[-1]
        self.names = [f"{i}.{part}" for i in range(self.config.num_layers) for part in ("key", "value")]
        self.past: list[NDArray[Any]] = []
        self.tokens = np.zeros(0, np.int64)

    def step(self, input_ids: NDArray[np.int64], new_tokens: list[int]) -> NDArray[Any]:
        """Logits [batch, sequence, vocab]; row b's first new_tokens[b] of input_ids [batch, sequence] count."""
        batch, sequence = input_ids.shape
        if not self.past:
            shape = (batch, self.config.num_kv_heads, 0, self.cache_row)
            self.past = [np.zeros(shape, self.cache_type) for _ in self.names]
            self.tokens = np.zeros(batch, np.int64)
        positions = self.tokens[:, None] + np.arange(sequence)
        self.tokens = self.tokens + new_tokens
        mask = np.arange(self.tokens.max())[None] < self.tokens[:, None]
        feeds = {"input_ids": input_ids, "attention_mask": mask.astype(np.int64), "position_ids": positions}
        cache = {f"past_key_values.{name}": past for name, past in zip(self.names, self.past, strict=True)}
        logits, *self.past = self.session.run(None, feeds | cache | self.overrides)
        return logits
