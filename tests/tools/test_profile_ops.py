"""The profile: what is counted, and that it adds up."""

from __future__ import annotations

from tools.profile_ops import by_operator


def node(name: str, op: str, microseconds: int, what: str = "_kernel_time") -> dict[str, object]:
    return {"cat": "Node", "name": f"{name}{what}", "dur": microseconds, "args": {"op_name": op}}


def test_kernels_are_summed_by_operator() -> None:
    events: list[dict[str, object]] = [
        node("model.layers.0.mlp.down_proj", "SpecQuantMatMul", 5),
        node("model.layers.1.mlp.down_proj", "SpecQuantMatMul", 7),
        node("model.layers.1.mlp.down_proj", "SpecQuantMatMul", 100, "_fence_before"),
        node("model.layers.0.self_attn.o_proj", "SpecQuantMatMul", 4),
        node("model.norm", "RMSNormalization", 50),
        {"cat": "Session", "name": "model_run", "dur": 1000},
    ]
    found = by_operator(events)  # type: ignore[arg-type]
    assert found == {
        "RMSNormalization": (50, 1),
        "SpecQuantMatMul down_proj": (12, 2),
        "SpecQuantMatMul o_proj": (4, 1),
    }
    assert next(iter(found)) == "RMSNormalization"
