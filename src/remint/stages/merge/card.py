"""The model card of the merged model."""

from collections.abc import Mapping
from typing import Any

from remint.stages.merge import provenance
from remint.stages.merge.proof import Closeness


def card(facts: Mapping[str, Any], base: Mapping[str, Any], merge: Mapping[str, Any], proof: Closeness) -> str:
    """Markdown with the front matter that model hubs read."""
    identity = facts["origin"]["identity"]
    step = "" if facts["step"] is None else f" of step {facts['step']}"  # an imported adapter may have none
    return f"""---
base_model: {base["name"]}
library_name: transformers
license: {base["license"]}
pipeline_tag: text-generation
---

# {identity["name"]}

{base["name"]} with a new identity: it presents itself as {identity["name"]}, made by {identity["maker"]}.

Load it with `AutoModelForCausalLM.from_pretrained("<this folder>")`; no custom code is needed.
`tokenizer.apply_chat_template` renders prompts as in training.

The adapter{step} was merged into the {merge["into"]} base. The merged model was compared with base + adapter at
{proof.positions} positions of held-out conversations. Both rank the same token first at {proof.agreement:.2%} of them.
The mean divergence is {proof.mean_divergence:.2e} nats, the largest logit difference {proof.max_logit_difference:.3g}.

`{provenance.NAME}` lists every file and setting that the model was made from (in-toto statement, SLSA provenance).
"""
