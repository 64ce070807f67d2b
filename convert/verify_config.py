"""The rung config: fields of ModelConfig that differ and matter, and the token ids beside them."""

import dataclasses
from typing import Any

from convert.model import Opened
from convert.verify_report import Checked, Report
from mlxgpt.common.config import ModelConfig

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROPE = ("rope_theta", "rope_local_theta", "rope_scaling", "rope_factor", "rope_low", "rope_high", "rope_original",
         "rotary_dim", "no_rope")  # fmt: skip
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
    if config.position == "learned":
        for name in _ROPE:
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
    """Token ids where both sides say them; one that only one side says is a note."""
    for name in _IDS:
        found = [opened.extra.get(name) for opened in (a, b)]
        if found[0] == found[1]:
            continue
        if None in found:
            report.notes.append(f"{name} {found[0]} | {found[1]}: one side does not say it")
        else:
            report.find("config", name, f"{found[0]} | {found[1]}")
