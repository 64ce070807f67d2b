"""THE table of architectures, put together: model_type of config.json -> its row.

Read from transformers' configuration_*.py and modeling_*.py, llama.cpp's conversion/*.py and src/models/*.cpp, and
mlx-lm's models/*.py; ``own`` is this project's. What is not here is refused. A new family is a row in one of the
modules of this package.
"""

from mlxgpt.common.model.family import gemma, layernorm, llama, own
from mlxgpt.common.model.family.row import Family

FAMILIES: dict[str, Family] = {**llama.ROWS, **gemma.ROWS, **layernorm.ROWS, **own.ROWS}
