"""A base model and its conversation template: loading, quantization, LoRA. A change reruns every stage with torch."""
