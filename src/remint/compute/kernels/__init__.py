"""The training step in fewer passes over memory: the same mathematics as peft's and torch's own, added in another order."""

from typing import Any

from torch import nn

from remint.compute.kernels import adapted
from remint.compute.kernels.head import has_triton, head_loss

__all__ = ["head_loss", "install", "skippable"]


def install(model: Any) -> Any:
    """Change a peft model in place; its parameters, their names and what it computes stay.

    Returns the `blocks.Decoder` that training shall call instead of the model, or None where there is none for it.
    """
    if next(model.parameters()).device.type == "cuda" and has_triton():
        from remint.compute.kernels import blocks

        if blocks.fits(model):
            return blocks.Decoder(model)
    adapted.install(model)
    return None


def skippable(model: Any, decoder: Any) -> list[Any] | None:
    """What draws dropout in a pass of the model in training: each has a `skip`, which draws as much and computes nothing.

    None where torch's own dropout draws, for what that takes depends on the shape of its input and on the device.
    """
    if decoder is not None:
        return [decoder]
    on_cpu = next(model.parameters()).device.type == "cpu"
    shared = {id(module): module for module in model.modules() if isinstance(module, adapted.SharedDropout)}
    own = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    own = own or getattr(model.get_base_model().config, "attention_dropout", 0) > 0
    return None if own or (not on_cpu and any(module.p > 0 for module in shared.values())) else list(shared.values())
