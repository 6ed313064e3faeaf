"""Ends a process when the one that started it dies."""

import ctypes
import os
import signal
import sys

# docker/run sets it to its own id, which the program keeps that replaces it, and the id of the process that started it.
_STARTED = "REMINT_STARTED"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def known_parent() -> int | None:
    """The id of the process that started docker/run, if docker/run started this process; else None.

    To be asked once, before anything else is started: the variable is removed.
    """
    own, _, parent = os.environ.pop(_STARTED, "").partition(":")
    return int(parent) if own == str(os.getpid()) and parent.isdecimal() else None


def end_with_parent(parent: int | None = None) -> None:
    """On Linux, get SIGTERM when the parent dies: a killed DVC must not leave a training process running.

    On SIGTERM a stage saves its state and exits; the next `dvc repro` continues there. Elsewhere this does nothing.

    `parent` is the id of the process that started this one, if it is known. It may have died already.
    """
    if not sys.platform.startswith("linux"):
        return
    # Without it, a parent that died before this line goes unnoticed: another process has taken its place.
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # The parent may have died before prctl took effect.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
