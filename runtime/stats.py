"""What a run cost: tokens and times of one call, peak memory of the process, and the machine it ran on."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class GenerationStats:
    """One call of generate, generate_batch or chat; of a batch, the sums.

    Times count the model, sampling and text decoding, not what the caller does between pieces. Where the device
    decodes on meanwhile (session.Choosing), the time of decoding is no less than the device's own.
    time_to_first_token_s runs from the first step of prefill to the first sampled token (of a batch: tokens).
    decode_tokens_per_s counts the tokens after the first of each prompt; 0 when there is none.
    finish_reason: `stop` (an end-of-text token or a stop string), `length` (max_new_tokens or a full context;
    of a batch, if any prompt ended so), `cancelled` (the caller stopped reading, or an error).
    """

    prompt_tokens: int
    new_tokens: int
    time_to_first_token_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_memory_bytes: int | None
    finish_reason: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        memory = "" if self.peak_memory_bytes is None else f", peak memory {self.peak_memory_bytes / 2**20:,.0f} MiB"
        return (
            f"{self.prompt_tokens} prompt tokens at {self.prefill_tokens_per_s:,.0f} tokens/s, "
            f"first token after {self.time_to_first_token_s * 1e3:,.0f} ms, "
            f"{self.new_tokens} new tokens at {self.decode_tokens_per_s:,.1f} tokens/s{memory} ({self.finish_reason})"
        )


def version() -> str:
    """The installed version of specquant; `0+source` when it runs from a source tree."""
    try:
        return metadata.version("specquant")
    except metadata.PackageNotFoundError:
        return "0+source"


def peak_memory() -> int | None:
    """The largest resident memory this process has had, in bytes; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_cpus() -> list[int]:
    """The logical CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """How many physical cores this process may use: affinity and the container's CPU quota included."""
    cores = set()
    for cpu in available_cpus():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        # Logical CPUs that name the same siblings are one core; without that file each counts by itself.
        cores.add(siblings.read_text().strip() if siblings.is_file() else str(cpu))
    quota = _cpu_quota()
    return max(1, min(len(cores), quota) if quota else len(cores))


def _cpu_quota() -> int | None:
    limit = Path("/sys/fs/cgroup/cpu.max")
    if not limit.is_file():
        return None
    quota, period = limit.read_text().split()
    return None if quota == "max" else max(1, round(int(quota) / int(period)))


def machine_info() -> dict[str, Any]:
    """What a published number must say of its machine: processor, cores, memory in bytes, system, versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    info: dict[str, Any] = {
        "processor": processor,
        "physical_cores": physical_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "specquant": version(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        info["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            info["onnxruntime"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return info
