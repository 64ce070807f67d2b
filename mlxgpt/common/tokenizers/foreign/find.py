"""Where a table of tokens lies among plain values: the settings of a checkpoint, a meta.pkl, a .json file."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.foreign import tables
from mlxgpt.common.tokenizers.foreign.tables import Table

_DEEPEST = 6
_TEXT = "(s|str|string|c|ch|char|chars|character|t|tok|token|tokens|w|word|words|vocab|letter|symbol)"
_ID = "(i|id|ids|ix|idx|idxs|index|indices|int|integer|num|n)"
_PAIRED = re.compile(f"({_TEXT}to{_ID}|{_ID}to{_TEXT})(map|dict|table)?")
_DICTS = ("vocab", "vocabulary", "encoder", "decoder", "encode", "decode", "tokenizer", "meta", "mapping")
_LISTS = (
    "chars", "char", "characters", "vocab", "vocabulary", "alphabet", "charset", "charlist", "tokens", "letters",
    "symbols", "itos", "idtotoken", "words",
)  # fmt: skip


def table(values: Any, where: str, rows: int | None = None) -> Table | None:
    """The table of tokens among nested plain values; None where there is none.

    Under a name such as stoi, idx2char or vocab, or without one where it is that of exactly ``rows`` characters. Dicts
    go before lists, which may leave out a mark or a shift of ids.

    Raises:
        UserError: two tables that disagree, or one that contradicts itself.
    """
    found = list(_found(values, where, rows))
    if not found:
        return None
    first = max((one for rank, one in found if rank == min(rank for rank, _ in found)), key=lambda one: len(one.texts))
    for rank, other in found:
        if rank > 0 or other is first:
            continue
        for i, text in other.texts.items():
            if first.texts.get(i, text) != text:
                raise UserError(
                    f"{other.where}: id {i} is {tables.shown(text)}, but {tables.shown(first.texts[i])} in "
                    f"{first.where}: expected tables that agree; --tokenizer FILE says which"
                )
    return first


def _found(
    value: Any, where: str, rows: int | None, key: str = "", depth: int = 0, split: str | None = None
) -> Iterator[tuple[int, Table]]:
    """(rank, table) of everything that is one: 0 for a dict that says each id, 1 for a list, 2 for one without name."""
    bare = re.sub(r"[^a-z]", "", key.lower().replace("2", "to"))
    mapped = isinstance(value, Mapping)
    rank = 0 if mapped else 1
    named = _PAIRED.fullmatch(bare) or (bare in _DICTS and _is_dense(value) if mapped else bare in _LISTS)
    if not named and _is_alphabet(value, rows):
        named, rank = True, 2
    made = tables.of_value(value, where, split) if named else None
    if made:
        yield rank, made
    elif mapped and depth < _DEEPEST:
        said = value.get("split")
        split = said if isinstance(said, str) else split
        for name, inner in value.items():
            if isinstance(name, str) and isinstance(inner, str | list | tuple | Mapping):
                yield from _found(inner, f"{where}{'.' if depth else ': '}{name}", rows, name, depth + 1, split)


def _is_dense(value: Mapping) -> bool:
    """Whether numbers in a dict are ids and not settings: they fill more than half of their range."""
    ids = [i for i in value.values() if type(i) is int] or [i for i in value if str(i).isdigit() and len(str(i)) < 10]
    return len(ids) > 1 and len(ids) == len(value) and 2 * len(ids) > max(map(int, ids))


def _is_alphabet(value: Any, rows: int | None) -> bool:
    """Whether a value without a known name is a table of all of a model's characters."""
    if rows is None or rows < 2 or not isinstance(value, str | list | tuple | Mapping) or len(value) != rows:
        return False
    if not isinstance(value, Mapping):
        return all(isinstance(c, str) and len(c) == 1 for c in value) and len(set(value)) == rows
    for texts, ids in ((value.keys(), value.values()), (value.values(), value.keys())):
        if all(isinstance(c, str) and (len(c) == 1 or tables.is_special(c)) for c in texts):
            return all(type(i) is int for i in ids) and set(ids) == set(range(rows))
    return False
