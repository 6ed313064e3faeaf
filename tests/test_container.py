"""docker/run with a fake engine that records its arguments: what each command can reach, and what is printed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.workplace import wait_for

ENGINE = """#!/bin/sh
here=$(dirname "$0")
case $* in
    --version) echo "${FAKE_VERSION:-Docker version 28.3.3, build 0}" ;;
    info*) echo "${FAKE_SECURITY:-[name=seccomp,profile=builtin]}" ;;
    "image inspect"*) [ -z "${FAKE_NO_IMAGE:-}" ] && echo sha256:abc || { echo "$FAKE_NO_IMAGE" >&2; exit 1; } ;;
    "container inspect"*) [ -n "${FAKE_STATE:-}" ] && echo "$FAKE_STATE" || exit 1 ;;
    "container ls"*) echo "$*" >> "$here/looked"; echo c0ffee ;;
    stop*) echo "$*" >> "$here/stopped" ;;
    import*) cat > "$here/imported.tar" ;;
    build*) printf '%s\\n' "$@" >> "$here/built"
        cat $(printf '%s\\n' "$@" | sed -n 's/^--secret=id=.*,src=//p') > "$here/secrets" ;;
    run*) printf '%s\\n' "$@" > "$here/asked"; eval "${FAKE_RUN:-exit 0}" ;;
esac
"""
TRAIN = ("python", "-m", "remint", "train")
STAGE_BASE = ("python", "-m", "remint", "stage_base")


class Engine:
    """A project folder and a fake engine. `run` returns the output of docker/run, `asked` the engine's arguments."""

    def __init__(self, root: Path):
        self.project, self.bin = root / "a folder with spaces", root / "bin"
        (self.project / "docker").mkdir(parents=True)
        shutil.copy(ROOT / "docker/run", self.project / "docker")
        shutil.copy(ROOT / "dvc.yaml", self.project)
        self.bin.mkdir()
        (self.bin / "docker").write_text(ENGINE, encoding="utf-8")
        (self.bin / "docker").chmod(0o755)

    def start(self, *command, cwd=None, **variables):
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        environment = {**kept, "PATH": f"{self.bin}:/usr/bin:/bin", "RUNNER": "docker", **variables}
        return subprocess.Popen(
            [self.project / "docker/run", *command],
            cwd=cwd or self.project,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def build(self, *targets, status=0, **variables):
        """Run docker/build; returns the arguments of the engine's command and the secrets that it got."""
        (self.bin / "built").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, ROOT / "docker/build", *targets],
            env={"PATH": f"{self.bin}:/usr/bin:/bin", "PIP_CONFIG_FILE": os.devnull, **variables},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        return (self.bin / "built").read_text().splitlines(), (self.bin / "secrets").read_text()

    def run(self, *command, status=0, **variables):
        with self.start(*command, **variables) as process:
            out, error = process.communicate(timeout=30)
        assert process.returncode == status, error
        return out + error

    def asked(self, *command, **variables):
        self.run(*command, **variables)
        return (self.bin / "asked").read_text(encoding="utf-8").splitlines()


@pytest.fixture
def engine(tmp_path):
    return Engine(tmp_path)


def after(asked, option):
    """The value of an option, as the next argument or after an equals sign."""
    for word, following in zip(asked, [*asked[1:], ""], strict=True):
        if word == option or word.startswith(f"{option}="):
            return word.partition("=")[2] or following
    return None


def test_a_stage_gets_its_folder_and_little_else(engine):
    asked = engine.asked(*TRAIN, "train.lr=1e-3 ")
    project = str(engine.project)
    assert asked[-7:] == ["remint", "docker/run", *TRAIN, "train.lr=1e-3 "]
    assert [word for word in asked if word.startswith("type=bind")] == [f"type=bind,source={project},target={project}"]
    assert after(asked, "--workdir") == project
    assert after(asked, "--user") == f"{os.getuid()}:{os.getgid()}"
    assert {"--rm", "--pull=never", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(asked)
    assert f"--env=PYTHONPATH={project}/src" in asked
    assert "--env=IMAGE_ID=sha256:abc" in asked
    assert f"--env=HOME={project}/.scratch/home" in asked
    assert "--gpus=all" not in asked


def test_an_experiment_in_a_copy_keeps_its_work_in_the_repository(engine):
    copy = engine.project / ".dvc/tmp/exps/temp"
    shutil.copytree(engine.project / "docker", copy / "docker")
    variables = {"DVC_ROOT": str(engine.project), "DVC_STAGE": "train", "DVC_EXP_NAME": "new"}
    asked = engine.asked(*TRAIN, cwd=copy, **variables)
    assert after(asked, "--workdir") == str(copy)
    assert f"type=bind,source={engine.project},target={engine.project}" in asked
    assert {f"--env=DVC_ROOT={engine.project}", "--env=DVC_STAGE", "--env=DVC_EXP_NAME"} <= set(asked)
    # DVC keeps using the terminal, if there is one.
    assert "--interactive" not in asked
    assert after(asked, "--name") != after(engine.asked(*TRAIN), "--name")


SERVER = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}
FILE = {"MLFLOW_TRACKING_URI": "sqlite:///x.db"}


@pytest.mark.parametrize(
    ("command", "variables", "network"),
    [
        (TRAIN, {}, "none"),
        (TRAIN, FILE, "none"),
        (TRAIN, SERVER, "host"),
        (TRAIN, {**SERVER, "REMINT_NETWORK": "lab"}, "lab"),
        (TRAIN, {"REMINT_NETWORK": "lab"}, "none"),
        (("python", "-m", "remint", "merge"), SERVER, "none"),
        (STAGE_BASE, {}, None),
        (STAGE_BASE, {"REMINT_NETWORK": "lab"}, "lab"),
        (("dvc", "repro"), {}, None),
        (("make", "repro"), SERVER, "host"),
    ],
)
def test_the_network_is_there_for_the_base_and_a_named_server_alone(engine, command, variables, network):
    assert after(engine.asked(*command, **variables), "--network") == network


def test_secrets_go_by_name_and_only_where_they_are_needed(engine):
    certificates = engine.project.parent / "ca.crt"
    certificates.touch()
    variables = {"HF_TOKEN": "s3cret", "MLFLOW_TRACKING_PASSWORD": "s3cret", "SSL_CERT_FILE": str(certificates)}
    base, train = engine.asked(*STAGE_BASE, **variables), engine.asked(*TRAIN, **variables)
    assert "s3cret" not in "\n".join([*base, *train])
    assert "--env=MLFLOW_TRACKING_PASSWORD" in train
    assert "--env=HF_TOKEN" in base
    assert "--env=HF_TOKEN" not in train
    assert f"type=bind,source={certificates},target={certificates},readonly" in base
    assert str(certificates) not in "\n".join(train)


@pytest.mark.parametrize(
    ("variables", "user"),
    [
        ({"FAKE_SECURITY": "[name=seccomp,profile=builtin name=rootless]"}, ["--user=0:0"]),
        ({"FAKE_VERSION": "podman version 5.4.0"}, None),
    ],
    ids=["rootless Docker", "Podman"],
)
def test_files_belong_to_the_user_whatever_the_engine_calls_them(engine, variables, user):
    own = f"--user={os.getuid()}:{os.getgid()}"
    wanted = user or ([own] if os.getuid() == 0 else ["--userns=keep-id", own])
    assert [word for word in engine.asked(*TRAIN, **variables) if word.startswith("--user")] == wanted


@pytest.mark.parametrize(
    ("variables", "gpu"),
    [
        ({}, "--gpus=all"),
        ({"FAKE_VERSION": "podman version 5.4.0"}, "--device=nvidia.com/gpu=all"),
        ({"REMINT_DEVICE": "cpu"}, None),
    ],
    ids=["Docker", "Podman", "unwanted"],
)
def test_a_gpu_is_handed_on_where_there_is_one(engine, variables, gpu):
    smi = engine.bin / "nvidia-smi"
    smi.write_text("#!/bin/sh\n")
    smi.chmod(0o755)
    asked = engine.asked(*TRAIN, **variables)
    assert [word for word in asked if word.startswith(("--gpus", "--device"))] == ([gpu] if gpu else [])


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"FAKE_NO_IMAGE": "Error: No such image: remint"}, "there is no image remint; build it with `make image`"),
        ({"FAKE_NO_IMAGE": "Error: remint: image not known"}, "there is no image remint; build it with `make image`"),
        ({"FAKE_NO_IMAGE": "Cannot connect to the daemon"}, "docker does not answer (Cannot connect to the daemon)"),
        ({"DOCKER": "absent"}, "absent was not found; install Docker or Podman"),
        ({"FAKE_STATE": "running"}, "is already running this (running); wait for it, or stop it with `make stop`"),
        ({"RUNNER": "podman"}, "RUNNER must be local or docker, got 'podman'"),
    ],
)
def test_what_is_missing_is_one_line_with_its_cure(engine, variables, said):
    told = engine.run(*TRAIN, status=1, **variables).splitlines()
    assert len(told) == 1
    assert said in told[0]
    assert not (engine.bin / "asked").exists()


@pytest.mark.parametrize("status", [1, 125, 130, 143])
def test_exit_statuses_pass_through(engine, status):
    engine.run(*TRAIN, status=status, FAKE_RUN=f"exit {status}")


def test_a_signal_reaches_the_client_itself(engine):
    waiting = "trap 'exit 143' TERM; echo ready; while :; do sleep 0.05; done"
    with engine.start(*TRAIN, FAKE_RUN=waiting) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_backup_that_is_ended_ends_its_client_and_leaves_nothing(tmp_path, number, status):
    engine = tmp_path / "engine"
    engine.write_text(
        "#!/bin/sh\n"
        f"case $* in *pg_dump*) trap 'echo ended >{tmp_path}/said; exit 9' TERM; echo $$ >{tmp_path}/id\n"
        "    while :; do sleep 0.05; done ;; esac\n"
    )
    engine.chmod(0o755)
    command = (ROOT / "docker/stack", "backup", tmp_path / "saved/backup.tar")
    with subprocess.Popen(command, env={**os.environ, "DOCKER": str(engine)}, start_new_session=True) as process:
        wait_for(lambda: (tmp_path / "id").exists() and (tmp_path / "id").read_text(), process)
        process.send_signal(number)
        assert process.wait(timeout=10) == status
    assert (tmp_path / "said").read_text() == "ended\n"
    assert not list((tmp_path / "saved").iterdir())


@pytest.mark.slow
def test_a_killed_client_takes_its_own_container_along(engine):
    with engine.start(*TRAIN, FAKE_RUN="echo ready; exec sleep 60") as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1.2)  # longer than the watcher waits between two looks
        assert not (engine.bin / "stopped").exists()
        process.kill()
    wait_for((engine.bin / "stopped").exists, seconds=20)
    (label,) = [word for word in (engine.bin / "asked").read_text().split() if word.startswith("remint.run=")]
    assert f"--filter label={label}" in (engine.bin / "looked").read_text()
    assert (engine.bin / "stopped").read_text() == "stop c0ffee\n"


@pytest.mark.slow
def test_a_killed_dvc_takes_the_container_along(engine):
    """A shell takes the place of DVC: it starts docker/run, and only the shell is killed."""
    command = 'echo $$; docker/run python -m remint train; echo "never"'
    environment = {
        "PATH": f"{engine.bin}:/usr/bin:/bin",
        "RUNNER": "docker",
        "DVC_STAGE": "train",
        "FAKE_RUN": "exec sleep 60",
    }
    with subprocess.Popen(["sh", "-c", command], cwd=engine.project, env=environment, stdout=subprocess.DEVNULL) as dvc:
        wait_for((engine.bin / "asked").exists, dvc, seconds=20)
        dvc.kill()  # it is not reaped yet
        wait_for((engine.bin / "stopped").exists, seconds=20)


@pytest.mark.parametrize(
    ("content", "said"), [("a==1\n", None), ("a==2\n", "built from another docker/requirements.lock")]
)
def test_inside_the_image_a_command_runs_as_it_is_if_the_locks_agree(engine, content, said):
    image = engine.project.parent / "image"
    image.mkdir()
    for name in ("requirements.lock", "torch.lock"):
        (engine.project / "docker" / name).write_text("a==1\n")
        (image / name).write_text(content if name == "requirements.lock" else "a==1\n")
    told = engine.run("sh", "-c", "echo $PYTHONPATH", status=1 if said else 0, IN_IMAGE=str(image))
    assert said in told if said else told == f"{engine.project}/src\n"
    assert not (engine.bin / "asked").exists()


def test_the_way_to_the_package_index_is_a_secret_of_the_build(engine):
    authority = engine.project.parent / "ca.crt"
    authority.write_text("trusted", encoding="utf-8")
    variables = {"PIP_INDEX_URL": "https://me:s3cret@index.example/simple", "PIP_CERT": str(authority)}
    asked, secrets = engine.build(**variables)
    assert "s3cret" not in "\n".join(asked)
    assert "index-url = https://me:s3cret@index.example/simple\n" in secrets
    assert "cert = /run/secrets/ca.crt\n" in secrets
    assert "trusted" in secrets
    assert [asked[at + 1] for at, word in enumerate(asked) if word == "--target"] == ["remint", "server"]
    assert not [word for word in asked if word.startswith("--build-arg=BASE")]


def test_folders_of_wheels_become_an_image_that_is_the_same_each_time(engine):
    wheels = engine.project.parent / "wheels"
    wheels.mkdir()
    (wheels / "a-1-py3-none-any.whl").write_text("wheel")
    (wheels / "else.txt").write_text("private")
    made = set()
    for moment in (1, 2):
        os.utime(wheels / "a-1-py3-none-any.whl", (moment, moment))
        asked, secrets = engine.build("remint", PIP_FIND_LINKS=str(wheels))
        made.add((engine.bin / "imported.tar").read_bytes())
    assert "--build-arg=WHEELS=remint-wheels" in asked
    assert str(wheels) not in secrets
    with tarfile.open(engine.bin / "imported.tar") as archive:
        assert archive.getnames() == ["a-1-py3-none-any.whl"]
    assert len(made) == 1


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [
        ({"BASE": "debian:13"}, ["BASE=debian:13"]),
        (
            {"CPU": "1"},
            ["BASE=docker.io/library/debian:bookworm-slim", "TORCH_INDEX=https://download.pytorch.org/whl/cpu"],
        ),
        ({"CPU": "1", "BASE": "mine", "TORCH_INDEX": ""}, ["BASE=mine", "TORCH_INDEX="]),
    ],
)
def test_what_is_built_on_is_a_choice(engine, variables, arguments):
    (engine.bin / "pip").mkdir()
    for name in ("__init__.py", "__main__.py"):  # a pip without settings, which starts faster than the real one
        (engine.bin / "pip" / name).touch()
    asked, _ = engine.build("remint", PYTHONPATH=str(engine.bin), **variables)
    assert {f"--build-arg={argument}" for argument in arguments} <= set(asked)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (("remote",), "make remote: needs a URL, got none; add URL="),
        (("stop", "DOCKER=no-such-engine"), "make stop: no-such-engine was not found"),
        (("up", "DOCKER=no-such-engine"), "docker/stack: no-such-engine was not found"),
        (("recipe",), "`make recipe NAME=smoke` puts one in place"),
        (("ui", "PORT={taken}"), "make ui: port {taken} is not available; try PORT="),
    ],
)
def test_a_target_that_lacks_something_says_what(target, said):
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = str(server.getsockname()[1])
        command = ["make", "--old-file=.venv/.complete", *(word.format(taken=taken) for word in target)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert said.format(taken=taken) in done.stderr
