"""Whether a tokenizer knows the tokens of a template, and whether a user's text can produce them."""

from typing import Any

from remint.model.template import Template, plain_ids


def missing_tokens(template: Template, tokenizer: Any) -> list[str]:
    """End and stop tokens of the template that are not single tokens of the tokenizer."""
    unknown = tokenizer.unk_token_id
    return [
        token
        for token in dict.fromkeys([template.end, *template.stop])
        if tokenizer.convert_tokens_to_ids(token) in (None, unknown) and token != tokenizer.unk_token
    ]


def spellable_tokens(template: Template, tokenizer: Any) -> list[str]:
    """Stop tokens that a text can spell because they are not marked as special. A question could then end an answer."""
    return [
        token
        for token in dict.fromkeys(template.stop)
        if tokenizer.convert_tokens_to_ids(token) in plain_ids(tokenizer, token)
    ]
