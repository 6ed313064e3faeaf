"""Who vouches for a model: a signature over its manifest, and so over every file of it, by an SSH key.

The signature lies beside the artefact, whose bytes stay the same, and can be committed to git.
"""

import subprocess
from pathlib import Path

from remint.core.errors import ArtefactError, RemintError, one_line
from remint.core.manifest import NAME
from remint.core.paths import CONF
from remint.runner.config import places

SIGNERS = CONF / "allowed_signers"
_NAMESPACE = "remint"  # a signature for something else, a git commit say, is none for a model


def sign(key: Path) -> None:
    """Sign the pipeline's model with a private SSH key, or a public one whose other half an agent holds."""
    model = places().model
    if not (model / NAME).is_file():
        raise RemintError(f"{model}: no model there; `make repro` builds it")
    done = _ssh_keygen("sign", "-f", str(key.expanduser()), "-n", _NAMESPACE, stdin=(model / NAME).read_bytes())
    if done.returncode:
        raise RemintError(
            f"{key}: cannot sign ({one_line(done.stderr.decode(errors='replace'))}); give a private SSH key, KEY=~/.ssh/id_ed25519"
        )
    _place(model).write_bytes(done.stdout)
    print(f"{_place(model)}: signs {model}; `make verify` checks it against the keys in {SIGNERS}")


def verify(model: Path) -> None:
    """Say who signed the model, if anyone did. Raises ArtefactError if the signature is bad or its key is not trusted."""
    place = _place(model)
    if not place.is_file():
        return
    if not SIGNERS.is_file():
        raise ArtefactError(f"{SIGNERS}: missing; write lines `NAME PUBLIC-KEY` for those whose signature you trust")
    trusted = ("-s", str(place), "-f", str(SIGNERS))
    manifest = (model / NAME).read_bytes()
    found = _ssh_keygen("find-principals", *trusted)
    signer = found.stdout.decode().split("\n")[0].strip()
    if found.returncode or not signer:
        raise ArtefactError(f"{place}: is by no key of {SIGNERS}; sign it anew, or write the key there if you trust it")
    done = _ssh_keygen("verify", "-I", signer, "-n", _NAMESPACE, *trusted, stdin=manifest)
    if done.returncode:
        raise ArtefactError(f"{place}: is no signature of {model} by {signer}; sign it anew with `make sign`")
    print(f"{place}: signed by {signer}")


def _place(model: Path) -> Path:
    return model.with_name(f"{model.name}.sig")


def _ssh_keygen(action: str, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["ssh-keygen", "-Y", action, *arguments], input=stdin, capture_output=True)
    except FileNotFoundError:
        raise RemintError("ssh-keygen: not found; install OpenSSH's client") from None
