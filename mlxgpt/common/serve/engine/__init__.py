"""The engine of mlxgpt serve: a thread that reads prompts and draws the next tokens of all rows together."""

from mlxgpt.common.serve.engine.thread import Engine

__all__ = ["Engine"]
