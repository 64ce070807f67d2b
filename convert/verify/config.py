"""The rung config: fields of ModelConfig that differ and matter, token ids, and how text is generated."""

import dataclasses
from typing import Any

from convert.formats.opened import Opened, companion_json
from convert.verify.report import Checked, Report
from mlxgpt.common.config import ModelConfig

# formats that have a place for token ids and tokenizer: there, one that is missing was lost
CARRY = ("hf", "mlx-lm", "gguf")
_UNREAD = ("_from_model_config", "transformers_version")  # of generation_config.json
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROPE = ("rope_theta", "rope_local_theta", "rope_scaling", "rope_factor", "rope_low", "rope_high", "rope_original",
         "rope_beta_fast", "rope_beta_slow", "rope_truncate", "rope_attention", "rope_short", "rope_long", "rotary_dim",
         "no_rope")  # fmt: skip
_CLOSE = 2.0**-23  # a number that passed through float32


def compare(a: Opened, b: Opened, report: Report) -> None:
    """A finding for each field that differs, in our names; what means the same is no difference."""
    one, other = meaning(a.config), meaning(b.config)
    fields = [name for name in one if not _equal(one[name], other[name])]
    for name in fields:
        report.find("config", name, f"{one[name]!r} | {other[name]!r}")
    if a.config.family != b.config.family:
        families = f"{a.config.family} | {b.config.family}"
        if fields or set(a.tensors) != set(b.tensors):
            report.find("config", "family", families)
        else:
            report.notes.append(f"family {families}: another name, the same model")
    _compare_ids(a, b, report)
    report.checked.append(Checked("config", f"{len(one)} fields of the model"))


def meaning(config: ModelConfig) -> dict[str, Any]:
    """The fields without the family's name, and with what nobody reads or what follows from another set alike."""
    values = dataclasses.asdict(config)
    del values["family"]
    values["attn_scale"] = config.attn_scale or config.head_dim**-0.5
    if config.position != "rope":
        for name in _ROPE:
            if name != "rope_theta" or config.position != "sinusoidal":
                values.pop(name)
    elif not config.window:
        values.pop("rope_local_theta")
    else:
        values["rope_local_theta"] = config.rope_local_theta or config.rope_theta
    if config.norm != "layer":
        values.pop("norm_bias")
    return {name: values.get(name) for name in dataclasses.asdict(config) if name != "family"}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= _CLOSE * max(abs(a), abs(b))
    return a == b and (a is None) == (b is None)


def _compare_ids(a: Opened, b: Opened, report: Report) -> None:
    """Token ids, and what generation_config.json says beside them; what only one side says is a note.

    Only an end of text that is lost on the way, where the format has a place for it, is a difference: generation would
    not stop any more.
    """
    one, other = _generation(a), _generation(b)
    for name in dict.fromkeys([*_IDS, *one, *other]):
        x, y = one.get(name), other.get(name)
        if x == y:
            continue
        said = f"{_spelled(x)} | {_spelled(y)}"
        silent = a if x is None else b if y is None else None
        if silent is None or (name == "eos_token_id" and silent.format in CARRY):
            report.find("config", name, said)
        else:
            report.notes.append(f"{name} {said}: one side does not say it")


def _generation(opened: Opened) -> dict[str, Any]:
    """How text is generated: the token ids of generation_config.json, else of config.json, and the former's settings.

    One id and a list of one are the same, in any order.
    """
    said = {name: opened.extra[name] for name in _IDS if opened.extra.get(name) is not None}
    settings = companion_json(opened, "generation_config.json")
    said |= {name: value for name, value in settings.items() if value is not None and name not in _UNREAD}
    ids = {name: value if isinstance(value, list) else [value] for name, value in said.items() if name in _IDS}
    return said | {name: sorted(values, key=repr) for name, values in ids.items()}


def _spelled(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value
