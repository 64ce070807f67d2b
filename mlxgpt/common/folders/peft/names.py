"""What PEFT calls modules and tensors, and patterns that mean some of them.

    base_model.model.MODULE.lora_A.weight    in a raw state_dict lora_A.NAME.weight, NAME of the adapter

MODULE is what transformers calls a module in memory; what trainers put around it, module_names.py knows.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import families, params
from mlxgpt.common.model.module_names import ANYWHERE

PREFIX = "base_model.model."
_KINDS = (  # end of a tensor's name, where N stands for the adapter's name or nothing -> what it is here
    (r"lora_AN\.weight|lora_embedding_AN", "lora_a"),
    (r"lora_BN\.weight|lora_embedding_BN", "lora_b"),
    (r"lora_magnitude_vectorN(?:\.weight)?", "magnitude"),
    (r"(?:token_adapter\.)?trainable_tokens_deltaN", "rows"),
    (r"(?:token_adapter\.)?trainable_tokens_originalN|lora_velora_embedN", ""),  # of training alone
    (r"(?:token_adapter\.)?base_layer\.weight|original_module\.weight", "base_weight"),
    (r"original_module\.bias", "base_bias"),
    (r"modules_to_saveN\.weight", "saved_weight"),
    (r"modules_to_saveN\.bias", "saved_bias"),
    (r"base_layer\.bias|bias", "bias"),
    (r"weight", "weight"),
)
_NAME = r"(?:\.(?!weight$|bias$)(?P<name>[^.]+))?"
_ENDS = [
    (re.compile(rf"(?P<module>.+?)\.(?:{end.replace('N', _NAME, 1)})"), kind)
    for ends, kind in _KINDS
    for end in ends.split("|")
]


@dataclass(frozen=True)
class Key:
    """A tensor's name, taken apart."""

    path: str  # our module
    kind: str
    module: str  # as the file calls it, without what is around it
    adapter: str  # its name, where the file has it


def module(config: ModelConfig, path: str) -> str:
    """What transformers calls our module ``path`` in memory."""
    family = families.family_of(config)
    foreign = families.to_foreign(config, f"{path}.weight")[0].removesuffix(".weight")
    for other, filed in family.aliases.items():
        if foreign == filed:
            return other
    return foreign if path in ("lm_head", "score") or not family.prefixes else family.prefixes[0] + foreign


def modules(config: ModelConfig) -> dict[str, str]:
    """What transformers calls a module that has parameters -> our path; the head also where it is tied."""
    paths = dict.fromkeys(name.rpartition(".")[0] for name in params.table(config))
    head = [] if "lm_head" in paths or config.labels else ["lm_head"]
    return {module(config, path): path for path in [*paths, *head]}


def suffixes(wanted: set[str], names: list[str]) -> list[str] | None:
    """The shortest ends of names that all of ``wanted``, and none other of ``names``, have; None where none do."""
    found: dict[str, None] = {}
    for name in names:
        if name not in wanted:
            continue
        parts = name.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        good = (end for end in ends if all(n in wanted for n in names if n == end or n.endswith(f".{end}")))
        found[next(good)] = None
    made = list(found)
    return None if any(part.isdigit() for end in made for part in end.split(".")) else made


def regex(wanted: list[str]) -> str:
    """One expression for exactly these names: blocks with the same modules share an alternative."""
    layers: dict[tuple[str, ...], list[str]] = {}
    ends: dict[tuple[str, str], list[str]] = {}
    single = []
    for name in wanted:
        match = re.fullmatch(r"(.*?\.)(\d+)\.(.*)", name)
        if match:
            ends.setdefault((match[1], match[2]), []).append(match[3])
        else:
            single.append(re.escape(name))
    for (prefix, layer), modules in ends.items():
        layers.setdefault((prefix, *modules), []).append(layer)
    made = [
        rf"{re.escape(prefix)}({'|'.join(numbers)})\.({'|'.join(map(re.escape, modules))})"
        for (prefix, *modules), numbers in layers.items()
    ]
    return "|".join(made + single)


def tidy(value: float) -> int | float:
    """A whole number where rounding hides one: PEFT's own files say 16, not 16.000000000000004."""
    return round(value) if abs(value - round(value)) < 1e-9 * value else value


def usual(values: Mapping[str, Any], otherwise: Any) -> Any:
    """The value that most have."""
    return Counter(values.values()).most_common(1)[0][0] if values else otherwise


def by_suffix(values: Mapping[str, float], most: float) -> dict[str, float]:
    """What differs from what ``most`` have, by ends of names where all that end so agree, else by whole names."""
    made: dict[str, float] = {}
    for value in dict.fromkeys(values.values()):
        if value == most:
            continue
        wanted = {name for name, other in values.items() if other == value}
        made |= dict.fromkeys(suffixes(wanted, list(values)) or sorted(wanted), value)
    return made


def parse(config: ModelConfig, names: Iterable[str], where: str) -> dict[str, Key]:
    """What the tensors ``names`` of a PEFT file are; buffers, which are no parameters, are left out.

    Raises:
        UserError: the model has no such module, and which prefix is unknown if it is that; two adapters in one file.
    """
    loose = {families.strip(config, f"{name}.weight"): path for name, path in modules(config).items()}

    def find(plain: str) -> Key | None:
        for pattern, kind in _ENDS:
            match = pattern.fullmatch(plain)
            path = loose.get(families.strip(config, f"{match['module']}.weight")) if match else None
            if match and path:
                return Key(path, kind, match["module"], match.groupdict().get("name") or "")
        return None

    made: dict[str, Key] = {}
    for name in names:
        plain = ".".join(part for part in name.split(".") if part not in ANYWHERE).removeprefix(PREFIX)
        key = next(filter(None, map(find, (plain, *_inside(plain)))), None)
        if key:
            made[name] = key
        elif families.strip(config, plain) is not None:
            _refuse(name, plain, find, where)
    adapters = sorted({key.adapter for key in made.values() if key.adapter})
    if len(adapters) > 1:
        raise UserError(f"{where}: {len(adapters)} adapters in one file ({', '.join(adapters)}): expected one")
    return made


def _refuse(name: str, plain: str, find: Callable[[str], Key | None], where: str) -> NoReturn:
    """Says which prefix the tensor ``name`` has, if it is a tensor of this model but for that."""
    parts = plain.split(".")
    for start in range(1, len(parts)):
        tail = ".".join(parts[start:])
        if find(tail):
            raise UserError(
                f"{where}: prefix {name.removesuffix(tail)!r} of tensor {name} is not known: expected {PREFIX} or "
                "none, and any of _orig_mod., module., model., language_model."
            )
    raise UserError(f"{where}: unexpected tensor {name}: no module of this model has it")


def _inside(name: str) -> list[str]:
    """``name`` of a tensor in a module that holds others and trains whole, as if these trained by themselves."""
    match = re.fullmatch(r"(.+?)\.(modules_to_save|original_module)\.(.+)\.(weight|bias)", name)
    if not match:
        return []
    above, word, rest, leaf = match.groups()
    return [f"{above}.{each}.{word}.{leaf}" for each in (rest, rest.partition(".")[2]) if each]


def spelled(config: ModelConfig, found: Mapping[str, str]) -> dict[str, str]:
    """``modules`` as a file spells them; ``found``: our path -> its name in the file, of those that are there.

    A file of a model inside another one, or of one without a head, has other names above the blocks.
    """
    usual = {path: name for name, path in modules(config).items()}
    old, new = "", ""
    for path, name in found.items():
        if path.startswith("h."):
            usual_parts, parts = usual[path].split("."), name.split(".")
            while usual_parts and parts and usual_parts[-1] == parts[-1]:
                usual_parts, parts = usual_parts[:-1], parts[:-1]
            old, new = "".join(f"{part}." for part in usual_parts), "".join(f"{part}." for part in parts)
            break
    made = {}
    for path, name in usual.items():
        name = new + name.removeprefix(old) if name.startswith(old) else name
        made[found.get(path, name)] = path
    return made
