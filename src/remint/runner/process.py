"""Ties a stage to the process that started it."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the parent dies: a DVC that was killed must not leave a training behind.

    A stage answers SIGTERM by saving and leaving; the next `dvc repro` goes on there. Elsewhere this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # It may have died before the request was made. Under process 1 there is nobody whose death would matter.
    if parent != 1 and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
