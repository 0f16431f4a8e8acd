"""The numbers of NF4 with double quantization (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""

BLOCK, OUTER_BLOCK = 64, 256  # weights of a block, and blocks of an outer one
# 4 for the number, 8 for each block's largest, 32 for each outer block's: 4.127 (section 3 of the paper).
BITS = 4 + 8 / BLOCK + 32 / (BLOCK * OUTER_BLOCK)
