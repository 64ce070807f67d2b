"""Arguments that a template writes one by one, in XML or as a function's: learned from what differs."""

from mlxgpt.common.serve.tools.shape import Shape


def learn(one: str, two: str) -> Shape | None:
    """Their shape; None where the form is not known."""
    return None
