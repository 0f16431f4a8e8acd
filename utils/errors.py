"""The one exception for mistakes a user can mend."""


class UserError(Exception):
    """A bad argument, file or record: the message says what is wrong, where, and what to do.

    Entry points print it without a traceback and exit with status 2.
    """


def join_problems(problems: list[str]) -> str:
    """One message for one problem, a list for several."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)
