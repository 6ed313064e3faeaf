"""The causes of differing bytes in docs/determinism.md that no other test covers."""

import random

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit

from remint.compute import determinism
from remint.core import launch
from remint.core.settings import Runtime
from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def restored():
    """Restore torch's process-wide settings."""
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_is_the_declared_one(threads, restored):
    determinism.apply(Runtime(threads, True))
    assert torch.get_num_threads() == threads
    assert determinism.conditions(CPU)["threads"] == threads


def test_only_exact_kernels_are_used_unless_allowed(restored):
    determinism.apply(Runtime(2, True))
    assert determinism.conditions(CPU)["deterministic"] is True
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("name", launch.NUMERIC)
def test_a_variable_that_changes_numbers_is_part_of_the_conditions(name, monkeypatch):
    block = launch.environment(2, network=False)
    monkeypatch.setenv(name, block.get(name, "x"))
    before = determinism.conditions(CPU)
    monkeypatch.setenv(name, "something else")
    assert determinism.conditions(CPU) != before


@pytest.mark.parametrize(
    ("cpuinfo", "vendor"),
    [("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel\t: 1\n", "GenuineIntel"), ("CPU implementer\t: 0x41\n", "")],
)
def test_the_maker_of_the_cpu_is_part_of_the_conditions(cpuinfo, vendor, monkeypatch):
    monkeypatch.setattr(determinism.Path, "read_text", lambda self, encoding: cpuinfo)
    assert determinism.conditions(CPU)["vendor"] == vendor


def test_the_variables_do_not_depend_on_those_of_the_user(monkeypatch):
    block = launch.environment(2, network=False)
    for name in block:
        monkeypatch.setenv(name, "something else")
    assert launch.environment(2, network=False) == block
    assert launch.missing(block) == block
    assert set(launch.NUMERIC) - block.keys() in (set(), {"ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA"})


def test_the_random_state_is_a_function_of_seed_purpose_and_step():
    def drawn(*arguments):
        determinism.seed_step(*arguments)
        return random.random(), np.random.rand(), torch.rand(()).item()

    first = drawn(1, "train", 5)
    assert all(
        a != b
        for other in ((2, "train", 5), (1, "lora", 5), (1, "train", 6))
        for a, b in zip(first, drawn(*other), strict=True)
    )
    assert drawn(1, "train", 5) == first


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_is_one_product_whatever_the_instruction_set(kind, double, dtype):
    """bitsandbytes dequantizes with AVX-512 if the CPU has it; none of our environment variables prevents that."""
    weight = (torch.randn(96, 128, generator=torch.Generator().manual_seed(0)) / 20).to(dtype)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if double else state.absmax
    nibbles = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1, 64).long()
    expected = (state.code[nibbles] * scales.float()[:, None]).to(dtype).view(weight.shape)
    assert torch.equal(dequantize_4bit(packed, state), expected)


def test_no_package_that_fetches_native_code_is_installed():
    lock = (ROOT / "docker/requirements.lock").read_text(encoding="utf-8").splitlines()
    assert len(lock) > 50
    assert not [line for line in lock if line.startswith("kernels==")]
