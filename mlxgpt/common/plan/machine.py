"""How much memory this machine has, and how much of it is free now."""

import os
import re
import subprocess
import sys
from pathlib import Path

_CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def total() -> int:
    """Bytes of memory, or of what the container may use."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *(limit for limit, _ in _limits())])


def free() -> int:
    """Bytes that can be taken now without swapping."""
    return min([_free(), *(max(0, limit - used) for limit, used in _limits())])


def _free() -> int:
    if sys.platform == "darwin":
        text = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout
        page = int(re.search(r"page size of (\d+)", text)[1])  # type: ignore[index]
        pages = {name: int(count) for name, count in re.findall(r"^Pages (.+?):\s+(\d+)", text, re.MULTILINE)}
        return page * sum(pages.get(name, 0) for name in ("free", "inactive", "speculative", "purgeable"))
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _limits() -> list[tuple[int, int]]:
    """(limit, used) of the control group that this process is in, where it has one."""
    found = []
    for names in _CGROUPS:
        try:
            limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in names)
        except OSError:
            continue
        if limit.isdecimal():
            found.append((int(limit), int(used)))
    return found
