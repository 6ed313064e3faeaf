"""A stage's settings. Later sources override earlier ones: conf/<group>/<choice>.yaml, params.yaml, the command line.

A stage receives only the sections of params.yaml that dvc.yaml declares for it. So it cannot read a setting whose
change would not rerun it. Hydra composes the settings, so a DVC sweep and a command typed by hand mean the same.
"""

import difflib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml  # type: ignore[import-untyped]
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from ruamel.yaml import YAML  # DVC's own reader

from remint.core.errors import SettingsError, brief, got, one_line
from remint.core.files import check_folder, is_encodable, read_text
from remint.core.paths import CONF, PARAMS, Paths
from remint.runner.typed import alternatives, build, wrong_types

# The sections whose values are in a file of conf/<section>/, which params.yaml names.
_GROUPS = ("model", "identity")
_MAX_YAML_BYTES, _MAX_YAML_DEPTH = 2**20, 20


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping as Hydra does. 1e-4 is a number here, but a string for yaml.safe_load.

    Raises SettingsError if the file cannot be read or holds no valid mapping.
    """
    text = read_text(
        path, "run this at the root of the repository, or get the file again", SettingsError, _MAX_YAML_BYTES
    )
    if not text.strip():
        raise SettingsError(f"{path}: is empty; `git checkout {path}` restores it")
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> dict[str, Any]:
    """Parse YAML text as `load_yaml` does. `path` is the file that errors name. Raises SettingsError."""
    try:
        _check_events(text)
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except Exception as error:  # PyYAML and OmegaConf raise many types, even KeyError and IndexError
        raise SettingsError(f"{path}: is not valid YAML: {one_line(error)}; correct that line") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must be a mapping of sections, {got(content)}; `git checkout {path}` restores it")
    if faults := [f"{path}: {fault}; write the name as plain text" for fault in _key_faults(content)]:
        raise SettingsError(*faults)
    if path.name == PARAMS.name or CONF.name in path.parts:  # not dvc.lock or the run cache, which DVC writes
        _check_one_reading(text, content, path)
    return dict(content)


def _check_one_reading(text: str, content: dict[Any, Any], path: Path) -> None:
    """Refuse values that DVC reads otherwise: it would record another value than the one that a stage used.

    OmegaConf reads YAML 1.1, in which 010 is 8 and `yes` is true. DVC reads YAML 1.2, in which they are 10 and a text.
    """
    try:
        by_dvc = YAML(typ="safe").load(text) or {}
    except Exception as error:
        raise SettingsError(f"{path}: DVC cannot read it: {one_line(error)}; correct that line") from None
    if faults := [
        f"{path}: {name}: is {brief(value)} here and {brief(other)} for DVC; write a number without leading zeros, true or "
        "false, or put a text in quotes"
        for name, value, other in _two_readings(content, by_dvc)
    ]:
        raise SettingsError(*faults)


def _two_readings(value: object, other: object, where: str = "") -> Iterator[tuple[str, object, object]]:
    """The names of the values that differ, each with both."""
    if isinstance(value, dict) and isinstance(other, dict) and value.keys() == other.keys():
        for key, inner in value.items():
            yield from _two_readings(inner, other[key], f"{where}.{key}".lstrip("."))
    elif isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
        for index, inner in enumerate(value):
            yield from _two_readings(inner, other[index], f"{where}[{index}]")
    elif type(value) is not type(other) or (value != other and value == value):  # NaN differs from itself
        yield where, value, other


def compose(sections: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose `sections` from params.yaml and `overrides` like `train.lr=1e-3`; returns typed, checked values by name.

    `sections` maps each section's name to its type. Raises SettingsError.
    """
    return to_objects(sections, compose_raw(sections, overrides), overrides)


def compose_raw(sections: Mapping[str, Any], overrides: Sequence[str] = ()) -> DictConfig:
    """Compose `sections` with Hydra: `--cfg` prints the result and the fingerprint covers it. Raises SettingsError."""
    params = load_yaml(PARAMS)
    if "paths" in params:
        raise SettingsError(
            f"{PARAMS}: paths: the folders of the pipeline are fixed and no setting, {got(params['paths'])}; "
            "remove that section"
        )
    params["paths"] = {name: str(path) for name, path in vars(Paths()).items()}
    absent = [name for name in sections if name not in params]
    if absent:
        raise SettingsError(
            *(f"{PARAMS}: section {name!r} is missing; copy it from {CONF / 'params.yaml'}" for name in absent)
        )
    if faults := [fault for entry in overrides for fault in _text_faults(entry, entry.partition("=")[0])]:
        raise SettingsError(*faults)
    groups = [name for name in sections if name in _GROUPS]
    for group in groups:
        check_folder(CONF / group, f"`git checkout {CONF}` restores it", SettingsError)
    for group in groups:
        _check_choice(group, params[group], overrides)
    defaults: list[Any] = [f"schema_{name}" for name, kind in sections.items() if is_dataclass(kind)]
    defaults += [{group: params[group]} for group in groups] + ["_self_"]
    node = {"defaults": defaults, **{name: params[name] for name in sections if name not in groups}}
    # Checked before OmegaConf sees the values: it would turn a maker called yes into the text "True".
    faults = [fault for name, kind in sections.items() for fault in _file_faults(name, kind, params[name], overrides)]
    faults += [fault for entry in overrides for fault in _override_faults(entry, sections)]
    if faults:
        raise SettingsError(*faults)
    try:
        config = _compose(node, sections, overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a number for the name of a file
        raise SettingsError(_explain(error, sections)) from None
    if faults := [*_text_faults(OmegaConf.to_container(config), "")]:
        raise SettingsError(*faults)
    return config


def to_objects(sections: Mapping[str, Any], config: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Turn the composed configuration into typed values, one per section. Each settings class checks its own ranges.

    `overrides` must be those that composed it: an error names the place where the value was set. Raises SettingsError.
    """
    try:
        container: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SettingsError(_explain(error, sections)) from None
    arguments: dict[str, Any] = {}
    faults: list[str] = []
    for name, kind in sections.items():
        try:
            value = build(kind, container.get(name), name)
            if name == "seed" and not 0 <= value < 2**32:
                raise SettingsError(f"seed: must be between 0 and {2**32 - 1}, {got(value)}")
            arguments[name] = value
        except SettingsError as error:
            faults += [
                f"params: {fault}; change it {place_of(fault.partition(':')[0], overrides)}" for fault in error.faults
            ]
        except OmegaConfBaseException as error:
            faults.append(_explain(error, sections))
    if faults:
        raise SettingsError(*faults)
    return arguments


def _compose(node: dict[str, Any], sections: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    store = ConfigStore.instance()
    for name, kind in sections.items():
        if is_dataclass(kind):
            store.store(name=f"schema_{name}", node=_schema(kind), package=name)
    store.store(name="stage", node=node)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return hydra_compose("stage", overrides=list(overrides))


def _schema(kind: Any) -> type:
    """A copy of a settings class that is not frozen: OmegaConf makes frozen classes read-only before it fills them."""
    hints = get_type_hints(kind)
    twins = [
        (
            own.name,
            _schema(hints[own.name]) if is_dataclass(hints[own.name]) else hints[own.name],
            field(default=own.default),
        )
        for own in fields(kind)
    ]
    return make_dataclass(kind.__name__, twins)


def _file_faults(name: str, kind: Any, value: Any, overrides: Sequence[str]) -> Iterator[str]:
    """Values of a wrong type in a section of params.yaml, or in the conf/ file that the section names."""
    path = PARAMS
    if (CONF / name).is_dir():
        path = CONF / name / f"{_chosen(name, value, overrides)}.yaml"
        value = load_yaml(path)
    for setting, fault, cure in wrong_types(kind, value, name):
        yield f"params: {setting}: {fault}; {cure} in {path}"


def _override_faults(entry: str, sections: Mapping[str, Any]) -> Iterator[str]:
    """Faults of one command-line setting, with a type check if it is in one of `sections`."""
    try:
        (override,) = OverridesParser.create().parse_overrides([entry])
    except (HydraException, OmegaConfBaseException, RecursionError, ValueError):  # ValueError: a number of 5000 digits
        yield f"command line: is not a setting, {got(entry)}; write name=value, like train.lr=1e-3, and quote odd text"
        return
    if override.is_add() or override.is_delete():
        yield f"command line: no setting can be added or removed, {got(entry)}; write name=value"
        return
    if override.is_sweep_override():
        yield f"command line: has several values, {got(entry)}; give one, or try each with `dvc exp run --queue -S …`"
        return
    if override.key_or_group.partition(".")[0] == "hydra":
        yield f"command line: sets nothing in this project, {got(entry)}; remove it"
        return
    kind = _kind(override.key_or_group, sections)
    if kind is None:
        return
    value = override.value()
    # The shell removes quotes, so a number may be meant as text.
    if type(value) in (int, float) and str in alternatives(kind):
        value = str(value)
    for setting, fault, cure in _wrong_parts(kind, value, override.key_or_group):
        yield f"params: {setting}: {fault}; {cure} on the command line"


def _wrong_parts(kind: Any, value: Any, where: str) -> Iterator[tuple[str, str, str]]:
    """Like wrong_types, for a value that may hold only some settings of a section, like train.lora={alpha: 8}."""
    if not is_dataclass(kind) or not isinstance(value, dict):
        yield from wrong_types(kind, value, where)
        return
    hints = get_type_hints(kind)
    for name in value.keys() & hints.keys():  # OmegaConf reports the others
        yield from _wrong_parts(hints[name], value[name], f"{where}.{name}")


def _kind(setting: str, sections: Mapping[str, Any]) -> Any:
    """The declared type of a setting like `train.lora.rank`; None if it does not exist or chooses a file."""
    section, *rest = setting.split(".")
    if section not in sections or (not rest and (CONF / section).is_dir()):
        return None
    kind = sections[section]
    for name in rest:
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return kind


def _check_events(text: str) -> None:
    """Refuse aliases and deep nesting: aliases of aliases make a small file expand beyond any memory."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: has an alias, got *{event.anchor}; write the value out"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: is nested too deeply")


def _key_faults(value: object, where: str = "") -> Iterator[str]:
    """Keys that are no text, at any level: 1 and "1" would be the same setting twice."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                yield f"{where}{key}: the name of a setting must be text, {got(key)}"
            yield from _key_faults(inner, f"{where}{key}.")
    elif isinstance(value, list):
        for inner in value:
            yield from _key_faults(inner, where)


def _text_faults(value: object, where: str) -> Iterator[str]:
    """Faults of the texts in a setting: `${…}`, and text that UTF-8 cannot encode.

    OmegaConf would resolve `${…}`, and could copy a secret from the environment into every artefact.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _text_faults(inner, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _text_faults(inner, f"{where}[{index}]")
    elif isinstance(value, str) and "${" in value:
        yield f"params: {where}: must hold no ${{…}}, {got(value)}; write the value itself"
    elif isinstance(value, str) and not is_encodable(value):
        yield f"params: {where}: must be text that UTF-8 can hold, {got(value)}; type it again"


def _check_choice(group: str, choice: object, overrides: Sequence[str]) -> None:
    options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    chosen = _chosen(group, choice, overrides)
    for where, value in ((PARAMS, choice), ("command line", chosen)):
        if value not in options:
            file = (
                f"{value}.yaml" if isinstance(value, str) and re.fullmatch(r"[\w.-]{1,100}", value) else "<name>.yaml"
            )
            choices = f"choose from {', '.join(options)} or " if options else ""
            raise SettingsError(f"{where}: {group}: no such option, {got(value)}; {choices}write {CONF / group / file}")
    path = CONF / group / f"{chosen}.yaml"
    # Hydra reads this file itself, without our checks. load_yaml runs them first.
    if "defaults" in load_yaml(path):
        raise SettingsError(f"{path}: must have no defaults list, got one; write its values into this file")


def _chosen(group: str, choice: object, overrides: Sequence[str]) -> object:
    """The option in effect: the last one on the command line, else that of params.yaml."""
    return [choice, *(entry.partition("=")[2] for entry in overrides if entry.startswith(f"{group}="))][-1]


def place_of(setting: str, overrides: Sequence[str] = ()) -> str:
    """Where a setting like `train.lr` got its value, for the end of a message: "in params.yaml"."""
    given = (entry.partition("=")[0] for entry in overrides)
    if setting.startswith("paths.") or any(setting == name or setting.startswith(f"{name}.") for name in given):
        return "on the command line"
    group = setting.partition(".")[0]
    return f"in {CONF / group / str(load_yaml(PARAMS)[group])}.yaml" if (CONF / group).is_dir() else f"in {PARAMS}"


def _explain(error: Exception, sections: Mapping[str, Any]) -> str:
    """A message of Hydra or OmegaConf as one of our lines. For an unknown setting it suggests existing names."""
    text = one_line(error)
    unknown = re.search(r"Key '([^']+)' (?:is not in struct|not in '(\w+)')|Could not override '([^']+)'", text)
    full = re.search(r"full_key: (\S+)", text)
    where = full[1].rstrip(",") if full else None
    if unknown:
        name = where or unknown[1] or unknown[3]
        if (section := name.partition(".")[0]) not in sections and section in load_yaml(PARAMS):
            return (
                f"params: {name}: is a setting of other stages, this one knows {', '.join(sections)}; "
                f"set it in {PARAMS}"
            )
        return f"params: {name}: no such setting{_nearest(name, sections)}"
    if where:
        problem = text.split(" full_key:")[0]
        return f"params: {where}: {problem}; change it in params.yaml or on the command line"
    return f"settings: {text}; write name=value, like train.lr=1e-3"


def _nearest(name: str, sections: Mapping[str, Any]) -> str:
    known = [setting for section, kind in sections.items() for setting in _settings(section, kind)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else f"; this stage knows {', '.join(sections)}"


def _settings(name: str, kind: Any) -> list[str]:
    """Dotted names of a section and of all settings in it."""
    fields = get_type_hints(kind).items() if is_dataclass(kind) else ()
    return [name, *(setting for field, hint in fields for setting in _settings(f"{name}.{field}", hint))]
