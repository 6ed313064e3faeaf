"""The locked packages are installed, and an audit without an answer never reports that all is well."""

import re
import shutil
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT


def locked(name):
    """Version and hashes of each package in a lock file."""
    found = {}
    for line in (ROOT / "docker" / name).read_text(encoding="utf-8").replace("\\\n", "").splitlines():
        if not line.startswith("#"):
            package, version = re.match(r"([\w.-]+)==(\S+)", line).groups()
            found[package] = (version, re.findall(r"--hash=sha256:[0-9a-f]{64}\b", line))
    return found


@pytest.mark.parametrize("name", ["requirements.lock", "tools.lock", "server.lock", "remotes.lock"])
def test_every_locked_package_has_its_hashes(name):
    packages = locked(name)
    assert packages
    assert not [package for package, (_, hashes) in packages.items() if not hashes]


def test_only_torch_is_without_hashes():
    assert list(locked("torch.lock")) == ["torch"]
    by_torch = ("torch", "triton", "cuda-", "nvidia-")
    assert not [package for package in locked("requirements.lock") if package.startswith(by_torch)]


@pytest.mark.parametrize("name", ["server.lock", "remotes.lock"])
def test_what_is_locked_apart_has_the_versions_of_the_main_lock(name):
    main = locked("requirements.lock")
    assert not {package for package, facts in locked(name).items() if package in main and main[package][0] != facts[0]}


@pytest.mark.parametrize(
    ("group", "files"),
    [
        (None, ["requirements.lock", "torch.lock"]),
        ("supply-chain", ["tools.lock"]),
        ("server", ["server.lock"]),
        ("remotes", ["remotes.lock"]),
    ],
)
def test_the_lock_has_what_the_project_asks_for(group, files):
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = content["project"]
    wanted = content["dependency-groups"].get(group) or [
        *project["dependencies"],
        *project["optional-dependencies"]["dev"],
    ]
    versions = {package: version for name in files for package, (version, _) in locked(name).items()}
    for requirement in map(Requirement, wanted):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        ("echo 'No known vulnerabilities found' >&2", 0, "No known vulnerabilities found"),
        ("echo 'zlib 1.0 CVE-1'; exit 1", 2, "CVE-1"),
        (
            "echo 'ConnectionError: no such host' >&2; exit 1",
            2,
            "error: audit: the vulnerability service did not answer",
        ),
    ],
    ids=["none", "found", "unreachable"],
)
def test_an_audit_says_what_it_learnt(tmp_path, answer, status, said):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    tools = tmp_path / ".scratch/tools"
    (tools / "bin").mkdir(parents=True)
    (tools / "bin/pip-audit").write_text(
        f"#!/bin/sh\ngrep -q '^torch==[0-9.]*$' .scratch/audit.txt || exit 9\n{answer}\n"
    )
    (tools / "bin/pip-audit").chmod(0o755)
    (tools / ".complete").touch()
    done = subprocess.run(["make", "audit"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
    assert (status == 0) == ("No known" in done.stdout)
