"""Limits for every example: time, memory, and the only folder that may change."""

import contextlib
import os
import resource
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from remint.core.errors import RemintError, visible

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))  # 0: the quick suite's few, the same every time
settings.register_profile(
    "fuzz",
    max_examples=EXAMPLES or 10,
    derandomize=not EXAMPLES,
    database=None,
    deadline=timedelta(seconds=10),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
_ROOM = 4 << 30


@pytest.fixture(autouse=True)
def bounded_memory():
    """An allocation of more than 4 GiB fails, as on a small machine, instead of succeeding unnoticed."""
    if not sys.platform.startswith("linux"):
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def sandbox():
    """A folder to work in; it is the only place that may change."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as outer:
        (Path(outer) / "secret").write_text("secret")
        inside = Path(outer) / "inside"
        inside.mkdir()
        os.chdir(inside)
        try:
            yield inside
        finally:
            os.chdir(before)
        assert sorted(path.name for path in Path(outer).iterdir()) == ["inside", "secret"]
        assert (Path(outer) / "secret").read_text() == "secret"


def survives(call):
    """The call's result, or None if it raised a RemintError that a terminal can show."""
    try:
        return call()
    except RemintError as error:
        told = str(error)
        assert told.strip()
        assert len(told) < 50_000
        assert told == visible(told)
        return None
