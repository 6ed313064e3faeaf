"""Numerics: determinism, packing, loss, kernels, generation. A change here reruns `train` and the stages after it."""
