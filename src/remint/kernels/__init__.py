"""The training step in fewer passes over memory: the same mathematics as peft's and torch's own, added in another order."""

from typing import Any

from remint.kernels import adapted
from remint.kernels.head import has_triton, head_loss

__all__ = ["head_loss", "install"]


def install(model: Any) -> Any:
    """Change a peft model in place; its parameters, their names and what it computes stay.

    Returns the `blocks.Decoder` that training shall call instead of the model, or None where there is none for it.
    """
    if next(model.parameters()).device.type == "cuda" and has_triton():
        from remint.kernels import blocks

        if blocks.fits(model):
            return blocks.Decoder(model)
    adapted.install(model)
    return None
