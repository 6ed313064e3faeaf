"""peft and bitsandbytes, imported in less time. Everything else takes them from here."""

from typing import Any

import torch


def _as_it_is(function: Any = None, **_: Any) -> Any:
    return function if function is not None else lambda given: given


# bitsandbytes, which peft imports, hands its fallbacks to torch.compile as it is imported, and that brings in all of the
# compiler: a fifth of what a stage needs to start. What such a fallback computed would depend on the C compiler, too.
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
