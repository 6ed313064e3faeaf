"""What every stage imports; nothing here imports torch. A change reruns every stage."""
