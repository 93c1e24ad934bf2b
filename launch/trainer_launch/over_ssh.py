"""This end of an ssh connection: a signal to this process becomes a word on the standard input of the other end.

Run as a file: ``python over_ssh.py SSH...``. ssh passes no signals on, and what it started lives on when it is killed.
``behind_ssh.py`` is at the other end; it also takes the end of its input for a request to stop.
"""

import contextlib
import signal
import subprocess
import sys
from types import FrameType

WORDS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
NO_CONNECTION = 255


def main() -> None:
    """Run ssh and end with the exit code of what it started."""
    with subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE) as process:
        pipe = process.stdin
        assert pipe is not None

        def pass_on(number: int, _frame: FrameType | None) -> None:
            with contextlib.suppress(OSError, ValueError):  # the connection is gone, or this is over
                pipe.write(f"{signal.Signals(number).name}\n".encode())
                pipe.flush()

        for number in WORDS:
            signal.signal(number, pass_on)
        code = process.wait()
    if code == NO_CONNECTION:
        print("error: ssh ended with 255: the connection broke, or was not made", flush=True)  # noqa: T201
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
