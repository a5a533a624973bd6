"""Sequences on a device that chooses their tokens by itself, so that steps follow each other without the host."""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library_cuda import Sample
from specquant.runtime.on_device import DECODE, DeviceSequences, Memory, OnDevice, Tensors
from specquant.runtime.sampling import LEAST_TEMPERATURE

AHEAD = 4  # steps: the host's part of one is short, and what is under way at the end of a text is for nothing


class StepMemory(Memory, Protocol):
    """What of cuda_driver.Device is used here."""

    stream: int

    def pin(self, size: int) -> int: ...
    def unpin(self, place: int) -> None: ...
    def event(self) -> int: ...
    def mark(self, event: int) -> None: ...
    def done(self, event: int) -> bool: ...
    def wait(self, event: int) -> None: ...
    def seconds(self, since: int, until: int) -> float: ...
    def drop_event(self, event: int) -> None: ...


class Sampler(Protocol):
    """What of custom_ops.library_cuda_sample is used here."""

    def sample_workspace(self, problem: Sample) -> int: ...
    def run_sample(self, problem: Sample, workspace: int, stream: int) -> None: ...


class Chooser:
    """What chooses tokens on a device, and what steps of sequences that are gone left for others."""

    def __init__(self, memory: StepMemory, sampler: Sampler) -> None:
        self.memory, self.sampler = memory, sampler
        self._spare: list[Slots] = []

    def borrow(self, rows: int) -> Slots:
        """For so many rows."""
        for index, slots in enumerate(self._spare):
            if slots.rows >= rows:
                return self._spare.pop(index)
        return Slots(self.memory, self.sampler, rows)

    def give_back(self, slots: Slots) -> None:
        """What is under way may go on: later steps come after it."""
        self._spare.append(slots)


def load_chooser(memory: StepMemory) -> Chooser | None:
    """With our kernels; None where they are not installed: tokens are then chosen on the host."""
    from specquant.custom_ops import library_cuda, library_cuda_sample

    try:
        library_cuda.check_device()
    except SpecQuantError:
        return None
    return Chooser(memory, library_cuda_sample)


class ChoosingOnDevice(OnDevice):
    """Implements session.Backend; with a chooser, its sequences implement session.Choosing."""

    chooser: Chooser | None = None

    def sequences(self, rows: int) -> DeviceSequences:
        return ChoosingSequences(self, self.chooser, rows) if self.chooser else super().sequences(rows)


class Slots:
    """What steps under way need at fixed places: their uniform numbers float64 and results int64, [AHEAD, rows] in
    pinned memory, two events each, and the kernels' workspace."""

    def __init__(self, memory: StepMemory, sampler: Sampler, rows: int) -> None:
        self.rows, self._memory = rows, memory
        count = 2 * AHEAD * rows
        self._pinned = memory.pin(8 * count)
        numbers = np.ctypeslib.as_array((ctypes.c_double * count).from_address(self._pinned)).reshape(2, AHEAD, rows)
        self.uniforms, self.results = numbers[0], numbers[1].view(np.int64)
        self.events = [(memory.event(), memory.event()) for _ in range(AHEAD)]
        size = sampler.sample_workspace(Sample(rows=rows, vocab=1, stride=1))
        self.workspace = memory.allocate(size)
        memory.clear(self.workspace, size)

    def __del__(self) -> None:
        if not hasattr(self, "workspace"):
            return
        self._memory.free(self.workspace)
        self._memory.unpin(self._pinned)
        for event in (event for pair in self.events for event in pair):
            self._memory.drop_event(event)


class ChoosingSequences(DeviceSequences):
    """Implements session.Sequences and session.Choosing."""

    ahead = AHEAD

    def __init__(self, backend: OnDevice, chooser: Chooser, rows: int) -> None:
        super().__init__(backend, rows)
        self._chooser = chooser
        self._slots: Slots | None = None  # once there is a step
        self._enqueued = self._taken = 0
        self._problems: list[Sample] = []  # of each slot
        self._bound: tuple[int, Tensors] = (0, {})  # of steps: the mask's width, and the tensors

    def __del__(self) -> None:
        if slots := getattr(self, "_slots", None):
            if self._taken < self._enqueued:  # it uses memory that is about to be freed
                self._chooser.memory.wait(slots.events[(self._enqueued - 1) % AHEAD][1])
            self._chooser.give_back(slots)
        super().__del__()

    def start(self, ids: NDArray[np.int64], temperature: float, top_k: int) -> None:
        backend, vocab = self._backend, self._backend.model.vocab_size
        if self._slots is None:
            self._slots = self._chooser.borrow(len(ids))
        self._bound = (0, {})
        self._give(DECODE, 0, ids[:, None])
        self._problems = [
            Sample(
                rows=len(ids),
                vocab=vocab,
                stride=vocab,
                top_k=min(int(top_k), vocab),
                half=backend.dtype == np.float16,
                temperature=max(temperature, LEAST_TEMPERATURE) if temperature else 0.0,
                logits=self._logits,
                uniforms=self._slots.uniforms[slot].ctypes.data,
                ids=self._ids,
                position_ids=self._positions,
                attention_mask=self._mask,
                results=self._slots.results[slot].ctypes.data,
            )
            for slot in range(AHEAD)
        ]

    def enqueue(self, uniforms: NDArray[np.float64]) -> None:
        slots, memory, rows = self._under_way(), self._chooser.memory, len(self._lengths)
        slot = self._enqueued % AHEAD
        since, until = slots.events[slot]
        slots.uniforms[slot, : len(uniforms)] = uniforms
        total = self._lengths + 1
        width = self._width(DECODE, int(total.max()))
        if width != self._bound[0]:
            self._bound = (width, self._tensors(0, (rows, 1), width, 1))
        memory.mark(since)
        self._show_mask(0, width, total)
        self._backend.graph.run(DECODE, self._bound[1], 1)
        self._problems[slot].width = width
        self._chooser.sampler.run_sample(self._problems[slot], slots.workspace, memory.stream)
        memory.mark(until)
        self._masked = (0, width, *(total + 1).tolist())  # the kernels set the next one
        self._lengths = total
        self._enqueued += 1

    def ready(self) -> bool:
        return self._chooser.memory.done(self._under_way().events[self._taken % AHEAD][1])

    def take(self) -> tuple[NDArray[np.int64], float]:
        slots, memory, slot = self._under_way(), self._chooser.memory, self._taken % AHEAD
        since, until = slots.events[slot]
        memory.wait(until)
        self._taken += 1
        return slots.results[slot, : len(self._lengths)].copy(), memory.seconds(since, until)

    def _under_way(self) -> Slots:
        if self._slots is None:
            raise ValueError("start comes before steps")
        return self._slots
