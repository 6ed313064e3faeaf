"""MLflow on PostgreSQL as a team runs it: first start, runs of a pipeline, restart, restore from a backup."""

import http.client
import json
import time

import pytest

from tests.engine.conftest import docker

pytestmark = pytest.mark.engine

RUNS = (
    "import json, mlflow; c = mlflow.MlflowClient(); e = c.get_experiment_by_name('remint').experiment_id;"
    "print(json.dumps(sorted(([r.info.run_name, r.data.metrics, r.data.tags.get('remint.kind'), r.info.status,"
    " sorted(f.path for f in c.list_artifacts(r.info.run_id))] for r in c.search_runs([e])), key=json.dumps)))"
)


def runs(place):
    return json.loads(place.run("docker/run", "python", "-c", RUNS).splitlines()[-1])


def test_a_pipeline_is_there_and_survives_a_restart_and_a_restore(inside, tmp_path):
    logged = runs(inside)  # other tests log there, too
    assert {name.rsplit("-", 1)[0] for name, *_ in logged} == {"train", "eval_chat", "pipeline"}
    assert {kind for _, _, kind, _, _ in logged} == {"pipeline", "stage"}
    assert {status for *_, status, _ in logged} == {"FINISHED"}
    assert all("report.html" in paths for _, _, kind, _, paths in logged if kind == "pipeline")
    saved = tmp_path / "saved.tar"
    assert "saved: " in inside.stack("backup", str(saved))
    damaged = tmp_path / "damaged.tar"
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert "is damaged or is not a backup" in inside.stack("restore", str(damaged), status=1)
    assert "no backup to restore" in inside.stack("restore", str(tmp_path / "absent"), status=1)
    inside.stack("down")
    inside.stack("up")
    assert runs(inside) == logged
    inside.stack.wipe()
    assert "restored: " in inside.stack("restore", str(saved))
    assert runs(inside) == logged
    assert "already has this state" in inside.run("docker/run", "python", "-m", "remint", "sync")


def ask(port, path="/api/2.0/mlflow/experiments/search", body=None, **headers):
    connection = http.client.HTTPConnection(f"127.0.0.1:{port}", timeout=60)
    try:
        data = json.dumps({"max_results": 5} if body is None else body)
        connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_foreign_hosts_and_origins_are_refused_and_loopback_alone_is_bound(inside):
    port = inside.stack.port
    assert ask(port)[0] == 200
    assert ask(port, Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200
    for headers in ({"Host": "evil.example"}, {"Host": "192.168.1.1:5000"}, {"Origin": "http://evil.example"}):
        assert ask(port, **headers)[0] == 403, headers
    listing = docker("container", "ls", "--format", "{{.Ports}}", "--filter", f"name={inside.stack.name}")
    assert f"127.0.0.1:{port}->5000/tcp" in listing
    assert "0.0.0.0" not in listing


def test_what_dies_comes_up_again(inside):
    logged = runs(inside)
    (name,) = [
        name
        for name in docker("container", "ls", "--format", "{{.Names}}").split()
        if name.startswith(inside.stack.name) and "mlflow" in name
    ]
    # Killed from inside: an engine does not restart a container that it was asked to stop.
    docker("exec", name, "python", "-c", "import os; os.kill(1, 15)")
    deadline = time.monotonic() + 120
    while True:
        try:
            assert ask(inside.stack.port)[0] == 200
            break
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < deadline
            time.sleep(1)
    assert runs(inside) == logged


def test_a_password_if_one_wants_it_and_the_chat_server(inside):
    stack, logged = inside.stack, runs(inside)
    stack("up", AUTH="1", CHAT="1")
    assert ask(stack.port)[0] == 401
    secret = (inside.root / "docker/secrets/admin_password").read_text()
    login = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": secret}
    inside.variables |= login
    assert runs(inside) == logged
    for name in login:
        del inside.variables[name]
    question = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 4}
    status, said = ask(stack.chat_port, "/v1/chat/completions", question)
    assert status == 200
    assert json.loads(said)["choices"][0]["message"]["role"] == "assistant"
    assert ask(stack.chat_port, "/v1/chat/completions", question, Origin="http://evil.example")[0] == 403
    stack("up")
