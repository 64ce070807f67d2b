"""Read by Python as it starts where this folder is in PYTHONPATH."""

import doubles.children  # noqa: F401
