"""Calls that are recorded and replayed: by a device that only counts, and on a GPU; and an engine's contexts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.cuda_driver import Device
from specquant.runtime.cuda_graph import Replayed
from specquant.runtime.on_device import DECODE, PREFILL
from specquant.runtime.tensorrt_contexts import Contexts
from tests.host_memory import HostMemory


class Counting(HostMemory):
    """Records and replays by name, and can refuse to record."""

    stream = 7

    def __init__(self, records: bool = True) -> None:
        super().__init__()
        self.records, self.done, self.alive = records, [], set()
        self.recording = False

    def record(self, work: Callable[[], None]) -> int:
        if not self.records:
            raise SpecQuantError("cannot be recorded")
        self.recording = True
        work()
        self.recording = False
        self.alive.add(len(self.done) + 1)
        return len(self.done) + 1

    def replay(self, graph: int) -> None:
        assert graph in self.alive
        self.done.append("replayed")

    def forget(self, graph: int) -> None:
        self.alive.remove(graph)

    def work(self) -> None:
        if not self.recording:
            self.done.append("made")


def test_the_second_call_is_recorded() -> None:
    device = Counting()
    replayed = Replayed(device)
    for kind in "aaaabba":
        replayed.run(kind, device.work)
    assert device.done == ["made", "replayed", "replayed", "replayed", "made", "replayed", "made"]
    assert device.alive == set()
    replayed.run("a", device.work)
    assert len(device.alive) == 1
    replayed.forget()
    assert device.alive == set()


def test_what_cannot_be_recorded_is_made() -> None:
    device = Counting(records=False)
    replayed = Replayed(device)
    for _ in range(4):
        replayed.run("a", device.work)
    assert device.done == ["made"] * 4
    assert not replayed.possible


def test_a_gpu_replays_what_it_recorded(rng: np.random.Generator) -> None:
    try:
        device = Device()
    except SpecQuantError as missing:
        pytest.skip(str(missing))
    replayed, (source, to) = Replayed(device), (device.allocate(400) for _ in range(2))
    for _ in range(5):
        given, found = rng.standard_normal(100).astype(np.float32), np.zeros(100, np.float32)
        device.upload(source, given)
        replayed.run("copy", lambda: device.copy(to, source, 400))
        device.download(found, to)
        np.testing.assert_array_equal(found, given)
    assert replayed.possible
    replayed.forget()

    def waits() -> None:
        device.download(np.zeros(1, np.float32), to)

    for _ in range(3):  # the host cannot wait in a graph
        replayed.run("wait", waits)
    assert not replayed.possible
    device.download(found, to)
    np.testing.assert_array_equal(found, given)


class Context:
    """What Contexts calls of TensorRT's, with batches up to `most`."""

    def __init__(self, most: int) -> None:
        self.most, self.shapes, self.addresses, self.runs, self.works = most, {}, {}, 0, True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= self.most

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == Counting.stream
        self.runs += 1
        return self.works


def contexts_of(device: Any, replay: bool, on_host: bool) -> tuple[Contexts, list[Context]]:
    api = SimpleNamespace(
        TensorIOMode=SimpleNamespace(INPUT="input"), TensorLocation=SimpleNamespace(HOST="host", DEVICE="device")
    )
    engine = SimpleNamespace(
        get_tensor_location=lambda name: "host" if on_host else "device",
        get_tensor_mode=lambda name: "output" if name == "logits" else "input",
    )
    made = [Context(1), Context(3)]
    return Contexts(api, engine, made, device, replay, lambda: "the reason"), made


@pytest.mark.parametrize("on_host", [True, False])
def test_tensors_stay_bound(on_host: bool) -> None:
    """Each profile keeps its own logits_to_keep, whatever the other was called with."""
    device = Counting()
    contexts, (prefill, decode) = contexts_of(device, True, on_host)
    step = {"input_ids": (100, (2, 1)), "logits": (200, (2, 1, 9))}
    for keep in (5, 1, 7):
        contexts.run(PREFILL, {"input_ids": (300, (1, 8)), "logits": (400, (1, keep, 9))}, keep)
        contexts.run(DECODE, step, 1)
        place = decode.addresses["logits_to_keep"]
        held = np.frombuffer(device.arrays[place], np.int64) if not on_host else contexts._keeps[DECODE]
        assert (held[0], decode.addresses["input_ids"], decode.shapes["input_ids"]) == (1, 100, (2, 1))
        assert prefill.addresses["logits_to_keep"] != place
        decode.addresses.clear()  # bound once only
        decode.addresses["logits_to_keep"], decode.addresses["input_ids"] = place, 100
    assert (prefill.runs, decode.runs) == (3, 2)  # the second step was recorded, and replayed since
    assert device.done == ["replayed", "replayed"]
    assert decode.shapes.keys() == {"input_ids", "logits_to_keep"}


def test_without_replay_every_step_is_enqueued() -> None:
    device = Counting()
    contexts, (_, decode) = contexts_of(device, False, True)
    for _ in range(4):
        contexts.run(DECODE, {"input_ids": (100, (2, 1))}, 1)
    assert (decode.runs, device.done) == (4, [])


def test_what_the_engine_does_not_take() -> None:
    contexts, (_, decode) = contexts_of(Counting(), True, True)
    for _ in range(2):  # it was not taken for bound
        with pytest.raises(SpecQuantError, match=r"input_ids \[4, 1\] is outside the engine's profile: the reason"):
            contexts.run(DECODE, {"input_ids": (100, (4, 1))}, 1)
    decode.works = False
    with pytest.raises(SpecQuantError, match="TensorRT failed on this engine: the reason"):
        contexts.run(DECODE, {"input_ids": (100, (2, 1))}, 1)
