"""Signals that ask a run to stop: noted while it trains, an orderly end before that.

SIGTERM, SIGUSR1 (Slurm's `--signal`, torchrun passing on its own SIGTERM) and Ctrl-C. Imports no torch, so that the
first lines of a program can call it.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from hf_mamba.run.processes import end_with_launcher

EXIT_REQUEUE = 85  # run the same command again: it goes on where it was
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECONDS_TO_END = 10.0  # for what is on the way to remove its temporary files and stop its processes


class SignalFlag:
    """Whether a signal has come. Outside `defer()`, one ends the program: nothing would be lost.

    Such an end removes temporary files and stops workers, as any exception does; after `SECONDS_TO_END`, or at a second
    signal, the process ends wherever it is.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferred = False
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._deferred:
            self.received = self.received or name
            return
        if self.received:
            os._exit(EXIT_REQUEUE)
        self.received = name
        os.write(2, f"{name} outside the steps of training: nothing to save. Run the same command again.\n".encode())
        late = threading.Timer(SECONDS_TO_END, os._exit, [EXIT_REQUEUE])
        late.daemon = True
        late.start()
        raise SystemExit(EXIT_REQUEUE)

    @contextmanager
    def defer(self) -> Iterator[None]:
        """Signals that come in here are only noted, the death of the launcher, too."""
        self._deferred = True
        end_with_launcher(signal.SIGTERM)
        try:
            yield
        finally:
            self._deferred = False
