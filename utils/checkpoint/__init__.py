"""A run to resume: checkpoints, their retention, and resuming in the same or another layout."""
