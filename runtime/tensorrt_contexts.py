"""The calls of an engine: what is bound to its execution contexts, and how decoding is replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.cuda_driver import Device
from specquant.runtime.cuda_graph import Replayed
from specquant.runtime.on_device import DECODE, Tensors

_KEEP = "logits_to_keep"


class Contexts:
    """Implements on_device.Graph: a context a profile, on the device's stream, its tensors bound while they stay.

    replay: steps of decoding are recorded as CUDA graphs here; TensorRT-RTX does so itself. reason: what TensorRT said
    last.
    """

    def __init__(
        self, api: Any, engine: Any, contexts: list[Any], device: Device, replay: bool, reason: Callable[[], str]
    ) -> None:
        self._engine, self._contexts, self._device, self._reason = engine, contexts, device, reason
        self._input = api.TensorIOMode.INPUT
        self._bound: list[Any] = [None] * len(contexts)
        self.replayed = Replayed(device) if replay else None
        # Of each profile, since they stay bound. A shape tensor is read on the host.
        self._keeps = [np.zeros(1, np.int64) for _ in contexts]
        on_host = self._keep_on_host = engine.get_tensor_location(_KEEP) == api.TensorLocation.HOST
        self._keep_places = [keep.ctypes.data if on_host else device.allocate(8) for keep in self._keeps]

    def run(self, profile: int, tensors: Tensors, keep: int) -> None:
        """Enqueue one call. Raises SpecQuantError if a shape is outside the profile, or TensorRT fails."""
        what = (keep, *tensors.items())
        if what != self._bound[profile]:
            self._bound[profile] = None
            self._bind(profile, tensors, keep)
            self._bound[profile] = what

        def work() -> None:
            if not self._contexts[profile].execute_async_v3(self._device.stream):
                raise SpecQuantError(f"TensorRT failed on this engine: {self._reason()}")

        if self.replayed and profile == DECODE:
            self.replayed.run(what, work)
        else:
            work()

    def _bind(self, profile: int, tensors: Tensors, keep: int) -> None:
        context, place = self._contexts[profile], self._keep_places[profile]
        self._keeps[profile][0] = keep
        if not self._keep_on_host:
            self._device.upload(place, self._keeps[profile])
        for name, (address, shape) in {**tensors, _KEEP: (place, (1,))}.items():
            if self._engine.get_tensor_mode(name) == self._input and not context.set_input_shape(name, shape):
                raise SpecQuantError(f"{name} {list(shape)} is outside the engine's profile: {self._reason()}")
            context.set_tensor_address(name, address)
