"""The verb ``chat``: a conversation in the terminal, or with lines of a script from standard input.

Answers go to stdout, everything else to stderr. A line that ends with a backslash continues on the next, and three
double quotes begin and end a message of several lines.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxgpt.common import backend as backends
from mlxgpt.common import recipes
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import RunError, UserError, nearest
from mlxgpt.common.files import read_json, write_json
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.inference.conversation import Answer, Conversation
from mlxgpt.common.sft.template import Template, template_of
from mlxgpt.common.tokenizers import ends
from mlxgpt.common.tokenizers.protocol import Tokenizer
from mlxgpt.common.train.signals import Signals

QUOTES = '"""'
COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget the conversation, but keep the system prompt",
    "/system [TEXT]": "show the system prompt, or set it; /system - removes it",
    "/temp [X]": "show the temperature, or set it; 0 is greedy",
    "/save FILE": "write the conversation as one example of chat data (JSON)",
    "/load FILE": "resume a conversation that /save wrote",
    "/quit": "leave, like Ctrl-D; Ctrl-C stops an answer",
}


def chat_command(args: argparse.Namespace) -> int:
    """Talks until /quit or the end of the input.

    Args:
        args: model, adapter, force, system, template, template_kwargs, stop_token, backend, device, and the fields of
            SampleConfig.

    Returns:
        0, or 1 if input from a script held a message that could not be answered.
    """
    fields = [field.name for field in dataclasses.fields(SampleConfig) if field.name != "prompt"]
    sample = SampleConfig(**{name: getattr(args, name) for name in fields})
    adapters = base_and_adapters.parse_adapters(args.adapter)
    backend = backends.load(args.backend)
    model, tokenizer = backend.load.load(args.model, adapter=adapters or None, device=args.device, force=args.force)
    base_and_adapters.expect_task(model.config, args.model)
    tokenizer = base_and_adapters.expect_tokenizer(tokenizer, args.model)
    kwargs = recipes.parse_table(args.template_kwargs or "{}", "--template-kwargs")
    template = _template(args.template, tokenizer, str(args.model), kwargs)
    backend.generate.prepare(model)
    stop = set(ends.named(args.stop_token, tokenizer, "--stop-token"))
    conversation = Conversation(backend, model, tokenizer, template, stop, args.system or "", args.kv_bits)
    return Chat(conversation, sample, sys.stdin.isatty()).run()


def _template(given: str | None, tokenizer: Tokenizer, model: str, kwargs: dict[str, Any]) -> Template:
    """The chat template in the file ``given``, else the tokenizer's own."""
    if given:
        try:
            text = Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--template {given}: {getattr(error, 'strerror', None) or error}") from None
        return Template({"default": text}, tokenizer, tokenizer.named, given, kwargs=kwargs)
    found = template_of(tokenizer, f"{model}: chat template", kwargs=kwargs)
    if found is None:
        raise UserError(
            f"{model}: its tokenizer has no chat template: expected --template FILE, or a model fine-tuned on "
            "chats (finetune adds ChatML); generate continues plain text"
        )
    return found


class Chat:
    """Reads messages and commands, prints answers."""

    def __init__(self, conversation: Conversation, sample: SampleConfig, terminal: bool) -> None:
        self._conversation, self._sample, self._terminal = conversation, sample, terminal
        self._failed = False

    def run(self) -> int:
        """Runs until /quit or the end of the input; returns the exit code."""
        if self._terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() a history and line editing)
            self._say("/help lists the commands; Ctrl-D leaves")
        for text in self._messages():
            try:
                if text.startswith("/") and not text.startswith("//"):
                    if not self._command(text):
                        break
                else:
                    self._answer(text.removeprefix("/") if text.startswith("//") else text)
            except (UserError, RunError) as error:
                self._failed = True
                self._say(str(error))
        return 1 if self._failed and not self._terminal else 0

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def _messages(self) -> Iterator[str]:
        """The messages typed; empty ones are skipped."""
        while True:
            try:
                text = self._read()
            except EOFError:
                if self._terminal:
                    self._say("")
                return
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                self._say("\n(Ctrl-D or /quit leaves)")
                continue
            if text.strip():
                yield text

    def _read(self) -> str:
        """One message; input that ends inside a message completes it."""
        line = self._line("> ")
        if line.lstrip().startswith(QUOTES):
            lines = [line.lstrip().removeprefix(QUOTES)]
            while not lines[-1].rstrip().endswith(QUOTES) or (len(lines) == 1 and not lines[0].strip()):
                try:
                    lines.append(self._line("... "))
                except EOFError:
                    return "\n".join(lines).strip("\n")
            lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
            return "\n".join(lines).strip("\n")
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            try:
                lines.append(self._line("... "))
            except EOFError:
                break
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if self._terminal:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def _answer(self, text: str) -> None:
        """Streams the answer; Ctrl-C ends the answer, not the chat."""
        with Signals() as signals:
            answer = self._conversation.answer(
                text, self._sample, lambda piece: print(piece, end="", flush=True), lambda: bool(signals.received)
            )
        print(flush=True)
        self._tell(answer)
        if signals.received and signals.exit_code != 130:
            sys.exit(signals.exit_code)

    def _tell(self, answer: Answer) -> None:
        """Notes about a truncated answer or context."""
        if answer.dropped:
            self._say(f"(the context is full: the oldest {answer.dropped} messages were forgotten)")
        if answer.reason == "context":
            self._say("(the context is full: the answer was truncated; /reset starts over)")
        elif answer.reason == "length":
            self._say(f"(truncated at {self._sample.max_tokens} tokens; --max-tokens sets that)")
        elif answer.reason == "interrupted":
            self._say("(stopped)")

    def _command(self, text: str) -> bool:
        """Runs a command; False for /quit."""
        word, _, rest = text.strip().partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit"):
            return False
        if word == "/help":
            self._say("\n".join(f"  {name:<16} {what}" for name, what in COMMANDS.items()))
        elif word == "/reset":
            self._conversation.messages.clear()
        elif word == "/system":
            if rest:
                self._conversation.system = "" if rest == "-" else rest
            else:
                self._say(self._conversation.system or "(no system prompt)")
        elif word == "/temp":
            self._temperature(rest)
        elif word == "/save":
            self._save(rest)
        elif word == "/load":
            if not rest:
                raise UserError("/load: expected a file")
            self._conversation.restore(read_json(Path(rest).expanduser()), rest)
            self._say(f"({len(self._conversation.messages)} messages)")
        else:
            known = [name.split()[0] for name in COMMANDS]
            raise UserError(f"unknown command {word}{nearest(word, known)}; // begins a message with /")
        return True

    def _temperature(self, text: str) -> None:
        if not text:
            self._say(f"{self._sample.temperature:g}")
            return
        try:
            self._sample = dataclasses.replace(self._sample, temperature=float(text))
        except ValueError:
            raise UserError(f"/temp {text}: expected a number, such as 0.7") from None

    def _save(self, text: str) -> None:
        if not text:
            raise UserError("/save: expected a file")
        place = Path(text).expanduser()
        write_json(place, self._conversation.save())
        self._say(f"({len(self._conversation.messages)} messages in {place})")
