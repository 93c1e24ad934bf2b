"""The other end of an ssh connection: starts a command, and takes signals for it from standard input.

Run as a file: ``python behind_ssh.py COMMAND...``; see ``over_ssh.py``. When the input ends, the starter or the network
is gone, and the command is asked to stop in good order.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType

LEASH = str(Path(__file__).with_name("leash.py"))


def main() -> None:
    """Run the command and end with its exit code, as shells do (128 + the signal that ended it)."""
    command = [sys.executable, "-I", "-S", LEASH, str(os.getpid()), *sys.argv[1:]]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def pass_on(number: int, _frame: FrameType | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    def listen() -> None:
        for word in sys.stdin:
            pass_on(signal.Signals[word.strip()])
        pass_on(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, pass_on)
    threading.Thread(target=listen, daemon=True).start()
    code = process.wait()
    sys.stdout.flush()
    os._exit(code if code >= 0 else 128 - code)  # the thread may hold standard input, which an orderly exit waits for


if __name__ == "__main__":
    main()
