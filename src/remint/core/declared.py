"""What a stage was started with: the settings and dependencies that dvc.yaml declares for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from remint.core.errors import ArtefactError, listed
from remint.core.manifest import digest

# What to do after a change while a stage ran.
AGAIN = "undo the change and run the same command to finish, or keep the change and run it to start anew"


@dataclass(frozen=True)
class Declared:
    """The composed settings of a stage and the sha256 (hex) of each file that it depends on, as they were at its start.

    An artefact counts as one dependency, by its manifest. `changes` lists what differs by now, one line each.
    """

    stage: str
    settings: Mapping[str, Any]
    dependencies: Mapping[str, str]
    changes: Callable[[], list[str]]

    @property
    def fingerprint(self) -> str:
        """One checksum (sha256, hex) of all of it."""
        return digest({"stage": self.stage, "settings": self.settings, "dependencies": self.dependencies})

    @property
    def record(self) -> dict[str, Any]:
        """Settings and dependencies, for the manifest of the artefact that is made from them."""
        return {"settings": dict(self.settings), "dependencies": dict(self.dependencies)}

    def check_unchanged(self) -> None:
        """Raise ArtefactError that lists what changed since the start.

        DVC records settings and dependencies as they are when a stage ends. So a stage must not end well if they
        changed: dvc.lock and the run cache would then give a wrong origin for the result.
        """
        if changes := self.changes():
            raise ArtefactError(
                *listed(
                    f"{self.stage}: {change} since the stage started, so its result is not kept; {AGAIN}"
                    for change in changes
                )
            )
