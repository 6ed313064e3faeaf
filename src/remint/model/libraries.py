"""peft and bitsandbytes, imported faster and without a needless warning. All other code imports them from here."""

import logging
import warnings
from typing import Any

import torch


def _as_it_is(function: Any = None, **_: Any) -> Any:
    """Replaces torch.compile, also as a decorator with arguments: returns the function unchanged."""
    return function if function is not None else lambda given: given


# bitsandbytes warns on some CPUs that an optional Hub kernel is missing; we never load code from the Hub. The warning
# comes during the import, so this line must run before it.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
# peft 0.21 reads a name that transformers 5.23 has deprecated. Users cannot do anything about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

# peft imports bitsandbytes, which passes its fallbacks to torch.compile during the import. That would import the entire
# compiler: a fifth of a stage's start time. A compiled fallback would also make results depend on the C compiler.
_compile, torch.compile = torch.compile, _as_it_is  # type: ignore[assignment]
try:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit
    from peft import (
        LoraConfig,
        PeftModel,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
    from peft.tuners.lora import LoraLayer
finally:
    torch.compile = _compile

__all__ = [
    "Linear4bit",
    "LoraConfig",
    "LoraLayer",
    "Params4bit",
    "PeftModel",
    "dequantize_4bit",
    "get_peft_model",
    "get_peft_model_state_dict",
    "quantize_4bit",
    "set_peft_model_state_dict",
]
