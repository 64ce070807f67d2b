"""SentencePiece's kinds as llama.cpp runs them, held against the tokenizer that a GGUF file is written from."""

import re
from typing import Any

import numpy as np

from convert.formats.gguf.vocabulary import SPACE, Vocabulary
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.folder import sp_model
from mlxgpt.common.tokenizers.protocol import Tokenizer


class LlamaCpp:
    """Ids as llama.cpp computes them: special tokens are cut out of the text, the pieces between are normalized alone.

    So each gets its own space in front, unlike in transformers; spaces that the text has stay beside it.
    """

    def __init__(self, made: Vocabulary) -> None:
        import sentencepiece

        marks = {made.tokens[i]: i for i, kind in enumerate(made.types) if kind in sp_model.MARKS}
        found = "|".join(re.escape(text) for text in sorted(marks, key=lambda text: (-len(text), marks[text])))
        self._marks, self._mark = marks, re.compile(f"({found})") if found else None
        unigram = made.model == "t5"
        kinds = {sp_model.USER: sp_model.CONTROL, sp_model.UNUSED: sp_model.NORMAL}
        kinds |= {sp_model.BYTE: sp_model.CONTROL} if unigram else {}  # what is no piece of text is no byte either
        pieces = [
            sp_model.Piece(token, np.float32(score).tobytes(), kinds.get(kind, kind))
            for token, score, kind in zip(made.tokens, made.scores, made.types, strict=True)
        ]
        if sp_model.UNKNOWN not in made.types:
            pieces.append(sp_model.Piece("<unknown to no text>", np.float32(0).tobytes(), sp_model.UNKNOWN))
        message = sp_model.build(
            pieces,
            (next(i for i, piece in enumerate(pieces) if piece.kind == sp_model.UNKNOWN), -1, -1),
            byte_fallback=not unigram and sp_model.BYTE in made.types,
            add_prefix_space=made.add_space_prefix and unigram,
            trim_spaces=made.remove_extra_whitespaces,
            charsmap=made.charsmap,
            unigram=unigram,
        )
        self._prefix = " " if made.add_space_prefix and not unigram else ""
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=message)
        except RuntimeError as error:
            raise UserError(f"SentencePiece cannot have its tokens: {str(error).splitlines()[0]}") from None

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, nothing put before or after."""
        ids: list[int] = []
        after_mark = True
        for part in self._mark.split(text) if self._mark else [text]:
            if part in self._marks:
                ids.append(self._marks[part])
            elif part:
                ids.extend(self._processor.encode((self._prefix if after_mark else "") + part))
            after_mark = part in self._marks
        return ids


def observe(made: Vocabulary, tokenizer: Tokenizer) -> None:
    """Sets what a tokenizer of SentencePiece's kinds does with spaces; notes where llama.cpp will have other ids.

    Raises:
        UserError: it will have others for words with one space between them.
    """
    if made.model == "gpt2":
        return
    first = tokenizer.encode("a")
    made.add_space_prefix = bool(first) and made.tokens[first[0]].startswith(SPACE)
    made.remove_extra_whitespaces = made.model == "t5" and tokenizer.encode("a  a ") == tokenizer.encode("a a")
    there = LlamaCpp(made)
    other = next((text for text in _words(made) if there.encode(text) != tokenizer.encode(text)), None)
    if other is not None:
        what = "merges are not those of scores" if made.model == "llama" else "scores give other ids there"
        raise UserError(f"its {what}, as {other[:40]!r} shows")
    edges = [said for said, text in _edges(made).items() if there.encode(text) != tokenizer.encode(text)]
    if edges:
        made.notes.append(f"llama.cpp gives other ids than this tokenizer to text with {', '.join(edges)}")


def _words(made: Vocabulary) -> list[str]:
    """Texts of tokens of the vocabulary, picked at random, with one space between words."""
    words = [
        token.replace(SPACE, " ")
        for token, kind in zip(made.tokens, made.types, strict=True)
        if kind == sp_model.NORMAL and token.isprintable()
    ]
    if not words:
        return []
    rng = np.random.default_rng(0)
    return [" ".join("".join(words[i] for i in rng.integers(0, len(words), 12)).split()) for _ in range(64)]


def _edges(made: Vocabulary) -> dict[str, str]:
    found = {
        "spaces at its beginning": "  a",
        "several spaces": "a   b",
        "line breaks": "a\n\nb",
        "characters that it does not know": "\u0ba4\U0001f9ff",
        "characters that Unicode normalizes": "\uff21\ufb01\u2460 e\u0301",
    }
    controls = [token for token, kind in zip(made.tokens, made.types, strict=True) if kind == sp_model.CONTROL]
    return found | ({"words after a control token": f"a{controls[0]}a"} if controls else {})
