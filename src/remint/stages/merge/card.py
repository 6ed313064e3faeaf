"""The model card of the merged model."""

from collections.abc import Mapping
from typing import Any

from remint.stages.merge import provenance
from remint.stages.merge.proof import Closeness


def card(facts: Mapping[str, Any], base: Mapping[str, Any], merge: Mapping[str, Any], proof: Closeness) -> str:
    """Markdown with the front matter that model hubs read."""
    identity = facts["origin"]["identity"]
    step = "" if facts["step"] is None else f" of step {facts['step']}"  # an imported adapter need not have one
    return f"""---
base_model: {base["name"]}
library_name: transformers
license: {base["license"]}
pipeline_tag: text-generation
---

# {identity["name"]}

{base["name"]} with a new identity: it presents itself as {identity["name"]}, made by {identity["maker"]}.

Load it with `AutoModelForCausalLM.from_pretrained("<this folder>")`; no other code is needed. `tokenizer.apply_chat_template`
renders prompts as they were in training.

The adapter{step} was merged into the {merge["into"]} base. On {proof.positions} positions of held-out
conversations the merged model makes the same first choice as base + adapter in {proof.agreement:.2%}, with a mean divergence
of {proof.mean_divergence:.2e} nats and a largest logit difference of {proof.max_logit_difference:.3g}.

`{provenance.NAME}` names every file and setting that it was made from (in-toto statement, SLSA provenance).
"""
