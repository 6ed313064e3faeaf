"""What computes: determinism, packing, loss, kernels, generation. A change reruns train and what follows it."""
