"""The random OPT that the ways of training are timed on."""

from argparse import Namespace

import torch
from transformers import OPTConfig, OPTForCausalLM


def make_model(args: Namespace) -> OPTForCausalLM:
    """Make an OPT of `args.layers` blocks and width `args.hidden`, random weights from a fixed seed."""
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=args.hidden, word_embed_proj_dim=args.hidden, ffn_dim=4 * args.hidden, vocab_size=50272,
        num_hidden_layers=args.layers, num_attention_heads=max(args.hidden // 64, 1), max_position_embeddings=2048,
        dropout=0.1,
    )  # fmt: skip
    return OPTForCausalLM(config)
