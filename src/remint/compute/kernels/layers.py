"""The linear layers of a Llama-like decoder layer, by the names that transformers gives them."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION + MLP
# The highest rank of LoRA that `blocks` takes: of a higher one, what a program needs of it would not fit the shared memory that
# most GPUs have (99 KiB).
MOST_RANK = 256
