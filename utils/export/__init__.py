"""A model for others: the Hugging Face folder, its verification, its card, the PEFT adapter."""
