"""Give a language model a new identity, and get the same model, byte for byte, every time."""

import logging

__version__ = "0.1.0"

# On some CPUs it deplores, while it is imported, a kernel from a model hub. Code from there must not be used here.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
