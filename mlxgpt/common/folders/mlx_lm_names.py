"""What mlx-lm's modules call the tensors of a family, where that is not what the family's files do."""

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import families


def names(config: ModelConfig) -> dict[str, str]:
    """What mlx-lm's modules call a tensor -> ours; all matrices are [out, in] there. Zero biases are among them."""
    return {of(config.family, foreign): ours for foreign, (ours, _) in families.from_foreign(config).items()}


def of(family: str, foreign: str) -> str:
    """The module tensor's name, from the one in the family's files."""
    if family == "gpt_neox":
        foreign = foreign.replace("gpt_neox.layers.", "model.h.").replace("gpt_neox.", "model.")
    return foreign if family not in ("gpt2", "gpt_neox") or foreign.startswith("model.") else f"model.{foreign}"
