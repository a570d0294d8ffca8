"""A polite end: SIGTERM and SIGINT raise a flag that the training loop reads at the border of a step."""

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """Remember SIGTERM and SIGINT inside a ``with`` block; the earlier handlers come back after it.

    A second SIGINT interrupts at once, for the reader at the keyboard who cannot wait. Outside the main thread, where
    Python allows no handlers, nothing is installed and the flag stays down.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._earlier: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
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
