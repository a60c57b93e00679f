"""No core dumps: one holds the memory of a process, with personal data, tokens and keys."""

import ctypes
import resource
import sys

PR_SET_DUMPABLE = 4  # of prctl(2)


def forbid() -> None:
    """Forbids core dumps of this process and those that it forks.

    The limit alone does not hold where the kernel gives dumps to a program (core(5)). A process that is not dumpable
    can't be read by other processes of its user either.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
