"""Runs a command and ends it, with all that it has started, when the process that started the guard ends, however it ends.

    python guard.py COMMAND ...     # in a session of its own, standard input a pipe that only that process writes to

The kernel closes the pipe of a process that is killed, which no clean-up of its own would survive.
"""

import os
import signal
import subprocess
import sys
import threading

GRACE = 10  # seconds to end in


def main() -> None:
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: None)  # the group's is for the others

    def watch() -> None:
        os.read(0, 1)  # returns when the pipe is closed
        os.killpg(0, signal.SIGTERM)
        threading.Event().wait(GRACE)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    status = child.wait()
    print(f"ended with status {status}", flush=True)
    os.killpg(0, signal.SIGKILL)  # what the command has left behind, and the guard


if __name__ == "__main__":
    main()
