"""The linear layers of a Llama-like decoder layer, by the names that transformers gives them."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION + MLP
# The highest LoRA rank that `blocks` supports. With a higher one, the tiles of a Triton program would not fit into the
# shared memory of most GPUs (99 KiB).
MOST_RANK = 256
