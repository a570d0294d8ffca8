"""Graceful shutdown: SIGTERM, SIGINT and SIGHUP set a flag that the training loop checks after every step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Remember SIGTERM, SIGINT and SIGHUP inside a ``with`` block; the earlier handlers come back after it.

    A second SIGINT interrupts at once, for the reader at the keyboard who cannot wait. SIGHUP, which comes when a
    terminal is closed, stays ignored where it was (nohup). Outside the main thread, where Python allows no handlers,
    nothing is installed and the flag stays down.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._earlier[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
