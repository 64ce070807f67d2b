"""tiktoken's encodings, by name or as ranks in a file, as the tokenizer.json that has the same ids for every text.

tiktoken joins the neighbors whose bytes have the lowest rank, `tokenizers` those that are the lowest merge. They choose
the same where each token is one merge of two earlier ones: the two that its own bytes end as, with the ranks below its
own. A token that its bytes do not end as is only ever a whole word: ``ignore_merges`` takes it so in both.
"""

import base64
import re
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.fast_bpe import PROBE, bytes_of_characters
from mlxgpt.common.tokenizers.foreign.tables import roles, shown
from mlxgpt.common.tokenizers.hf import EOS, JsonTokenizer, made

_LONGEST = 1 << 25  # bytes of a file of ranks
_MOST = 1 << 20  # the largest rank
_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MIDDLE = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
# name -> how it splits a text; the ranks that OpenAI's file of that name has; its special tokens
_FILES: dict[str, tuple[str, int, dict[str, int]]] = {
    "gpt2": (_GPT2, 50256, {EOS: 50256}),
    "r50k_base": (_GPT2, 50256, {EOS: 50256}),
    "p50k_base": (_GPT2, 50280, {EOS: 50256}),
    "cl100k_base": (_CL100K, 100256, {EOS: 100257, **_MIDDLE, "<|endofprompt|>": 100276}),
    "o200k_base": (_O200K, 199998, {EOS: 199999, "<|endofprompt|>": 200018}),
}
# GPT-2's expression as people write it: ByteLevel of `tokenizers` has it built in
_GPT2_SPELLINGS = frozenset((
    _GPT2,
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
))  # fmt: skip
_TRIED = (
    *PROBE,
    "I'Ve we'LL it'\u017f can'T 12345678 1,234.5 x=[a-b]//c\r\n\r\n\t\tfoo\n  bar  \n\n \u00c9T\u00c9",
    "\u01c5x HTTPServer ",
    "camelCase \u4f60\u597d123\u4e16\u754c\uff01\uff01 a\u0301\u0327b  'tis \u2028",
    "\u2029 \u0660\u0661\u0662\u0663 /path/to\n/x \n ",
)


def named(name: str) -> JsonTokenizer:
    """One of ``protocol.TIKTOKEN``, from tiktoken's own cache or download.

    Raises:
        UserError: it is in neither.
    """
    try:
        import tiktoken
    except ImportError:
        raise UserError(f"{name}: tiktoken is not installed: pip install tiktoken") from None
    try:
        found = tiktoken.get_encoding(name)
    except Exception as error:
        # whatever its download raises
        raise UserError(
            f"{name}: not in tiktoken's cache, nor to be downloaded ({type(error).__name__}): set TIKTOKEN_CACHE_DIR "
            f"to the cache of a machine that has it, or give {name}.tiktoken or a tokenizer.json"
        ) from None
    return of_ranks(found._mergeable_ranks, found._pat_str, found._special_tokens, f"tiktoken's {name}")


def read(path: Path) -> JsonTokenizer:
    """A file of ranks: in each line the base64 of a token, and its rank.

    How a text is split is said by the file's name (``mine.cl100k_base.tiktoken``) or by the ranks being OpenAI's.

    Raises:
        UserError: damaged, or nothing says how a text is split.
    """
    size = path.stat().st_size
    if size > _LONGEST:
        raise UserError(f"{path}: {size} bytes, expected at most {_LONGEST} of a file of ranks")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            first, second = line.split()
            token, rank = base64.b64decode(first, validate=True), int(second)
        except ValueError:
            raise UserError(
                f"{path} line {number}: {shown(line[:60])}: expected base64 of a token and its rank"
            ) from None
        if token in ranks:
            raise UserError(f"{path} line {number}: {shown(token)} is there twice")
        ranks[token] = rank
    last = re.split(r"[.\-]", path.stem)[-1]
    name = last if last in _FILES else next((name for name, facts in _FILES.items() if facts[1] == len(ranks)), None)
    if name is None:
        raise UserError(
            f"{path}: {len(ranks)} ranks, and nothing that says how a text is split: expected a file's name with one "
            f"of {', '.join(_FILES)} at its end, as {path.stem}.cl100k_base.tiktoken"
        )
    pattern, count, special = _FILES[name]
    return of_ranks(ranks, pattern, special if len(ranks) == count else {}, str(path))


def of_ranks(ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int], where: str) -> JsonTokenizer:
    """The tokenizer of a tiktoken.Encoding: its ranks, the expression that splits a text, its special tokens.

    Raises:
        UserError: they are not a byte-level BPE, or `tokenizers` would give other ids.
    """
    import tiktoken

    _check(ranks, special, where)
    merges, whole = _merges(ranks)
    vocabulary = {written(token): rank for token, rank in ranks.items()}
    result = backend_of(vocabulary, merges, pattern, special, where, ignore_merges=whole)
    try:
        peer = tiktoken.Encoding("peer", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=dict(special))
        theirs = [peer.encode(text, allowed_special="all") for text in _TRIED]
    except Exception as error:
        # its Rust says what is wrong with an expression or ranks
        raise UserError(f"{where}: not what tiktoken runs: {' '.join(str(error).split())[:200]}") from None
    for text, ids in zip(_TRIED, theirs, strict=True):
        if result.encode(text) != ids:
            raise UserError(
                f"{where}: `tokenizers` splits {shown(text)} otherwise than {shown(pattern)}: not read here"
            )
    return result


def _check(ranks: Mapping[bytes, int], special: Mapping[str, int], where: str) -> None:
    lost = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if lost is not None:
        raise UserError(f"{where}: no rank for the byte {lost}: expected one for each of 256")
    ids = [*ranks.values(), *special.values()]
    if not all(type(i) is int and 0 <= i < _MOST for i in ids):
        raise UserError(f"{where}: a rank that is none: expected 0 to {_MOST - 1}")
    if len(set(ids)) < len(ids):
        raise UserError(f"{where}: two tokens of one rank: expected one each")


def _merges(ranks: Mapping[bytes, int]) -> tuple[list[tuple[str, str]], bool]:
    """What each token is merged of, by rank; and whether there is one that no merge makes."""
    merges, whole = [], False
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _ends_as(token, ranks, rank)
        if len(parts) == 2:
            merges.append((written(parts[0]), written(parts[1])))
        else:
            whole = True
    return merges, whole


def _ends_as(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """What tiktoken makes of the bytes of ``token`` with the ranks below one."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        least, at = below, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], below)
            if rank < least:
                least, at = rank, i
        if at < 0:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


_CHARACTERS = {byte: c for c, byte in bytes_of_characters().items()}


def written(token: bytes) -> str:
    """The bytes of a token as a tokenizer.json has them: a printable character each."""
    return "".join(map(_CHARACTERS.__getitem__, token))


def backend_of(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    pattern: str,
    special: Mapping[str, int],
    where: str,
    ignore_merges: bool = False,
) -> JsonTokenizer:
    """A byte-level BPE that splits a text by ``pattern`` ("" for not at all), as tiktoken and minbpe write it.

    Raises:
        UserError: an expression that `tokenizers` does not have, a special token that is another token.
    """
    for text, i in special.items():
        if vocabulary.get(text, i) != i:
            raise UserError(f"{where}: {shown(text)} is token {vocabulary[text]} and the special token {i}")
    # in the vocabulary a special token keeps its id, whatever is free below it
    model = models.BPE(vocab=vocabulary | dict(special), merges=merges, ignore_merges=ignore_merges)
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.ByteLevel()
    plain = pattern in _GPT2_SPELLINGS
    over_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=plain)
    if plain or not pattern:
        backend.pre_tokenizer = over_bytes
    else:
        try:
            split = pre_tokenizers.Split(Regex(_translated(pattern)), "isolated")
        except Exception as error:
            # Onigmo's own words
            raise UserError(f"{where}: {shown(pattern)}: {' '.join(str(error).split())[:200]}") from None
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, over_bytes])
    backend.add_special_tokens(sorted(special, key=special.__getitem__))
    names = roles(special)
    if "eos_token" in names:
        names.setdefault("bos_token", names["eos_token"])
    return made(backend, names | {"add_prefix_space": False})


def _translated(pattern: str) -> str:
    """An expression as `tokenizers` reads it: there {1,3}+ is a repetition, and $ is the end of a line."""
    without = re.sub(r"(?<!\\)([?*+]|\{\d+(?:,\d*)?\})\+", r"\1", pattern)
    return re.sub(r"(?<!\\)\$", r"\\z", without)
