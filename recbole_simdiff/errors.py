"""The one exception that stands for a mistake the user can mend."""


class UserError(ValueError):
    """A wrong key, value, file or checkpoint.

    The message says what was received, what is allowed and where to change it. The command line
    prints it without a traceback and exits with code 2.
    """
