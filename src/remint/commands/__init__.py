"""What a person types, one file a command. No stage imports it, so a change reruns nothing."""

# Every command with its line in `remint --help`; its module has the name, with _ for -, and a function `main`.
COMMANDS = {
    "chat": "talk to the merged model",
    "serve": "answer by HTTP with the merged model",
    "ui": "show the runs in MLflow's pages",
    "export": "write the merged model in the layout of its base (internlm2)",
    "import-adapter": "turn an adapter that XTuner trained for InternLM2 into one for the base",
    "check": "read all settings and say what is wrong with them",
    "sync": "log the pipeline's present state to MLflow as one run",
    "summary": "say what was built, how well, and what to type next",
    "verify": "recompute the checksums of every artefact, check provenance and signature",
    "sign": "sign the merged model with an SSH key",
    "reproduce": "rebuild the last commit elsewhere and compare every byte",
    "recipes": "list the ready-made params.yaml files",
    "recipe": "put one of them in place",
}
