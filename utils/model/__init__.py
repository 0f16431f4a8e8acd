"""Whole models: loading and building them, their tokenizer, the check of the batch layout."""
