"""Turn a SentencePiece BPE model (tokenizer.model) into a fast tokenizer with the same ids. No foreign code runs.

A base can rename its tokens in tokenizer_config.json. InternLM2's chat models give names such as <|im_start|> to pieces
that tokenizer.model calls [UNUSED_TOKEN_…].
"""

import os
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

from remint.core.errors import ArtefactError, got
from remint.core.files import check_file, read_object

NAME = "tokenizer.model"
_CONFIG = "tokenizer_config.json"
_DEFAULTS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
# Model types and piece types of sentencepiece_model.proto.
_BPE = 2
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "▁"


def read(folder: Path) -> Any:
    """The tokenizer of a folder with tokenizer.model. Like the base's own tokenizer, it puts <s> in front of a text."""
    path = folder / NAME
    proto = _parse(path)
    config = _config(folder / _CONFIG)
    given = _given(config, folder / _CONFIG)
    names = [given[index].content if index in given else piece.piece for index, piece in enumerate(proto.pieces)]
    tokenizer = Tokenizer(_bpe(proto, names, set(given)))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto.normalizer_spec)
    for index, piece in enumerate(proto.pieces):
        if index not in given and piece.type in (_CONTROL, _USER_DEFINED):
            given[index] = AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
    tokenizer.add_tokens([given[index] for index in sorted(given)])
    _check(tokenizer, given, path)
    return _wrapped(tokenizer, config, given)


def _parse(path: Path) -> Any:
    check_file(path, "get the file again")
    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ArtefactError(f"{path}: is not a SentencePiece model ({error}); get the file again") from None
    kind, suffix = model.trainer_spec.model_type, model.trainer_spec.treat_whitespace_as_suffix
    if not model.pieces or kind != _BPE or suffix or not model.normalizer_spec.escape_whitespaces:
        raise ArtefactError(
            f"{path}: must be a BPE model that marks spaces in front of words, {got(kind)} as model_type; "
            "replace it with a tokenizer.json"
        )
    return model


def _config(path: Path) -> dict[str, Any]:
    return read_object(path, "get the file again") if os.path.lexists(path) else {}


def _given(config: dict[str, Any], path: Path) -> dict[int, AddedToken]:
    """The tokens that tokenizer_config.json defines, by id."""
    try:
        return {
            int(index): AddedToken(
                entry["content"],
                single_word=entry.get("single_word", False),
                lstrip=entry.get("lstrip", False),
                rstrip=entry.get("rstrip", False),
                normalized=entry.get("normalized", False),
                special=entry.get("special", True),
            )
            for index, entry in config.get("added_tokens_decoder", {}).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path}: added_tokens_decoder is not readable ({error!r}); get the file again") from None


def _bpe(proto: Any, names: list[str], renamed: set[int]) -> models.BPE:
    """The BPE model.

    No merge produces a piece that text must not become (markers, bytes). Otherwise "<" "s" ">" would become <s>.
    """
    vocabulary = {name: index for index, name in enumerate(names)}
    merged = {
        piece.piece: piece.score
        for index, piece in enumerate(proto.pieces)
        if piece.type == _NORMAL and index not in renamed
    }
    apart = vocabulary.keys() - merged.keys()
    scores = {name: merged.get(name, 0.0) for name in names}
    return models.BPE(
        vocab=vocabulary,
        merges=generate_merges(vocabulary, scores, skip_tokens=apart),
        unk_token=names[proto.trainer_spec.unk_id],
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _normalizer(spec: Any) -> normalizers.Sequence:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex("^ | $"), "")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _decoder(spec: Any) -> decoders.Sequence:
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", left=1))
    return decoders.Sequence(steps)


def _check(tokenizer: Tokenizer, given: dict[int, AddedToken], path: Path) -> None:
    wrong = {token.content: index for index, token in given.items() if tokenizer.token_to_id(token.content) != index}
    if wrong:
        raise ArtefactError(
            f"{path}: has no place for tokens of {_CONFIG}, {got(wrong)}; get both files from the same base"
        )


def _wrapped(tokenizer: Tokenizer, config: dict[str, Any], given: dict[int, AddedToken]) -> Any:
    named = {role: _content(config.get(role) or default) for role, default in _DEFAULTS.items()}
    bos = named["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    others = [token.content for _, token in sorted(given.items()) if token.special]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=[token for token in others if token not in named.values()],
        clean_up_tokenization_spaces=False,
        **named,
    )


def _content(entry: Any) -> str:
    return str(entry["content"] if isinstance(entry, dict) else entry)
