"""One folder per stage of dvc.yaml. `run.py` holds the stage; the modules next to it can be tested on their own."""
