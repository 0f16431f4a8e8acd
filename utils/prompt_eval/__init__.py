"""The parts of prompt_eval.py, which compares two models by their answers."""
