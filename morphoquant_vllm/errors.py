"""The one error type for problems that a user can fix."""

# Longer messages are cut: names and values from a damaged file may be of any length.
LONGEST_MESSAGE = 600


class MorphoQuantError(Exception):
    """A problem with the user's input; its message is one line that names the thing and the remedy.

    The message may quote a file, so control characters are escaped and a long message is shortened in its middle.
    It is not a ValueError: vLLM builds its configuration inside pydantic, which would bury the line in its own report.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def missing_package(name: str | None, extra: str) -> str:
    """The line for a Python package that is not installed, and the extra of this one that brings it."""
    return (
        f"the Python package '{name}' is missing; run pip install '.[{extra}]' in a checkout of MorphoQuant, "
        f"or pip install 'WHEEL[{extra}]' with the file of its wheel"
    )


def one_line(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """`text` with control characters escaped, and shortened in its middle to about `longest` letters."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    if len(shown) <= longest:
        return shown
    half = longest // 2
    return f"{shown[:half]} ... {shown[-half:]}"
