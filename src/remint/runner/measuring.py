"""Ask the base and a finished model the prompts of files that no stage reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from remint.core import manifest
from remint.core.paths import Paths
from remint.identity import Identity
from remint.model import template
from remint.stages.eval_chat.asking import answered, ask, check_positions
from remint.stages.eval_chat.scores import Answered
from remint.stages.eval_chat.settings import EvalChat
from remint.stages.replicate_data import formats, records

_BATCH = 40


def ask_both(
    files: Mapping[str, Sequence[Path]], folder: Path | None, max_new_tokens: int
) -> tuple[list[Answered], float, Identity]:
    """The answers of both models to the files of each kind ('identity', 'control'), the divergence, and the identity.

    The identity is the one that the model was trained for. The divergence (nats per token) is that of the model from the
    base on the base's own answers to the ordinary prompts; NaN if there are none.
    """
    paths, settings = Paths(), EvalChat(max_new_tokens, _BATCH)
    model = folder or paths.model
    identity = Identity(**manifest.verify(model, "model")["origin"]["identity"])
    manifest.verify(paths.base, "base")
    asked = [
        ("held_out" if kind == "identity" else "control", record.row())
        for kind, names in files.items()
        for name in names
        for record in records.build(formats.read(name), kind, identity, str(name))
    ]
    conversation = template.load(model)
    check_positions(model, conversation, [row for _, row in asked], settings)
    base = ask("base", paths.base, conversation, asked, settings)
    merged = ask("merged", model, conversation, asked, settings, base.said)
    rows = [answered(row, *pair) for (_, row), *pair in zip(asked, base.answers, merged.answers, strict=True)]
    return rows, merged.divergence, identity
