"""How much memory this machine has, how much of it is free now, and limits that it cannot keep."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

from mlxgpt.common.config import TrainConfig
from mlxgpt.common.errors import UserError

_MIB = 2**20
_CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def total() -> int:
    """Bytes of memory, or of what the container may use."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *(limit for limit, _ in _limits())])


def free() -> int:
    """Bytes that can be taken now without swapping; half of all where the system does not say."""
    try:
        found = _free()
    except (OSError, subprocess.SubprocessError, TypeError):  # the system does not say
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min([found, *(max(0, limit - used) for limit, used in _limits())])


def room(capacity: dict[str, int]) -> dict[str, int]:
    """Bytes: ``total`` and ``free`` where arrays live, ``recommended`` by Metal (else 0), the ``limit`` of a run.

    ``capacity`` is what devices.capacity says of the device.
    """
    found = {"total": total(), "free": free(), "recommended": 0} | capacity
    return {**found, "limit": min(found["free"], found["recommended"] or found["free"])}


def check_limits(train: TrainConfig, capacity: dict[str, int]) -> None:
    """Refuses limits of ``train`` above what exists: the device's memory, for Metal's wired memory its working set.

    ``capacity`` is what devices.capacity says of the device.

    Raises:
        UserError: names the limit and what there is.
    """
    whole, working = capacity.get("total", 0) or total(), capacity.get("recommended", 0)
    for name in ("memory_limit", "cache_limit", "wired_limit"):
        asked, most, what = getattr(train, name), whole, "the memory"
        if name == "wired_limit" and working:
            most, what = working, "the device's recommended working set"
        if asked * _MIB > most:
            raise UserError(f"train.{name} = {asked}: {what} is {most // _MIB} MiB; expected at most that, or 0")


def _free() -> int:
    if sys.platform == "darwin":
        text = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout
        page = int(re.search(r"page size of (\d+)", text)[1])  # type: ignore[index]
        pages = {name: int(count) for name, count in re.findall(r"^Pages (.+?):\s+(\d+)", text, re.MULTILINE)}
        return page * sum(pages.get(name, 0) for name in ("free", "inactive", "speculative", "purgeable"))
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def address_space() -> int | None:
    """Bytes of this process's address space, which RLIMIT_AS is about; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _limits() -> list[tuple[int, int]]:
    """(limit, used) of the control group that this process is in, and of its address space, where there is one."""
    found = []
    for names in _CGROUPS:
        try:
            limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in names)
        except OSError:
            continue
        if limit.isdecimal():
            found.append((int(limit), int(used)))
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = address_space()
    if space != resource.RLIM_INFINITY and used is not None:  # ulimit -v
        found.append((space, used))
    return found
