"""minbpe's .model: the expression that splits a text, special tokens, and the pairs that are merged, in order."""

from pathlib import Path

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.foreign import ranks
from mlxgpt.common.tokenizers.foreign.tables import shown
from mlxgpt.common.tokenizers.hf import JsonTokenizer

FIRST = b"minbpe v1"
_MOST = 1 << 20


def read(path: Path) -> JsonTokenizer:
    """What BasicTokenizer.save or RegexTokenizer.save wrote.

    Raises:
        UserError: damaged, or two merges that make the same bytes, which no tokenizer.json holds.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
        if lines[0].rstrip("\r") != FIRST.decode():
            raise UserError(f"{path}: begins with {shown(lines[0][:40])}: expected {FIRST.decode()}")
        pattern, count = lines[1].strip("\r\n"), int(lines[2])
        marks = [line.rsplit(" ", 1) for line in lines[3 : 3 + count]]
        special = {text: int(i) for text, i in marks}
        pairs = [tuple(map(int, line.split())) for line in lines[3 + count :] if line.strip()]
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: not a .model of minbpe: {' '.join(str(error).split())}") from None
    if len(pairs) > _MOST or len(special) < count:
        raise UserError(f"{path}: {len(pairs)} merges, {len(special)} of {count} special tokens: truncated?")
    texts = {i: bytes([i]) for i in range(256)}
    merges = []
    for new, pair in enumerate(pairs, 256):
        if len(pair) != 2 or not all(part in texts for part in pair):
            raise UserError(f"{path}: merge {new - 256} is {shown(pair)}: expected two ids from 0 to {new - 1}")
        merges.append((ranks.written(texts[pair[0]]), ranks.written(texts[pair[1]])))
        texts[new] = texts[pair[0]] + texts[pair[1]]
        if len(texts[new]) > 1 << 16:
            raise UserError(f"{path}: token {new} has {len(texts[new])} bytes")
    vocabulary: dict[str, int] = {}
    for i, token in texts.items():
        other = vocabulary.setdefault(ranks.written(token), i)
        if other != i:
            raise UserError(f"{path}: tokens {other} and {i} are both {shown(token)}, which no tokenizer.json holds")
    if any(i in texts or not 0 <= i < _MOST for i in special.values()) or len(set(special.values())) < len(special):
        raise UserError(f"{path}: special tokens {shown(special)}: expected ids that no other token has, below {_MOST}")
    result = ranks.backend_of(vocabulary, merges, pattern, special, str(path))
    result.notes = [*result.notes, f"{path.name}: minbpe's, {len(pairs)} merges, {len(special)} special tokens"]
    return result
