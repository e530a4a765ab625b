"""Being asked to stop, without being stopped; and ending when the parent does."""

import contextlib
import ctypes
import signal
import threading


class StopSignals:
    """Counts Ctrl-C and SIGTERM while the block runs, in `asked` (in the main thread; elsewhere nothing can be caught)."""

    def __enter__(self):
        self.asked, self._old = 0, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.asked += 1

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that may be (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
