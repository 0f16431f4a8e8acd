"""The parts of the fine-tuning program, one folder for each stage of a run."""
