"""Tie a process to the one that started it: when the starter dies, however it dies, the kernel kills this one too.

Run as a file: ``python leash.py STARTER_PID COMMAND...``. It asks the kernel (``prctl(PR_SET_PDEATHSIG, SIGKILL)``) and
then becomes the command, keeping its pid. Without it, ranks whose agent was killed with SIGKILL would go on computing
and writing beside the next start of the same run. The request belongs to the thread that started the process, so the
starter has to be a thread that lives as long as the process should. Only Linux has it: elsewhere ``can_leash`` says no.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def can_leash() -> bool:
    """Whether this system can tie processes."""
    return sys.platform == "linux"


def main() -> None:
    """Tie this process to its parent and become the command."""
    starter, command = int(sys.argv[1]), sys.argv[2:]
    if can_leash():
        system = ctypes.CDLL(None, use_errno=True)
        if system.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
        if os.getppid() != starter:  # it died before the request was made
            sys.exit(128 + signal.SIGKILL)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
