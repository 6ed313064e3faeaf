"""`remint sync`: log the pipeline's present state to MLflow."""

from remint.runner import tracking


def main() -> None:
    """Log the pipeline's present state to MLflow as one run, once."""
    tracking.sync()
