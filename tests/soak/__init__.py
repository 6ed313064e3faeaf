"""A day of use compressed into minutes: `python -m tests.soak` (`make soak`). pytest runs it at a small scale."""
