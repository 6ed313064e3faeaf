"""Files of tensors: shards, adapters, InternLM2's layout.

A change here makes DVC rerun the stages that read or write such files with it: `stage_base`, `convert` and `merge`.
"""
