"""The settings of a base model, from conf/model/<name>.yaml."""

import re
from dataclasses import dataclass

from remint.core.errors import visible
from remint.core.files import is_inside
from remint.core.settings import DTYPES, check_ranges
from remint.model.template import Template

SOURCES = ("local_folder", "hub", "package_index")


@dataclass(frozen=True)
class Model:
    """Where a base model comes from, which files it must contain, how it is stored, and its chat template."""

    name: str
    source: str
    location: str
    revision: str | None
    member: str | None
    license: str
    dtype: str
    shard_mb: int
    files: dict[str, str]
    template: Template

    def __post_init__(self) -> None:
        pinned = re.fullmatch(r"[0-9a-f]{40}", self.revision or "") is not None
        package = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.+!_-]*", self.location) is not None
        bad_sums = {name: value for name, value in self.files.items() if not re.fullmatch(r"[0-9a-f]{64}", value)}
        bad_names = [name for name in self.files if not is_inside(name)]
        member = self.member or ""
        check_ranges(
            "model",
            (_is_line(self.name), "name", self.name, "must be the base model's name, in one line"),
            (_is_line(self.license), "license", self.license, "must be the base model's license, in one line"),
            (self.source in SOURCES, "source", self.source, f"must be one of {', '.join(SOURCES)}"),
            (self.source != "hub" or pinned, "revision", self.revision, "must be a commit of 40 hexadecimal digits"),
            (self.source != "package_index" or package, "location", self.location, "must be pinned as name==version"),
            (
                self.source != "package_index" or (is_inside(member) and member.endswith(".gguf")),
                "member",
                self.member,
                "must name the GGUF in the wheel",
            ),
            (self.dtype in DTYPES, "dtype", self.dtype, f"must be one of {', '.join(DTYPES)}"),
            (1 <= self.shard_mb <= 100_000, "shard_mb", self.shard_mb, "must be between 1 and 100000 MiB"),
            (not bad_sums, "files", bad_sums, "must give a sha256 of 64 hexadecimal digits for each file"),
            (not bad_names, "files", bad_names, "must name files inside the source"),
        )


def _is_line(text: str) -> bool:
    """Whether a text is one non-empty line without control characters, so that a model card's header can hold it."""
    return bool(text.strip()) and text == visible(text) and len(text.splitlines()) == 1
