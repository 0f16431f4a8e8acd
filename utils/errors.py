"""`UserError`: a mistake that the user can correct."""

EXIT_USER_ERROR = 2  # the exit status of a program that a UserError ends


class UserError(Exception):
    """A bad argument, file or record: the message says what is wrong, where, and what to do.

    Entry points print it without a traceback and exit with status 2.
    """


class MissingDataSet(UserError, RuntimeError):
    """There is no such data set: also the RuntimeError that scripts for DeepSpeed-Chat expect."""


def join_problems(problems: list[str]) -> str:
    """Return one message: the problem itself, or a list of several."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)


def root_cause(err: BaseException) -> str | None:
    """Return the words of the library's error that led to this one; None where none did."""
    first = err
    while first.__cause__ is not None:
        first = first.__cause__
    return None if first is err else str(first)
