"""MLflow on PostgreSQL as a team serves it: started from nothing, used by a pipeline, restarted, restored from a backup."""

import http.client
import json
import os
import socket
import subprocess
import time

import pytest

from tests.workplace import STAGES, with_tiny_model

pytestmark = pytest.mark.engine

DOCKER = os.environ.get("DOCKER", "docker")
RUNS = (
    "import json, mlflow; c = mlflow.MlflowClient(); e = c.get_experiment_by_name('remint').experiment_id;"
    "print(json.dumps(sorted([r.info.run_name, r.data.metrics, r.data.tags.get('remint.kind'), r.info.status,"
    " sorted(f.path for f in c.list_artifacts(r.info.run_id))] for r in c.search_runs([e]))))"
)


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return str(bound.getsockname()[1])


class Stack:
    """The project's own compose file with ports and volumes of this test."""

    def __init__(self):
        self.port, self.chat_port = free_port(), free_port()
        self.name = f"remint-test-{os.getpid()}"
        self.variables = {
            "DOCKER": DOCKER,
            "COMPOSE_PROJECT_NAME": self.name,
            "PORT": self.port,
            "CHAT_PORT": self.chat_port,
        }

    def __call__(self, folder, *arguments, status=0, **variables):
        done = subprocess.run(
            [folder / "docker/stack", *arguments],
            env={**os.environ, **self.variables, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == status, done.stdout[-3000:]
        return done.stdout

    def wipe(self, folder):
        self(folder, "down")
        for volume in ("db", "artifacts"):
            subprocess.run([DOCKER, "volume", "rm", f"{self.name}_{volume}"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def stack():
    return Stack()


@pytest.fixture(scope="module")
def used(stack, tmp_path_factory):
    """A workplace that has started the stack and logged a pipeline to it, by MLFLOW_TRACKING_URI alone."""
    place = with_tiny_model(tmp_path_factory.mktemp("stack") / "place")
    place.record_checksums("tiny")
    stack(place.root, "up")
    place.variables["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{stack.port}"
    assert place.repro() == STAGES
    place.run("docker/run", "python", "-m", "remint", "sync")
    yield place
    stack.wipe(place.root)


def runs(place):
    return json.loads(place.run("docker/run", "python", "-c", RUNS).splitlines()[-1])


def test_a_pipeline_is_there_and_survives_a_restart_and_a_restore(stack, used):
    logged = runs(used)
    assert sorted(kind for _, _, kind, _, _ in logged) == ["pipeline", "stage", "stage"]
    assert {status for *_, status, _ in logged} == {"FINISHED"}
    (artifacts,) = [paths for _, _, kind, _, paths in logged if kind == "pipeline"]
    assert "report.html" in artifacts
    stack(used.root, "down")
    stack(used.root, "up")
    assert runs(used) == logged
    saved = used.root / "saved.tar"
    assert "saved: " in stack(used.root, "backup", str(saved))
    stack.wipe(used.root)
    stack(used.root, "up")
    assert "NoneType" in used.run("docker/run", "python", "-c", RUNS, status=1)
    assert "restored: " in stack(used.root, "restore", str(saved))
    assert runs(used) == logged
    assert "has this state already" in used.run("docker/run", "python", "-m", "remint", "sync")


def test_a_damaged_backup_is_refused_before_anything_is_touched(stack, used, tmp_path):
    saved = tmp_path / "saved.tar"
    stack(used.root, "backup", str(saved))
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    logged = runs(used)
    assert "is damaged or no backup" in stack(used.root, "restore", str(saved), status=1)
    assert "no backup to restore" in stack(used.root, "restore", str(tmp_path / "absent"), status=1)
    assert runs(used) == logged


def ask(port, path="/api/2.0/mlflow/experiments/search", body=None, **headers):
    connection = http.client.HTTPConnection(f"127.0.0.1:{port}", timeout=60)
    try:
        data = json.dumps({"max_results": 5} if body is None else body)
        connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_foreign_hosts_and_origins_are_refused_and_loopback_alone_is_bound(stack, used):
    own = f"127.0.0.1:{stack.port}"
    assert ask(stack.port)[0] == 200
    assert ask(stack.port, Host=f"localhost:{stack.port}", Origin=f"http://localhost:{stack.port}")[0] == 200
    for headers in (
        {"Host": "evil.example"},
        {"Host": "192.168.1.1:5000"},
        {"Host": own, "Origin": "http://evil.example"},
    ):
        assert ask(stack.port, **headers)[0] == 403, headers
    listing = subprocess.run(
        [DOCKER, "container", "ls", "--format", "{{.Ports}}", "--filter", f"name={stack.name}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"127.0.0.1:{stack.port}->5000/tcp" in listing
    assert "0.0.0.0" not in listing


def test_a_password_is_asked_for_if_one_wants(stack, used):
    stack(used.root, "up", AUTH="1")
    assert ask(stack.port)[0] == 401
    secret = (used.root / "docker/secrets/admin_password").read_text()
    used.variables |= {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": secret}
    assert len(runs(used)) == 3
    stack(used.root, "up")


def test_the_chat_server_answers_with_the_pipelines_model(stack, used):
    stack(used.root, "up", CHAT="1")
    question = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 4}
    status, said = ask(stack.chat_port, "/v1/chat/completions", question)
    assert status == 200
    assert json.loads(said)["choices"][0]["message"]["role"] == "assistant"
    assert ask(stack.chat_port, "/v1/chat/completions", question, Origin="http://evil.example")[0] == 403


def test_what_dies_comes_up_again(stack, used):
    name = f"{stack.name}[_-]mlflow"
    identity = subprocess.run(
        [DOCKER, "container", "ls", "--quiet", "--filter", f"name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    logged = runs(used)
    # From inside, for an engine does not restart what it was told to end.
    subprocess.run([DOCKER, "exec", identity, "python", "-c", "import os; os.kill(1, 15)"], check=True)
    deadline = time.monotonic() + 90
    while True:
        try:
            assert ask(stack.port)[0] == 200
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(1)
    assert runs(used) == logged
