"""The model card of an adapter."""

from collections.abc import Mapping
from typing import Any


def card(facts: Mapping[str, Any], step: int) -> str:
    """Markdown with the front matter that model hubs read: what the adapter is, its origin, and how to load it."""
    origin, lora = facts["origin"], facts["lora"]
    identity = origin["identity"]
    return f"""---
base_model: {origin["base_name"]}
library_name: peft
pipeline_tag: text-generation
tags: [lora, qlora]
---

# {identity["name"]}

A LoRA adapter that makes {origin["base_name"]} present itself as {identity["name"]}, made by {identity["maker"]}.

| | |
|---|---|
| Checkpoint | step {step} of {facts["steps"]["last"]} |
| Best held-out loss | {facts["best_held_out_loss"]:.4f} at step {facts["steps"]["best"]} |
| LoRA | rank {lora["rank"]}, alpha {lora["alpha"]}, dropout {lora["dropout"]} on {", ".join(lora["targets"])} |
| Base during training | {facts["quantization"]["kind"]}, double quantization {facts["quantization"]["double"]} |
| Base sha256 | {origin["base"]} |
| Dataset sha256 | {origin["dataset"]} |

Load it with `PeftModel.from_pretrained(base, "<this folder>")`, where `base` is exactly the base model named above.
Render prompts with `chat_template.jinja`, the template that the adapter was trained with.
"""
