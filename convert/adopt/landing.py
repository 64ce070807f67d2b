"""What an adopted model is written as: the first published architecture that says it exactly, else our own.

``families.check`` decides, and config.json read back. The order is that of how many programs load an architecture, and
of how little it has beside what the model needs.
"""

import dataclasses
from dataclasses import dataclass

from convert.adopt.proof.candidate import plain
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import families
from mlxgpt.common.model.family.own_config import FAMILY as OWN

ORDER = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "stablelm", "phi", "olmo2", "olmo", "starcoder2",
         "smollm3", "phi3", "granite", "gemma", "gemma2", "gemma3_text", "gpt_neo")  # fmt: skip
_LAYOUT = ("fused_qkv", "fused_mlp", "qkv_by_head")


@dataclass(frozen=True)
class Landing:
    """``config`` of the architecture that is written, and ``why``: its class, or what keeps the published ones out."""

    config: ModelConfig
    why: str

    @property
    def published(self) -> bool:
        """Whether transformers has it."""
        return self.config.family != OWN


def land(config: ModelConfig) -> Landing:
    """What a model whose matrices are not fused is written as."""
    config = plain(config)
    names = [*ORDER, *(name for name in families.FAMILIES if name not in (*ORDER, OWN))]
    tried = {name: _as(config, name) for name in names}
    able = [each for each in tried.values() if isinstance(each, ModelConfig)]
    able.sort(key=lambda each: families.on_disk(each) != each)  # those whose files need no biases that are zeros first
    if able:
        return Landing(able[0], f"{families.FAMILIES[able[0].family].architecture}, which transformers has")
    refused = {name: each for name, each in tried.items() if not isinstance(each, ModelConfig)}
    nearest = min(refused, key=lambda name: refused[name][0])
    return own(config, f"no published architecture has all of it; nearest is {nearest}: {refused[nearest][1]}")


def own(config: ModelConfig, why: str) -> Landing:
    """The model as family mlxgpt, which says any."""
    return Landing(dataclasses.replace(config, family=OWN), why)


def _as(config: ModelConfig, name: str) -> ModelConfig | tuple[int, str]:
    """The model as an architecture, or in how many fields they differ, and what to say of it."""
    family = families.FAMILIES[name]
    layout = {field: family.fixed.get(field, False) for field in _LAYOUT}
    if family.rope and family.rope.local and not config.rope_local_theta:
        layout["rope_local_theta"] = config.rope_theta
    others = {
        field: value
        for field, value in family.fixed.items()
        if field not in layout and getattr(config, field) != value and not (field == "rotary_dim" and not value)
    }
    said = ", ".join(
        f"{field} is {value!r} there and {getattr(config, field)!r} here" for field, value in others.items()
    )
    try:
        made = dataclasses.replace(config, family=name, **layout)
        families.check(made)
        if plain(families.config_from_hf(families.config_to_hf(made))) != plain(made):
            raise UserError(f"model: family {name} cannot say all of it")
    except UserError as error:
        return len(others) or 1, said or str(error).removeprefix("model.")
    return made
