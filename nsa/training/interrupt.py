"""Signals that let the current step end."""

from __future__ import annotations

import signal
import threading
from types import FrameType

_HANG_UP = getattr(signal, "SIGHUP", None)  # Windows has none


class StopRequest:
    """Notes that somebody wants the training to stop; a context manager.

    While active, the first SIGINT or SIGTERM only sets :attr:`requested`; a second one raises
    KeyboardInterrupt at once, and a third ends the process even inside a call that hangs. SIGHUP,
    which a closed terminal sends, sets it however often it comes; where it is ignored (``nohup``),
    it stays so. Outside the main thread, which alone may handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._impatient = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if _HANG_UP is not None and signal.getsignal(_HANG_UP) != signal.SIG_IGN:
                numbers.append(_HANG_UP)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            # None: installed by C code; Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == _HANG_UP:  # the shell sends one as well as the system
            return
        if self._impatient:
            for known in self._previous:
                signal.signal(known, signal.SIG_DFL)
            raise KeyboardInterrupt
        self._impatient = True
