"""Give a language model a new identity, and get the same model, byte for byte, every time."""

__version__ = "0.1.0"
