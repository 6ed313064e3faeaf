"""Names inside a training checkpoint: `train` writes them, `convert` reads them."""

from collections.abc import Mapping
from typing import Any

# Files in the folder of one step.
TENSORS, STATE = "state.safetensors", "state.json"
_ADAPTER, _OPTIMIZER = "adapter.", "optimizer."


def folder_name(step: int) -> str:
    """Name of a step's folder. Names sort by step."""
    return f"step-{step:08d}"


def named_tensors(adapter: Mapping[str, Any], optimizer: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """All tensors of a checkpoint by name.

    `adapter` has the adapter's tensors by PEFT's names, `optimizer` the optimizer's state by parameter index.
    """
    tensors = {f"{_ADAPTER}{name}": tensor for name, tensor in adapter.items()}
    for index, state in optimizer.items():
        tensors |= {f"{_OPTIMIZER}{index}.{key}": tensor for key, tensor in state.items()}
    return tensors


def adapter_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's tensors by PEFT's names."""
    return {name.removeprefix(_ADAPTER): tensor for name, tensor in tensors.items() if name.startswith(_ADAPTER)}


def optimizer_state(tensors: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The optimizer's state by parameter index, as in its `state_dict`."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMIZER):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    return state
