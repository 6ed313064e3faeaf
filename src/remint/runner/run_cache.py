"""Verifies DVC's run cache: each entry must name the settings and inputs that its result was made with.

DVC takes a stage's result from the run cache instead of running the stage, also for others after `make share`.
"""

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest
from pathlib import Path
from typing import Any

from remint.core import manifest
from remint.core.errors import ArtefactError, RemintError, listed
from remint.core.files import parse_json, read_text
from remint.core.paths import MADE_BY, Paths
from remint.runner.config import load_yaml
from remint.runner.recorded import differing, locked_settings

_STAGE = re.compile(r"python -m remint (\w+)")


def verify(cache: Path) -> int:
    """Verify every entry of the run cache in DVC's cache folder, and the cached files that it names.

    Returns the number of entries. Raises ArtefactError that lists the wrong ones. Files that are not in the cache are
    skipped: DVC cannot use such an entry.
    """
    faults: list[str] = []
    entries = sorted(path for path in cache.glob("runs/*/*/*") if path.is_file())
    known: dict[str, bool] = {}
    for path in entries:
        try:
            faults += [f"{path}: {fault}; remove that file" for fault in _faults(load_yaml(path), cache, known)]
        except RemintError as error:
            faults += [f"{path}: {error.faults[0].partition(';')[0]}; remove that file"]
    if faults:
        raise ArtefactError(*listed(faults))
    return len(entries)


def _faults(entry: Mapping[str, Any], cache: Path, known: dict[str, bool]) -> Iterator[str]:
    """What is wrong with an entry. `known` remembers for each cached object whether its content is right."""
    stage = _STAGE.search(str(entry.get("cmd", "")))
    if stage is None or stage[1] not in MADE_BY:
        return
    kind = MADE_BY[stage[1]]
    files: dict[str, str] = {}
    for out in entry.get("outs") or []:
        files |= _listing(out, cache)
    if damaged := _damaged(files, cache, known):
        yield f"names {damaged[0]}, whose cached content is damaged"
        return
    text = _cached(files.get((getattr(Paths(), kind) / manifest.NAME).as_posix()), cache)
    if text is None:
        return
    facts = parse_json(text, "its manifest", "").get("facts")
    made = (facts or {}).get("made_by", {}).get(stage[1])
    if not isinstance(made, dict):
        yield f"the {kind} that it names does not record what it was made with"
        return
    for fault in differing(made["settings"], locked_settings(entry.get("params") or {}), "it"):
        yield f"the {kind} that it names {fault}"
    for dep in entry.get("deps") or []:
        name = f"{dep['path']}/{manifest.NAME}"
        recorded = (made.get("dependencies") or {}).get(name)
        content = _cached(_listing(dep, cache).get(name), cache)
        if recorded and content is not None and manifest.digest(content.encode()) != recorded:
            yield f"the {kind} that it names was made from another {dep['path']}"


def _listing(item: Mapping[str, Any], cache: Path) -> dict[str, str]:
    """The md5 of each file of an output or dependency, by path; {} if its listing is not in the cache."""
    name, md5 = str(item["path"]), str(item.get("md5"))
    if not md5.endswith(".dir"):
        return {name: md5}
    text = _cached(md5, cache)
    return {} if text is None else {f"{name}/{row['relpath']}": row["md5"] for row in parse_json(text, md5, "")}


def _damaged(files: Mapping[str, str], cache: Path, known: dict[str, bool]) -> list[str]:
    """The names of the files that are in the cache with other content than their md5 says."""
    fresh = [md5 for md5 in dict.fromkeys(files.values()) if md5 not in known and _object(md5, cache).is_file()]
    with ThreadPoolExecutor() as pool:
        known |= zip(fresh, pool.map(lambda md5: _md5(_object(md5, cache)) == md5, fresh), strict=True)
    return [name for name, md5 in files.items() if not known.get(md5, True)]


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "md5").hexdigest()


def _cached(md5: str | None, cache: Path) -> str | None:
    """The text of a cached object; None if it is not in the cache."""
    path = _object(md5 or "-", cache)
    return read_text(path, "remove it") if path.is_file() else None


def _object(md5: str, cache: Path) -> Path:
    return cache / "files/md5" / md5[:2] / md5[2:]
