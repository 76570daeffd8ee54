"""SIGTERM and SIGINT while training: the run is saved after the step, and goes on from there."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning as L

from fusion_upcycle.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopping(L.Callback):
    """What asks a run to stop; a block in which signals do.

    While steps are taken a first signal is kept for the end of the step; a second one, and any at
    other times, ends the run at once. In other threads than the main one signals are Python's.

    Attributes:
        asked: the signal that came.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._stepping = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            found = {each: signal.getsignal(each) for each in _SIGNALS}
            self._before = {s: each for s, each in found.items() if each is not signal.SIG_IGN}
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Lightning has set its own handlers, which end the step and save nothing."""
        self._listen()
        self._stepping = True

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self._stepping = False

    def after_fit(self, said: str) -> None:
        """Lightning has set back what was before it; stop, where that was asked.

        Args:
            said: where the run stands, in words, of the first process; the others say nothing.

        Raises:
            Stopped: it was.
        """
        self._stepping = False
        self._listen()
        if self.asked is not None:
            raise Stopped(self.asked, said)

    def _listen(self) -> None:
        for each in self._before:
            signal.signal(each, self._told)

    def _told(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked is not None, signal.Signals(number)
        if again or not self._stepping:
            when = "before the step was saved" if self._stepping else "outside of the steps"
            first = os.environ.get("RANK", "0") == "0"
            raise Stopped(self.asked, f"{when}; the same command goes on" if first else "")
