"""Builds settings classes from plain values. Every value of a wrong type is reported by name, before any conversion."""

import contextlib
import difflib
import math
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from remint.core.errors import SettingsError, got

_NAMES = {str: "text", Path: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}


def build(section: Any, value: Any, where: str) -> Any:
    """Build the settings object of a section. Nested sections come first, and each class checks its own ranges.

    Raises SettingsError that lists every fault: the setting, what it must be and the value found.
    """
    if wrong := [f"{setting}: {fault}" for setting, fault, _ in wrong_types(section, value, where)]:
        raise SettingsError(*wrong)
    if not is_dataclass(section):
        return value
    kind: Any = section
    faults: list[str] = []
    given: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if name not in value:  # it has a default: wrong_types reports any other missing setting
            continue
        try:
            given[name] = build(hint, value[name], f"{where}.{name}")
        except SettingsError as error:
            faults += error.faults
    if not faults:
        return kind(**given)
    # Also run the section's own checks on the settings that could be built, so that all mistakes are reported at once.
    partial = object.__new__(kind)
    partial.__dict__.update(given)
    with contextlib.suppress(AttributeError):
        try:
            partial.__post_init__()
        except SettingsError as error:
            faults += error.faults
    raise SettingsError(*faults)


def wrong_types(kind: Any, value: Any, where: str) -> Iterator[tuple[str, str, str]]:
    """Yield (setting, fault, what to do) for each value that does not have its declared type."""
    if is_dataclass(kind):
        if not isinstance(value, dict):
            yield where, f"must be a section with settings of its own, {got(value)}", "write one"
            return
        hints = get_type_hints(kind)
        for name in [name for name in value if name not in hints]:
            near = difflib.get_close_matches(str(name), hints, n=1)
            yield f"{where}.{name}", "no such setting", f"write {near[0]} or remove it" if near else "remove it"
        for name, hint in hints.items():
            if name in value:
                yield from wrong_types(hint, value[name], f"{where}.{name}")
            elif name not in _optional(kind):
                yield f"{where}.{name}", "is missing", "add it"
    elif get_origin(kind) is list:
        if not isinstance(value, list):
            yield where, f"must be a list, {got(value)}", "put it in [ ]"
            return
        (item,) = get_args(kind)
        for index, inner in enumerate(value):
            yield from wrong_types(item, inner, f"{where}[{index}]")
    elif get_origin(kind) is dict:
        if not isinstance(value, dict):
            yield where, f"must be a mapping of names to values, {got(value)}", "write one"
            return
        for key, inner in value.items():
            yield from wrong_types(get_args(kind)[1], inner, f"{where}.{key}")
    else:
        kinds = alternatives(kind)
        if not any(_is_of(value, each) for each in kinds):
            is_unquoted = str in kinds and value is not None
            names = " or ".join(_NAMES[each] for each in kinds)
            yield where, f"must be {names}, {got(value)}", "put it in quotes" if is_unquoted else "change it"
        elif isinstance(value, (int, float)) and not _is_finite(value):
            yield where, f"must be a finite number of at most 64 bits, {got(value)}", "change it"


def _optional(kind: Any) -> set[str]:
    """Names of the settings of a class that have a default."""
    return {field.name for field in fields(kind) if field.default is not MISSING}


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types that are accepted: more than one for `str | None`, none for a list, a mapping or a section."""
    if is_dataclass(kind) or get_origin(kind) in (list, dict):
        return ()
    return get_args(kind) or (kind,)


def _is_finite(value: int | float) -> bool:
    """Whether a number is not infinite, not NaN and no integer that 64 bits cannot hold."""
    return -(2**63) <= value < 2**63 if isinstance(value, int) else math.isfinite(value)


def _is_of(value: object, kind: type) -> bool:
    """Whether a value has a type. A bool is not a number; an int counts as a float."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {float: (int, float), Path: (str, Path)}.get(kind, kind))
