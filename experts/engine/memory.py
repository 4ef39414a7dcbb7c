"""How much memory there is for keys and values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import torch

CACHE_SHARE: Final = 0.5
"""Share of the free memory that keys and values may take: the rest is for activations, adapters and other programs."""

UNKNOWN_BYTES: Final = 2 * 2**30
"""Memory for keys and values where the system does not tell how much is free."""


def cache_budget(device: torch.device) -> int:
    """Bytes that keys and values may take on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * CACHE_SHARE)
    available = _available()
    return UNKNOWN_BYTES if available is None else int(available * CACHE_SHARE)


def _available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
