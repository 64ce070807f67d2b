"""What ends a generated text: the eos_token_id of a folder's generation_config.json, and tokens that users name."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.protocol import Tokenizer, read_json

FILE = "generation_config.json"


def generation_ends(folder: Path) -> list[int]:
    """The eos_token_id of generation_config.json, else of config.json: none, one or several.

    Raises:
        UserError: the file is not a JSON object, or says anything but ids.
    """
    for name in (FILE, "config.json"):
        path = folder / name
        said = read_json({name: path.read_bytes()}, name, folder).get("eos_token_id") if path.is_file() else None
        if said is not None:
            return as_list(said, path)
    return []


def as_list(said: object, where: Path) -> list[int]:
    """The ids of an eos_token_id: none, one or several.

    Raises:
        UserError: it is anything else.
    """
    found = said if isinstance(said, list) else [] if said is None else [said]
    ids = [i for i in found if type(i) is int]
    if len(ids) < len(found):
        raise UserError(f"{where}: eos_token_id {said!r}: expected a token id or a list of them")
    return ids


def union(*groups: Iterable[int | None]) -> list[int]:
    """All ids, each once, in the order in which they come first; None is left out."""
    return list(dict.fromkeys(end for group in groups for end in group if end is not None))


def as_value(ids: Sequence[int]) -> int | list[int] | None:
    """The ids as eos_token_id has them: a list where there are several."""
    return list(ids) if len(ids) > 1 else ids[0] if ids else None


def named(tokens: Sequence[str], tokenizer: Tokenizer, where: str) -> list[int]:
    """The ids of tokens that a user names: a token's text, as ``<|eot_id|>``, or its id.

    Raises:
        UserError: a text that is not one token, or an id that the tokenizer does not have.
    """
    made = []
    for token in tokens:
        if token.isdecimal():
            if int(token) >= tokenizer.n_vocab:
                raise UserError(f"{where} {token}: expected an id below {tokenizer.n_vocab}, the tokenizer's size")
            made.append(int(token))
            continue
        found = tokenizer.id_of(token)
        ids = [found] if found is not None else tokenizer.encode(token)
        if len(ids) != 1:
            raise UserError(
                f"{where} {token!r}: {len(ids)} tokens of this tokenizer: expected the text of one, or its id"
            )
        made.append(ids[0])
    return made
