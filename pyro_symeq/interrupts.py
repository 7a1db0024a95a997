"""Ctrl-C, which waits where something must not be left half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Shield:
    """Lets Ctrl-C wait until its end, or until it is lowered.

    Python runs handlers of signals in the main thread alone; elsewhere there is nothing to do.
    """

    def __init__(self) -> None:
        self._previous: Any = None
        self._is_up = False
        self._came = False

    def __enter__(self) -> None:
        previous = signal.getsignal(signal.SIGINT)
        self._is_up, self._came = True, False
        if threading.current_thread() is threading.main_thread() and callable(previous):
            self._previous = previous
            signal.signal(signal.SIGINT, self._handle)

    def __exit__(self, *_: object) -> None:
        self._is_up = False
        if signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._previous)
        self._let_in()

    @contextmanager
    def lowered(self) -> Iterator[None]:
        """Lets Ctrl-C in for a while."""
        was_up, self._is_up = self._is_up, False
        try:
            self._let_in()
            yield
        finally:
            self._is_up = was_up

    def _handle(self, *call: Any) -> None:
        if self._is_up:
            self._came = True
        else:
            self._previous(*call)

    def _let_in(self) -> None:
        if self._came:
            self._came = False
            signal.raise_signal(signal.SIGINT)
