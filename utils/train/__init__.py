"""The training run: its state and plan, the micro step, progress, evaluation, stopping, run.json."""
