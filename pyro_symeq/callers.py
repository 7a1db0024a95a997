"""Whose code is on the stack."""

import sys
from types import FrameType


def stacklevel() -> int:
    """How far up the stack the user's own code is, for a warning of the function that asks."""
    frame, level = sys._getframe(1).f_back, 2
    while frame is not None and _is_ours(frame):
        frame, level = frame.f_back, level + 1
    return level


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name.split(".")[0] == "pyro_symeq" or name in ("contextlib", "torch.utils._contextlib")
