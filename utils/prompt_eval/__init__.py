"""The parts of prompt_eval.py: two models compared by their answers."""
