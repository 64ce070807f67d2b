"""generation_config.json of an opened model: the tokens that end a generated text."""

from collections.abc import Sequence

from convert.formats.opened import Opened, companion_json
from mlxgpt.common.files import json_bytes
from mlxgpt.common.tokenizers import ends


def ends_of(opened: Opened) -> list[int]:
    """The eos_token_id of generation_config.json, else of config.json: none, one or several.

    Raises:
        UserError: it says anything but ids.
    """
    said = companion_json(opened, ends.FILE).get("eos_token_id")
    said = opened.extra.get("eos_token_id") if said is None else said
    return ends.as_list(said, opened.path)


def set_ends(opened: Opened, ids: Sequence[int]) -> None:
    """Puts ``ids`` into generation_config.json, which is made where there is none."""
    values = companion_json(opened, ends.FILE)
    if not values:
        keys = ("bos_token_id", "pad_token_id")
        values = {key: opened.extra[key] for key in keys if opened.extra.get(key) is not None}
    opened.companions[ends.FILE] = json_bytes(values | {"eos_token_id": ends.as_value(ids)})
