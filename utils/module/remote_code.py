"""Whether a model's own Python code may run: `--trust_remote_code`, off until it is given, and never a question.

A checkpoint whose configuration has an `auto_map` brings code that transformers runs while it loads configuration,
tokenizer and model. All three, and the check of the saved copy, ask here.
"""


class _RemoteCode:
    """The one owner of the decision, which belongs to the process: it is made once, from the command line."""

    trusted = False


def trust_remote_code(trusted: bool) -> None:
    """Set whether code that comes with a model may run."""
    _RemoteCode.trusted = trusted


def is_trusted() -> bool:
    """Return whether code that comes with a model may run; False until `trust_remote_code` says otherwise."""
    return _RemoteCode.trusted
