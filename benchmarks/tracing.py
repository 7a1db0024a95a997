"""A profile of a few steps, and how often they make the host wait for the device."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

__all__ = ["WAITS", "trace"]

WAITS = (
    "aten::item",
    "aten::_local_scalar_dense",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaDeviceSynchronize",
    "Memcpy DtoH",
)
STEP = "training step"


def trace(step: Callable[[], object], path: Path, num_steps: int = 5) -> dict[str, float]:
    """Writes a Chrome trace of steps.

    Args:
        step: Takes a step.
        path: The file to write, which chrome://tracing and ui.perfetto.dev open.
        num_steps: The number of steps to profile.

    Returns:
        How often a step does each of the things that make the host wait. One wait may count as
        several: ``item()`` copies memory and synchronises the stream.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(num_steps):
            with record_function(STEP):
                step()
    profiler.export_chrome_trace(str(path))
    events = [(e.name, e.time_range.start, e.time_range.end) for e in profiler.events() or ()]
    begin = min(start for name, start, _ in events if name == STEP)
    # The profiler itself synchronises after the last step. Copies end later than what ordered them.
    end = max(end for name, _, end in events if name == STEP)
    counts = Counter(
        wait
        for name, start, _ in events
        for wait in WAITS
        if name.startswith(wait) and (begin <= start <= end or wait == "Memcpy DtoH")
    )
    return {wait: counts[wait] / num_steps for wait in WAITS}
