"""One folder a stage of dvc.yaml; its `run.py` holds the stage, its siblings hold what can be tested without disk."""
