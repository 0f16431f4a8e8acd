"""The command line of main.py: parser, checks of values, checks before a run."""
