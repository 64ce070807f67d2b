"""Read by Python as it starts where this folder is in PYTHONPATH."""

from doubles import children

children.begin()
