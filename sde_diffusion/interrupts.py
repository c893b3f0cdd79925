"""Stopping politely: Ctrl-C and SIGTERM become a flag that a loop looks at between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopSignals", "TrainingInterrupted"]


class TrainingInterrupted(Exception):
    """Ctrl-C or SIGTERM: everything is saved; the message says how to go on.

    Attributes:
        step: steps done.
        checkpoint: where they are saved.
    """

    def __init__(self, signal_name: str, step: int, steps: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped by {signal_name} after step {step} of {steps}; saved in {checkpoint}. "
            "Run the same command again to resume from there."
        )
        self.step = step
        self.checkpoint = checkpoint


class StopSignals:
    """A context in which SIGINT and SIGTERM set :attr:`received`; the second SIGINT interrupts at once.

    Only the main thread can receive signals: in any other the context does nothing. The previous handlers
    return at the end.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            hint = " (Ctrl-C again: stop at once, unsaved)" if number == signal.SIGINT else ""
            # Not print: a handler may run in the middle of a write to the same buffer.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{name}: finishing this step, then saving{hint}\n".encode())
        self.received = name
