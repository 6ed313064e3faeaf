"""Signs a model with an SSH key. The signature covers the manifest, and so every file of the model.

It is a separate file next to the artefact, whose bytes stay the same. It can be committed to git.
"""

import os
import subprocess
from pathlib import Path

from remint.core.errors import ArtefactError, RemintError, one_line
from remint.core.files import check_file
from remint.core.manifest import NAME
from remint.core.paths import CONF, Paths

SIGNERS = CONF / "allowed_signers"
_HEAD = b"-----BEGIN SSH SIGNATURE-----"
_NAMESPACE = "remint"  # a signature made for another purpose, such as a git commit, is not valid for a model


def sign(key: Path) -> None:
    """Sign the pipeline's model. `key` is a private SSH key, or a public key whose private key an ssh-agent holds.

    Raises RemintError if there is no model or the key cannot sign.
    """
    model = Paths().model
    if not (model / NAME).is_file():
        raise RemintError(f"{model}: no model there; `make repro` builds it")
    check_file(key.expanduser(), "give a private SSH key, KEY=~/.ssh/id_ed25519", RemintError)
    place = _signature_file(model)
    if os.path.lexists(place):  # an older signature is replaced, nothing else
        check_file(place, "move it away: the signature is written there", RemintError)
        if not place.read_bytes().startswith(_HEAD):
            raise RemintError(f"{place}: is not a signature; move it away: the signature is written there")
    done = _ssh_keygen("sign", "-f", str(key.expanduser()), "-n", _NAMESPACE, stdin=(model / NAME).read_bytes())
    if done.returncode:
        raise RemintError(
            f"{key}: cannot sign ({one_line(done.stderr.decode(errors='replace'))}); give a private SSH key, KEY=~/.ssh/id_ed25519"
        )
    place.write_bytes(done.stdout)
    print(f"{place}: signs {model}; `make verify` checks it against the keys in {SIGNERS}")


def verify(model: Path) -> None:
    """Print who signed the model, if it is signed. Raises ArtefactError for a bad signature or an untrusted key."""
    place = _signature_file(model)
    if not os.path.lexists(place):
        return
    check_file(place, "sign again with `make sign`")
    check_file(SIGNERS, "write a line `NAME PUBLIC-KEY` for each signer you trust")
    trusted = ("-s", str(place), "-f", str(SIGNERS))
    manifest = (model / NAME).read_bytes()
    found = _ssh_keygen("find-principals", *trusted)
    signer = found.stdout.decode().split("\n")[0].strip()
    if found.returncode or not signer:
        raise ArtefactError(f"{place}: matches no key in {SIGNERS}; sign again, or add the key there if you trust it")
    done = _ssh_keygen("verify", "-I", signer, "-n", _NAMESPACE, *trusted, stdin=manifest)
    if done.returncode:
        raise ArtefactError(f"{place}: is not a signature of {model} by {signer}; sign again with `make sign`")
    print(f"{place}: signed by {signer}")


def _signature_file(model: Path) -> Path:
    return model.with_name(f"{model.name}.sig")


def _ssh_keygen(action: str, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["ssh-keygen", "-Y", action, *arguments], input=stdin, capture_output=True)
    except FileNotFoundError:
        raise RemintError("ssh-keygen: not found; install OpenSSH's client") from None
