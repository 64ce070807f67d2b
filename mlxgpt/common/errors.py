"""The errors a user may see. The command line prints each as one line; anything else is a bug."""

from collections.abc import Iterable


class UserError(Exception):
    """Wrong usage or input: exit code 2. The message names what, where, what was found and what was expected."""


class TensorError(UserError):
    """A sound file whose tensors are not those of its config: ``name``, as the file has it, is the first such."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


class RunError(Exception):
    """A check failed or a run broke after it had started: exit code 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the likeliest intended name, or nothing."""
    import difflib  # not at every start of the command line

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
