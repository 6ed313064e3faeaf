"""The merged model for MLflow ("models from code"): a reference by path, verified before use."""

from pathlib import Path
from typing import Any

import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from remint.compute.generation import answer_all
from remint.core import manifest
from remint.core.errors import ArtefactError
from remint.model import loading, template


class Served(PythonModel):
    """Answers questions with the merged model at the recorded path."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model. Raises ArtefactError if the files at the path are not the registered ones."""
        folder, recorded = Path(context.model_config["path"]), context.model_config["manifest_sha256"]
        manifest.verify(folder, "model")
        if manifest.file_digest(folder / manifest.NAME) != recorded:
            raise ArtefactError(f"{folder}: is not the registered model; run `dvc checkout` at its commit")
        self.tokenizer = loading.load_tokenizer(folder)
        self.conversation = template.load(folder)
        self.model = loading.load_model(folder, torch.float32, loading.device())

    def predict(self, model_input: list[str], params: dict[str, Any] | None = None) -> list[str]:
        """One answer per question, by greedy decoding."""
        limit = int((params or {}).get("max_new_tokens", 256))
        histories = [[{"role": "user", "content": question}] for question in model_input]
        return answer_all(self.model, self.tokenizer, self.conversation, histories, limit, batch=8)


set_model(Served())
