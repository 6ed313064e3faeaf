"""`remint verify`: check that the artefacts are unchanged since they were made."""

from remint.core import manifest
from remint.core.errors import RemintError
from remint.core.paths import ARTEFACTS
from remint.runner import signature
from remint.runner.config import places
from remint.stages.merge import provenance


def main() -> None:
    """Recompute the checksums of every artefact; check the model's provenance, and its signature if it has one.

    Raises RemintError that names each file that differs.
    """
    faults: list[str] = []
    paths = places()
    for name in ARTEFACTS:
        place = getattr(paths, name)
        try:
            manifest.verify(place, name)
            if name == "model":
                provenance.verify(place)
                signature.verify(place)
            print(f"{place}: as recorded")
        except RemintError as error:
            faults += error.faults
    if faults:
        raise RemintError(*faults)
