"""The one error type for what a user can mend."""


class MorphoQuantError(Exception):
    """A problem with the user's input; its message is one line that names the thing and the remedy.

    Not a ValueError: pydantic, inside which vLLM builds its configuration, would bury the line in a report of its own.
    """
