"""A pytest plugin: the kernels of another machine's library, under an emulator, in place of this machine's.

    SPECQUANT_EMULATED='qemu-aarch64-static -L /usr/aarch64-linux-gnu driver' pytest -p tests.emulated …

The tests stay as they are: `library.loaded()` becomes an object whose functions send their arguments, and the arrays
behind them, to tests/emulated.cc.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import struct
import subprocess
from collections.abc import Sequence
from functools import partial
from typing import Any

from specquant.custom_ops import library
from specquant.custom_ops.kv_rows import row_bytes

LIST, RUN, ATTEND, QUANTIZE = range(4)


def matmul_bytes(p: Any) -> dict[str, int]:
    """Bytes behind each pointer of a `Problem` (kernels.h)."""
    n, m, r, element = p.in_features, p.out_features, p.basis_rank, 2 if p.half else 4
    return {
        "x": p.tokens * n * element,
        "basis": n * r * 2,
        "coef": r * m * 2,
        "qweight": -(-m // 16) * -(-n // 8) * 64,
        "group_scales": -(-m // 16) * (n // (p.group_size or n)) * 8,
        "scales": m * 2,
        "bias": m * 4,
        "norm": n * 4,
        "residual": p.tokens * m * element,
        "y": p.tokens * (m // 2 if p.gate else m) * element,
        "low": p.tokens * r * element,
    }


def attention_bytes(a: Any) -> dict[str, int]:
    """Bytes behind each pointer of an `Attention` (attention.h)."""
    element, d = 2 if a.half else 4, a.head_dim
    tables, row = a.context * a.rotary * 4, row_bytes(d) if a.kv_bits == 4 else 2 * d
    cache = a.batch * a.kv_num_heads * row
    return {
        "qkv": a.batch * a.sequence * (a.num_heads + 2 * a.kv_num_heads) * d * element,
        "past_key": cache * a.past_rows,
        "past_value": cache * a.past_rows,
        "seqlens_k": a.batch * 4,
        "position_ids": a.batch * a.sequence * 8,
        "cos": tables,
        "sin": tables,
        "key_offset": a.kv_num_heads * d * 4,
        "present_key": cache * a.present_rows,
        "present_value": cache * a.present_rows,
        "y": a.batch * a.sequence * a.num_heads * d * element,
    }


class Emulated:
    """What the tests use of the library, by calls into the process `command`."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._error = b""
        attention_size, *isas = self._call(LIST, None, b"", [], []).decode().splitlines()
        self._isas = [line.split() for line in isas]
        self.specquant_attention_size = partial(int, attention_size)  # restype can be set

    def specquant_isa(self, index: int) -> bytes | None:
        return self._isas[index][0].encode() if index < len(self._isas) else None

    def specquant_isa_supported(self, name: bytes) -> int:
        return int(dict(self._isas)[name.decode()])

    def specquant_run(self, problem: Any, isa: bytes | None) -> bytes | None:
        return self._structure(RUN, problem._obj, matmul_bytes, isa)

    def specquant_attend(self, attention: Any, isa: bytes | None) -> bytes | None:
        return self._structure(ATTEND, attention._obj, attention_bytes, isa)

    def specquant_quantize(
        self, u: int, n: int, bits: int, group: int, clip: float, levels: int, scale: int, isa: bytes | None
    ) -> bytes | None:
        sizes = [(u, 4 * n), (levels, n), (scale, 4 * (n // group if group else 1))]
        arguments = struct.pack("<qqif24x", n, group, bits, clip)
        return self._call(QUANTIZE, isa, arguments, sizes, [(24 + 8 * i, i) for i in range(3)]) or None

    def _structure(self, which: int, structure: Any, sizes: Any, isa: bytes | None) -> bytes | None:
        pointers = {name: getattr(structure, name) for name in sizes(structure)}
        lengths: dict[int, int] = {}  # a cache that is extended in place is one region of two pointers
        for name, size in sizes(structure).items():
            if address := pointers[name]:
                lengths[address] = max(lengths.get(address, 0), size)
        order = {address: index for index, address in enumerate(lengths)}
        places = [
            (getattr(type(structure), name).offset, order[address] if address else -1)
            for name, address in pointers.items()
        ]
        return self._call(which, isa, bytes(structure), list(lengths.items()), places) or None

    def _call(
        self,
        which: int,
        isa: bytes | None,
        arguments: bytes,
        regions: Sequence[tuple[int, int]],
        places: Sequence[tuple[int, int]],
    ) -> bytes:
        sent = [struct.pack("<q", which), _sized(isa or b""), _sized(arguments), struct.pack("<q", len(regions))]
        sent += [_sized(ctypes.string_at(address, size)) for address, size in regions]
        sent += [struct.pack("<q", len(places)), *(struct.pack("<qq", *place) for place in places)]
        to, answers = self._process.stdin, self._process.stdout
        assert to
        assert answers
        to.write(b"".join(sent))
        to.flush()

        def answer() -> bytes:
            head = answers.read(8)
            assert len(head) == 8, f"the emulator ended with code {self._process.wait()}"
            return answers.read(struct.unpack("<q", head)[0])

        error = answer()
        for address, size in regions:
            ctypes.memmove(address, answer(), size)
        return error


def _sized(data: bytes) -> bytes:
    return struct.pack("<q", len(data)) + data


emulated = Emulated(shlex.split(os.environ["SPECQUANT_EMULATED"]))
library.loaded = lambda: emulated  # type: ignore[assignment, return-value]
