"""How our child processes are tied to their parent: the same for Envoy and for the demo's processes. Linux only."""

import os
import sys

_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)  # it died in between
os.execv(sys.argv[2], sys.argv[2:])
"""


def tied_to_parent(command: list[str]) -> list[str]:
    """The command, run so that it gets SIGTERM should this process die without a word (SIGKILL, crash).

    To Linux the parent is the thread that starts it. Not a `preexec_fn`: that would fork a process with gRPC's
    threads. Elsewhere the command is returned as it is, and a killed parent leaves its children behind.
    """
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
