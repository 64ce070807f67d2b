"""Grammars for answers: of a JSON schema, of any JSON object, of a tool format; enforced by llguidance's masks.

A grammar is compiled once and copied for each choice. White space in JSON is at most one space behind a colon and a
comma, as json.dumps writes it: a small model finds no way into endless blanks.
"""

import contextlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llguidance
import numpy as np

from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.serve.guided import schema as schemas
from mlxgpt.common.serve.guided.vocabulary import Vocabulary
from mlxgpt.common.serve.work import Constraint, Served
from mlxgpt.common.tokenizers.protocol import Tokenizer

_JSON = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# the model chooses the tokens of a text that is certain, too
_HEAD = '%llguidance {"no_forcing": true}\n'
_KEPT = 16  # compiled grammars of a vocabulary; a large one takes 40 MB
_LONGEST = 1 << 20  # bytes of a grammar
# Bytes. llguidance follows references by recursion, at up to 10 KB a schema, and a stack that is too small ends the
# process: only what is touched is taken.
STACK = 128 << 20
_SIGNS = '{}[]":,-0123456789 truefalsn'  # what any JSON may need


def _limits() -> llguidance.LLParserLimits:
    """What a grammar may cost: work of a compilation and of a mask, and memory of its automaton."""
    return llguidance.LLParserLimits(max_lexer_states=20_000, verbose_errors=False)


class Guided:
    """An answer on its way through a grammar: a Constraint."""

    def __init__(self, vocabulary: Vocabulary, ends: Collection[int], matcher: Any) -> None:
        self._vocabulary, self._matcher = vocabulary, matcher
        self._ends = np.array(sorted(i for i in ends if 0 <= i < vocabulary.n_vocab), np.intp)
        self._bits = np.zeros(vocabulary.n_vocab // 32 + 1, np.int32)  # of the vocabulary and the end behind it
        self._address, self._size = self._bits.ctypes.data, self._bits.nbytes

    @property
    def over(self) -> bool:
        """Whether nothing may follow but an end."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, (n_vocab,) bool; those that end the text where it may end.

        Raises:
            RunError: no token goes on, or the grammar became too complex.
        """
        vocabulary, over = self._vocabulary, self.over
        if over:
            made = np.zeros(vocabulary.n_vocab, bool)
        else:
            self._matcher.unsafe_compute_mask_ptr(self._address, self._size)
            self._check()
            bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little", count=vocabulary.n_vocab)
            made = bits.view(bool)
            made[vocabulary.copies] = made[vocabulary.originals]
        made[self._ends] = over or self._matcher.is_accepting()
        return made

    def take(self, token: int) -> None:
        """Goes on behind a token that was allowed.

        Raises:
            RunError: it was not.
        """
        if token in self._ends:
            return
        self._matcher.consume_token(self._vocabulary.same.get(token, token))
        self._check()

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        said = _line(self._matcher.get_error())
        if said == "NoExtensionBias":
            said = "the tokenizer has no token with which the answer can go on"
        raise RunError(f"the answer's grammar: {said}")


def _json(schema: Any, shared: "_Shared") -> str:
    """The body of a rule: JSON of a JSON Schema."""
    made = schemas.enforceable(schema)
    shared.expect(_SIGNS, "JSON")
    for text in schemas.literals(made):
        shared.expect(json.dumps(text, ensure_ascii=False), repr(text))
    return f"%json {json.dumps({'x-guidance': _JSON, **({} if isinstance(made, bool) else made)})}"


class Guide:
    """The grammars of a served model's answers; cheap to make, what is costly is shared by equal tokenizers."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def ready(self) -> None:
        """Prepares the tokenizer, which the first grammar else does: a second where there are 150,000 tokens.

        Python's lock is held meanwhile, so it is best done before anything is served.
        """
        with contextlib.suppress(UserError):  # a request that needs it is told
            self._shared()

    def schema(self, schema: Any, closing: str = "") -> Callable[[], Constraint]:
        """Answers that are JSON of a JSON Schema; ``closing`` ends the reasoning that the prompt has opened.

        Raises:
            UserError: no schema, not enforceable, or of what the tokenizer cannot write: where and what.
        """
        shared = self._shared()
        before, rules = shared.reasoning(closing) if closing else ("", "")
        return self._compiled(shared, f"start: {before}answer\n{rules}answer: {_json(schema, shared)}")

    def json_object(self, closing: str = "") -> Callable[[], Constraint]:
        """Answers that are any JSON object.

        Raises:
            UserError: the tokenizer cannot write JSON.
        """
        return self.schema({"type": "object"}, closing)

    def grammar(self, lark: str, answer: Any = None) -> Callable[[], Constraint]:
        """Answers of a grammar in llguidance's Lark syntax; a special token is written ``<[id]>``.

        ``answer``: the JSON Schema that a rule of this name stands for.

        Raises:
            UserError: no grammar, or one that no answer fits; or what ``schema`` refuses.
        """
        shared = self._shared()
        return self._compiled(shared, lark if answer is None else f"{lark}\nanswer: {_json(answer, shared)}\n")

    def _shared(self) -> "_Shared":
        served = self._served
        if served.tokenizer is None:
            raise UserError(f"{served.name} has no tokenizer: no grammar of text without one")
        return _shared(served.tokenizer, served.n_vocab, served.tokenizer.special | served.ends)

    def _compiled(self, shared: "_Shared", grammar: str) -> Callable[[], Constraint]:
        matcher, ends = shared.compiled(_HEAD + grammar), self._served.ends
        return lambda: Guided(shared.vocabulary, ends, matcher.deep_copy())


class _Shared:
    """A vocabulary and the grammars compiled for it."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer, n_vocab, special)
        self._matchers: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def expect(self, text: str, what: str) -> None:
        """Refuses what the tokens cannot write."""
        lost = self.vocabulary.unwritable(text)
        if lost is not None:
            raise UserError(f"this {self._tokenizer.kind} tokenizer cannot write {what}: it has no token for {lost!r}")

    def reasoning(self, closing: str) -> tuple[str, str]:
        """What stands before the answer, and its rules: free text up to what closes it, and line breaks."""
        found = self._tokenizer.id_of(closing)
        if found is not None and self.vocabulary.is_special(found):
            return f"thoughts <[{found}]> gap ", "thoughts: /(?s:.*)/\ngap: /[ \\n]{0,2}/\n"
        return "thoughts gap ", f"thoughts[suffix={json.dumps(closing)}]: /(?s:.*)/\ngap: /[ \\n]{{0,2}}/\n"

    def compiled(self, grammar: str) -> Any:
        """The matcher at the beginning of a text.

        Raises:
            UserError: llguidance refuses it, or no token begins a text of it.
        """
        with self._lock:
            if grammar in self._matchers:
                self._matchers.move_to_end(grammar)
                return self._matchers[grammar]
        if len(grammar) > _LONGEST:
            raise UserError(f"a grammar of {len(grammar)} characters, expected at most {_LONGEST}")
        matcher = _on_a_large_stack(lambda: self._made(grammar))
        with self._lock:
            self._matchers[grammar] = matcher
            while len(self._matchers) > _KEPT:
                self._matchers.popitem(last=False)
        return matcher

    def _made(self, grammar: str) -> Any:
        matcher = llguidance.LLMatcher(self.vocabulary.tokenizer, grammar, log_level=0, limits=_limits())
        if matcher.is_error():
            raise UserError(_line(matcher.get_error()))
        try:
            begun = Guided(self.vocabulary, (), matcher.deep_copy())
            if not begun.allowed().any() and not begun.over:
                raise UserError("no answer fits")
        except RunError as error:
            raise UserError(str(error)) from None
        return matcher


_sizing = threading.Lock()


def _on_a_large_stack(made: Callable[[], Any]) -> Any:
    """What a function returns or raises in a thread whose stack has room for deep recursion."""
    with ThreadPoolExecutor(1) as pool:
        with _sizing:
            before = threading.stack_size(STACK)
            try:
                future = pool.submit(made)  # starts the thread
            finally:
                threading.stack_size(before)
        return future.result()


_known: dict[tuple[str, int, frozenset[int]], _Shared] = {}
_making = threading.Lock()


def _shared(tokenizer: Tokenizer, n_vocab: int, special: frozenset[int]) -> _Shared:
    """One for every tokenizer, whoever asks."""
    key = tokenizer.digest, n_vocab, special
    with _making:
        if key not in _known:
            _known[key] = _Shared(tokenizer, n_vocab, special)
        return _known[key]


_WHERE = re.compile(r"^at \d+\(\d+\): |failed to compile JSON schema: |\n\s+\d+ \|.*|\n<non-verbose/>.*", re.DOTALL)


def _line(said: str) -> str:
    """What llguidance says, in one line."""
    if "Unable to determine if regex is empty" in said:
        return "a pattern is too complex to enforce together with other patterns or lengths"
    return " ".join(_WHERE.sub("", said).split())[:300] or "no answer fits"
