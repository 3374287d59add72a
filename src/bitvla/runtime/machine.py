"""What this process uses and this machine is, as the system tells it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from pathlib import Path


def memory() -> dict[str, int]:
    """Memory of this process in bytes: peak, resident now, and of that anonymous and file-backed (Linux only)."""
    names = {"VmHWM": "peak", "VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file_backed"}
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {label: 1024 * int(fields[name].split()[0]) for name, label in names.items() if name in fields}


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library keeps it for itself (glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
