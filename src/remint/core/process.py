"""Ends a stage when the process that started it dies."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """On Linux, get SIGTERM when the parent dies: a killed DVC must not leave a training process running.

    On SIGTERM a stage saves its state and exits; the next `dvc repro` continues there. Elsewhere this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # The parent may have died before prctl took effect. Process 1 never dies, so there the check is not needed.
    if parent != 1 and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
