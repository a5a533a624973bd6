"""Calls that come again and again, recorded once as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

from specquant.custom_ops.errors import SpecQuantError


class Recorder(Protocol):
    """What of cuda_driver.Device is used here."""

    def record(self, work: Callable[[], None]) -> int: ...
    def replay(self, graph: int) -> None: ...
    def forget(self, graph: int) -> None: ...


class Replayed:
    """The first call of its kind is made, the second recorded, and from then on that is replayed. One kind at a time.

    `possible` turns False, and every call is made, if one cannot be recorded: slower, the same results.
    """

    def __init__(self, device: Recorder) -> None:
        self.possible = True
        self._device, self._graph = device, 0
        self._kind: Hashable = None

    def run(self, kind: Hashable, work: Callable[[], None]) -> None:
        """kind: all that the work depends on but what lies in the GPU's memory."""
        if kind != self._kind:
            self.forget()
            self._kind = kind
            work()
            return
        if not self._graph and self.possible:
            try:
                self._graph = self._device.record(work)
            except SpecQuantError:
                self.possible = False
        if self._graph:
            self._device.replay(self._graph)
        else:
            work()

    def forget(self) -> None:
        """Of what was recorded: it names memory that may be given to others."""
        if self._graph:
            self._device.forget(self._graph)
        self._graph, self._kind = 0, None
