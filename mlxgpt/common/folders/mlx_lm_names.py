"""What mlx-lm's modules call the tensors of a family, where that is not what the family's files do."""

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import families


def names(config: ModelConfig) -> dict[str, str]:
    """What mlx-lm's modules call a tensor -> ours; all matrices are [out, in] there. Zero biases are among them."""
    return {name_of(config.family, foreign): ours for foreign, (ours, _) in families.from_foreign(config).items()}


def name_of(family: str, foreign: str) -> str:
    """The module tensor's name, from the one in the family's files."""
    for start, other in families.FAMILIES[family].mlx_lm.names:
        if foreign.startswith(start) and not foreign.startswith(other):
            return other + foreign.removeprefix(start)
    return foreign
