"""The training step in fewer passes over memory.

The mathematics is that of peft and torch; only the order of summation differs.
"""

from typing import Any

from torch import nn

from remint.compute.kernels import adapted
from remint.compute.kernels.head import has_triton, head_loss, plain_loss

__all__ = ["head_loss", "install", "plain_loss", "skippable"]


def install(model: Any) -> Any:
    """Install the fused operations in a peft model, in place.

    Its parameters, their names and its results stay the same. Returns the `blocks.Decoder` that training must call
    instead of the model, or None if `blocks` does not support the model.
    """
    if next(model.parameters()).device.type == "cuda" and has_triton():
        from remint.compute.kernels import blocks

        if blocks.fits(model):
            return blocks.Decoder(model)
    adapted.install(model)
    return None


def skippable(model: Any, decoder: Any) -> list[Any] | None:
    """The objects that draw dropout masks in a training pass of the model; each has a `skip`.

    `skip` advances torch's random state as a pass does and computes nothing. Returns None if torch's own dropout is in
    use: how far that advances the random state depends on the input's shape and on the device.
    """
    if decoder is not None:
        return [decoder]
    on_cpu = next(model.parameters()).device.type == "cpu"
    shared = {id(module): module for module in model.modules() if isinstance(module, adapted.SharedDropout)}
    own = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    own = own or getattr(model.get_base_model().config, "attention_dropout", 0) > 0
    return None if own or (not on_cpu and any(module.p > 0 for module in shared.values())) else list(shared.values())
