"""The one exception for mistakes a user can mend."""


class UserError(Exception):
    """A bad argument, file or record: the message says what is wrong, where, and what to do.

    Entry points print it without a traceback and exit with status 2.
    """
