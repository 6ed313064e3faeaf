"""Whether a tokenizer knows the tokens that a template names, and keeps them out of what a person can write."""

from typing import Any

from remint.model.template import Template, plain_ids


def missing_tokens(template: Template, tokenizer: Any) -> list[str]:
    """Stop and end tokens of the template that the tokenizer does not know as one token."""
    unknown = tokenizer.unk_token_id
    return [
        token
        for token in dict.fromkeys([template.end, *template.stop])
        if tokenizer.convert_tokens_to_ids(token) in (None, unknown) and token != tokenizer.unk_token
    ]


def spellable_tokens(template: Template, tokenizer: Any) -> list[str]:
    """Stop tokens that a text can spell: the tokenizer does not mark them as special, so a question could end an answer."""
    return [
        token
        for token in dict.fromkeys(template.stop)
        if tokenizer.convert_tokens_to_ids(token) in plain_ids(tokenizer, token)
    ]
