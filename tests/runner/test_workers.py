"""How the processes of a shared training are told apart, and what their exit statuses mean."""

import io
import signal

import pytest

from remint.core import launch
from remint.core.errors import RemintError, SettingsError
from remint.runner import workers


@pytest.mark.parametrize(
    ("statuses", "status", "shown"),
    [
        ([0, 0], 0, ""),
        ([143, 143], 143, ""),
        ([1, 1], 1, ""),  # the first one has already reported it
        ([launch.LOST, 1], 1, "error of 1"),
        ([-signal.SIGKILL, 1], 1, "error of 1"),  # we ended the first one, because it waited for the second
        ([launch.LOST, launch.LOST], 1, ""),
    ],
)
def test_only_the_cause_is_reported_and_not_what_follows_from_it(statuses, status, shown, capsys):
    said = [io.StringIO(f"error of {number}") for number in range(2)]
    assert workers._exit_status(statuses, said, {0} if statuses[0] < 0 else set()) == status
    assert capsys.readouterr().err == shown


def test_a_killed_process_is_named():
    with pytest.raises(RemintError, match=r"process 2 of 2 was ended by SIGSEGV; .* continues"):
        workers._exit_status([launch.LOST, -signal.SIGSEGV], [io.StringIO()] * 2, set())


def test_more_processes_than_gpus_are_refused(monkeypatch):
    from remint.model import loading

    monkeypatch.setattr(loading, "device", lambda: type("Device", (), {"type": "cuda"}))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    workers._check_gpus(2)
    with pytest.raises(SettingsError, match=r"train\.processes: must be at most 2, the number of GPUs, got 3"):
        workers._check_gpus(3)


@pytest.mark.parametrize(("visible", "mine"), [(None, "1"), ("4,6", "6"), ("4", ""), ("GPU-a,GPU-b", "GPU-b")])
def test_each_process_sees_one_gpu(visible, mine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    launch.take_gpu(1)
    assert launch.os.environ["CUDA_VISIBLE_DEVICES"] == mine
