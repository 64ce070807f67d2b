"""The rung tokenizer: the ids of a fixed set of texts in many scripts, the special tokens, the chat template."""

from pathlib import Path
from typing import Any

from convert.formats.opened import Opened
from convert.verify.config import CARRY
from convert.verify.report import Checked, Report
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.load import has_tokenizer, load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer, write_files

TEXTS = (
    "Hello world", " leading space", "trailing space ", "double  space   triple", "tab\tand\nnewline", "\n\n\n", "\r\n",
    "a", "", " ", "The quick brown fox jumps over the lazy dog.", "don't can't I'll we've HE'S", "naïve café résumé",
    "Straße Ökologie Übung", "Wieviel kostet 3,50 €?", "¿Qué tal? ¡Muy bien!", "Привет, как дела?",
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5",
    "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "你好\uff0c世界。", "こんにちは世界", "안녕하세요 세계",
    "Xin chào thế giới", "İstanbul'da ığüşöç",
    "\U0001d518\U0001d52b\U0001d526 \U0001d48e\U0001d482",
    "e\u0301 versus é, ﬁ versus fi", "zero\u200bwidth\u00a0nbsp\ufeffbom",
    "😀 👍🏽 👩‍👩‍👧‍👦 🇫🇷", "0123456789 3.14159 1,000,000 1e-5", "x = [i**2 for i in range(10)] if a != b else {}",
    "def f(self, *args: int) -> None:\n    return None\n", "<html><body class=\"a\">&amp;</body></html>",
    "https://example.org/a?b=c&d=%20#e", "{\"key\": [1, 2.5, null, \"\\u00e9\"]}", "\\frac{a}{b} $x_i^2$ \\\\",
    "\x00\x01\x7f\x80\xff", "\ufffd\ufffe\U0010ffff", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "............----------======",
    "CamelCaseAndsnake_case_and-kebab-case", "<|endoftext|>", "<s>[INST] hi [/INST]</s>",
    "<|im_start|>user\nhi<|im_end|>",
)  # fmt: skip


def tokenizer_of(opened: Opened, place: Path) -> Tokenizer | None:
    """The tokenizer that travels with a model, through the folder ``place``; None where there is none.

    Raises:
        UserError: its files are damaged.
    """
    place.mkdir(exist_ok=True)
    config = opened.path / "config.json"  # its model_type has a say
    given = opened.companions | ({config.name: config} if config.is_file() else {})
    write_files(place, {name: one if isinstance(one, bytes) else one.read_bytes() for name, one in given.items()})
    return load_tokenizer(place) if has_tokenizer(place) else None


def ids(tokenizer: Tokenizer) -> list[list[int] | str]:
    """The ids of each text, or what the tokenizer says against it (characters it does not have)."""
    found: list[list[int] | str] = []
    for text in TEXTS:
        try:
            found.append([int(token) for token in tokenizer.encode(text)])
        except UserError as error:
            found.append(str(error))
    return found


def compare(
    a: Opened,
    b: Opened,
    tokenizers: tuple[Tokenizer | None, Tokenizer | None],
    judged: tuple[Any, Any],
    report: Report,
) -> None:
    """``judged`` are the ids that transformers gives where a side is judged by it, else None."""
    requested = "tokenizer" in report.demanded
    if tokenizers == (None, None):
        report.skip("tokenizer", "neither side has one", requested)
        return
    for side, opened, found in zip("AB", (a, b), tokenizers, strict=True):
        if found is None:
            if opened.format in CARRY:
                report.find("tokenizer", "files", f"missing in {side}")
            else:
                report.skip("tokenizer", f"{side} has none: {opened.format} has no place for one", requested)
            return
    first, second = tokenizers
    assert first and second
    lists = [judge if judge is not None else ids(own) for judge, own in zip(judged, tokenizers, strict=True) if own]
    different = [(text, x, y) for text, x, y in zip(TEXTS, *lists, strict=True) if x != y]
    for text, x, y in different[:3]:
        report.find("tokenizer", repr(text), f"{_short(x)} | {_short(y)}")
    if len(different) > 3:
        report.find("tokenizer", "ids", f"{len(different)} of {len(TEXTS)} texts differ, the first three above")
    if first.n_vocab != second.n_vocab:
        report.find("tokenizer", "n_vocab", f"{first.n_vocab} | {second.n_vocab}")
    if first.eos_id != second.eos_id:
        report.find("tokenizer", "eos_id", f"{first.eos_id} | {second.eos_id}")
    if first.before != second.before:
        report.find("tokenizer", "a text begins with", f"{first.before} | {second.before}")
    if first.after != second.after:
        report.find("tokenizer", "a text ends with", f"{first.after} | {second.after}")
    _compare_special(first, second, report)
    report.checked.append(Checked("tokenizer", f"ids of {len(TEXTS)} texts, special tokens, chat template"))


def _short(found: list[int] | str) -> str:
    text = str(found)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _compare_special(first: Tokenizer, second: Tokenizer, report: Report) -> None:
    """Special tokens and chat templates."""
    one, other = special(first), special(second)
    for name in dict.fromkeys([*one, *other]):
        x, y = one.get(name), other.get(name)
        if x == y:
            continue
        if name.endswith("_token") and (x is None or y is None):
            report.notes.append(f"tokenizer's {name} {x!r} | {y!r}: one side does not say it")
        else:
            report.find("tokenizer", name, f"{_short(repr(x))} | {_short(repr(y))}")


def special(tokenizer: Tokenizer) -> dict[str, str]:
    """Tokens by their role, and the chat templates by name."""
    texts = tokenizer.templates
    return tokenizer.named | {f"chat_template {n}" if n != "default" else "chat_template": t for n, t in texts.items()}
