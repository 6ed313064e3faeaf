"""Code that every stage uses. Nothing here imports torch. A change here makes DVC rerun every stage."""
