"""A model's name and an engine without a model: what the web half of mlxgpt serve is tested with."""

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from mlxgpt.common.serve.work import Begun, Counts, Drawn, Piece, Served, Work
from mlxgpt.common.sft.template import CHATML, Template, with_chatml
from mlxgpt.common.tokenizers.hf import made_of_bytes


def served(name: str = "tiny", context: int = 64, chat: bool = True, template: str = CHATML) -> Served:
    """A model that is only a context: a byte is a token, ChatML's two tokens follow, then the end of a text."""
    tokenizer = with_chatml(made_of_bytes())
    config = SimpleNamespace(block_size=context, vocab_size=tokenizer.n_vocab)
    found = Template({"default": template}, tokenizer, tokenizer.named, name) if chat else None
    return Served(
        name, SimpleNamespace(config=config), tokenizer, found, frozenset({257}), tokenizer.n_vocab, "ab" * 32
    )


Script = Callable[[Work], Sequence[Begun | Piece]]


def says(text: str, reason: str = "eos") -> Script:
    """Every choice writes the text, a byte a step."""

    def script(work: Work) -> list[Begun | Piece]:
        top = work.logprobs
        assert work.served.tokenizer is not None
        scores = tuple(
            Drawn(token, None if n == 0 else -0.25, ((token, -0.25),) if n and top else ())
            for n, token in enumerate(work.prompt)
        )
        made: list[Begun | Piece] = [Begun(0, scores if work.score_prompt else ())]
        for choice in range(len(work.copies)):
            for letter in text if work.sample.max_tokens else "":
                data = letter.encode()
                for byte in data:
                    drawn = Drawn(byte, None if top is None else -0.5, ((byte, -0.5), (65, -1.5))[: top or 0])
                    made.append(Piece(choice, letter if byte == data[-1] else "", (drawn,)))
            why = reason if work.sample.max_tokens else "length"
            end = Drawn(257, -0.1) if top is not None and why == "eos" else None
            made.append(Piece(choice, "", (), why, end=end))
        return made

    return script


class FakeWorker:
    """Says what its script says of each work, in a thread of its own as the engine does."""

    def __init__(self, *models: Served, script: Script | None = None) -> None:
        self.counts = Counts()
        self.death: BaseException | None = None
        self.served = {one.name: one for one in models or (served(),)}
        self.script = script or says("Hello")
        self.works: list[Work] = []
        self.cancelled: list[Work] = []
        self.refusal: Exception | None = None
        self.held = threading.Event()  # set: nothing is said until it is cleared

    def submit(self, work: Work) -> None:
        if self.refusal:
            raise self.refusal
        self.works.append(work)
        if not self.held.is_set():
            threading.Thread(target=self.speak, args=(work,)).start()

    def speak(self, work: Work, *said: Begun | Piece) -> None:
        """What the script has for a work, or this."""
        for one in said or self.script(work):
            work.say(one)

    def cancel(self, work: Work) -> None:
        self.cancelled.append(work)
