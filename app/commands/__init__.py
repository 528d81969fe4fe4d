"""The subcommands of ``accordion``, a module each for those of a kind."""


class CommandError(Exception):
    """What was asked for can't be done; the message is for the user."""
