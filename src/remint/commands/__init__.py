"""The user's commands, one file each. No stage imports it, so a change reruns nothing."""

# Every command with its line in `remint --help`. Its module has the same name, with _ for -, and a function `main`.
COMMANDS = {
    "chat": "talk to the merged model",
    "measure": "ask base and merged model prompts of your own: shares with intervals",
    "serve": "serve the merged model over HTTP",
    "ui": "show the runs in MLflow's web UI",
    "answers": "keep the base's own answers, which training asked for, in a file to commit",
    "export": "write the merged model in the layout of its base (internlm2)",
    "import-adapter": "turn an adapter that XTuner trained for InternLM2 into one for the base",
    "check": "check all settings and report every mistake",
    "sync": "log the pipeline's present state to MLflow as one run",
    "summary": "print what was built, how well it works, and what to type next",
    "verify": "recompute the checksums of every artefact, check provenance and signature",
    "sign": "sign the merged model with an SSH key",
    "reproduce": "rebuild the last commit elsewhere and compare every byte",
    "recipes": "list the ready-made params.yaml files",
    "recipe": "replace params.yaml by one of them",
}
