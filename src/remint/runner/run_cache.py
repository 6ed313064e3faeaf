"""Verifies DVC's run cache: each entry must name the settings and inputs that its result was made with.

DVC takes a stage's result from the run cache instead of running the stage, also for others after `make share`.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from remint.core import manifest
from remint.core.errors import ArtefactError, RemintError, listed
from remint.core.files import parse_json, read_text
from remint.core.paths import MADE_BY, Paths
from remint.runner.config import load_yaml
from remint.runner.dvc_guard import stage_of
from remint.runner.recorded import differing, locked_settings

# md5 and sha256 (hex) of a cached object.
_Digests = tuple[str, str]


def verify(cache: Path) -> int:
    """Verify every entry of the run cache in DVC's cache folder, and the cached files that it names.

    Returns the number of entries. Raises ArtefactError that lists the wrong ones. Files that are not in the cache are
    skipped: DVC cannot use such an entry.
    """
    faults: list[str] = []
    entries = sorted(path for path in cache.glob("runs/*/*/*") if path.is_file())
    known: dict[str, _Digests] = {}
    for path in entries:
        try:
            faults += [f"{file}: {fault}; remove that file" for file, fault in _faults(path, cache, known)]
        except RemintError as error:
            faults.append(f"{path}: {error.faults[0].partition(';')[0]}; remove that file")
        except (AttributeError, KeyError, TypeError, ValueError):
            faults.append(f"{path}: is not an entry of DVC's run cache; remove that file")
    if faults:
        raise ArtefactError(*listed(dict.fromkeys(faults)))
    return len(entries)


def _faults(path: Path, cache: Path, known: dict[str, _Digests]) -> Iterator[tuple[Path, str]]:
    """Each file that is wrong, and why: the entry itself or a cached object. `known` remembers the objects read."""
    entry = load_yaml(path)
    stage = stage_of(entry["cmd"])
    if stage is None:
        return
    kind = MADE_BY[stage]
    place = getattr(Paths(), kind).as_posix()
    files: dict[str, str] = {}
    for out in entry["outs"]:
        files |= _listing(out, cache)
    _read(files.values(), cache, known)
    damaged = [md5 for md5 in files.values() if md5 in known and known[md5][0] != md5]
    if damaged:
        yield from ((_object(md5, cache), f"is damaged; it is a file of the {kind}") for md5 in damaged)
        return
    text = _cached(files.get(f"{place}/{manifest.NAME}"), cache)
    if text is None:
        return
    content = parse_json(text, f"the manifest of its {kind}", "")
    found = {name.removeprefix(f"{place}/"): known[md5][1] for name, md5 in files.items() if md5 in known}
    found.pop(manifest.NAME, None)
    if len(found) == len(files) - 1 and found != {name: row["sha256"] for name, row in content["files"].items()}:
        yield path, f"the {kind} that it names has other files than its manifest"
    made = content["facts"].get("made_by", {}).get(stage)
    if not isinstance(made, dict):
        yield path, f"the {kind} that it names does not record what it was made with"
        return
    for fault in differing(made["settings"], locked_settings(entry.get("params") or {}), "it"):
        yield path, f"the {kind} that it names {fault}"
    for dep in entry["deps"]:
        name = f"{dep['path']}/{manifest.NAME}"
        recorded = (made.get("dependencies") or {}).get(name)
        given = _cached(_listing(dep, cache).get(name), cache)
        if recorded and given is not None and manifest.digest(given.encode()) != recorded:
            yield path, f"the {kind} that it names was made from another {dep['path']}"


def _listing(item: Mapping[str, Any], cache: Path) -> dict[str, str]:
    """The md5 of each file of an output or dependency, by path; {} if its listing is not in the cache."""
    name, md5 = str(item["path"]), str(item.get("md5"))
    if not md5.endswith(".dir"):
        return {name: md5}
    text = _cached(md5, cache)
    return {} if text is None else {f"{name}/{row['relpath']}": row["md5"] for row in parse_json(text, md5, "")}


def _read(objects: Iterable[str], cache: Path, known: dict[str, _Digests]) -> None:
    """Add md5 and sha256 of the cached objects that are not known yet."""
    fresh = [md5 for md5 in dict.fromkeys(objects) if md5 not in known and _object(md5, cache).is_file()]
    with ThreadPoolExecutor() as pool:
        known |= zip(fresh, pool.map(lambda md5: _digests(_object(md5, cache)), fresh), strict=True)


def _digests(path: Path) -> _Digests:
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            md5.update(block)
            sha256.update(block)
    return md5.hexdigest(), sha256.hexdigest()


def _cached(md5: str | None, cache: Path) -> str | None:
    """The text of a cached object; None if it is not in the cache."""
    path = _object(md5 or "-", cache)
    return read_text(path, "remove it") if path.is_file() else None


def _object(md5: str, cache: Path) -> Path:
    return cache / "files/md5" / md5[:2] / md5[2:]
