"""The base model and its conversation template: loading, quantization, LoRA.

A change here makes DVC rerun every stage that uses torch.
"""
