"""The memory of a process."""

import resource
from pathlib import Path

__all__ = ["resident_peak"]


def resident_peak() -> float:
    """The peak of this process (MiB).

    ``getrusage`` stands in where Linux's own figure is missing: there, its figure is that of the
    process that started this one, if that is higher.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10
