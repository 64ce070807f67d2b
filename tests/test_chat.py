"""chat: a conversation gives what the whole prompt would, reads each token once, and its commands do what they say."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import templates
from models import tiny, weights

from mlxgpt import cli
from mlxgpt.commands.chat import Chat
from mlxgpt.common import backend as backends
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.inference import conversation as conversations
from mlxgpt.common.inference.conversation import Conversation
from mlxgpt.common.sft import template as sft_template
from mlxgpt.common.tokenizers.load import train_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

GREEDY = SampleConfig(temperature=0.0, max_tokens=12)
FORGETFUL = (  # as Qwen3: what was answered is written otherwise once more follows
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content[:3] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a ChatML tokenizer."""
    return written(tmp_path_factory.mktemp("chat") / "model")


def written(place: Path, **more: Any) -> Path:
    tokenizer = sft_template.with_chatml(train_tokenizer("bpe", [templates.TEXT], 320))
    sizes = dict(family="llama", block_size=256, n_kv_head=2) | more
    config = tiny(vocab_size=tokenizer.n_vocab, **sizes)
    made = weights(config, scale=8)
    words = [re.fullmatch(" [a-z]+", tokenizer.decode([token])) for token in range(tokenizer.n_vocab)]
    made["wte.weight"] *= np.array([[word is not None] for word in words])  # what it draws is text
    model_folder.write_model(place, config, made, tokenizer=tokenizer)
    return place


def start(
    package: str, model: Path, monkeypatch: pytest.MonkeyPatch, source: str = sft_template.CHATML, system: str = ""
) -> tuple[Conversation, list[int], Any, Tokenizer]:
    """A conversation, and the sizes of what passes through its model."""
    backend = backends.load(package)
    loaded, tokenizer = backend.load.load(model, device="cpu")
    read: list[int] = []
    hidden = type(loaded).hidden

    def counting(this: Any, tokens: Any, *args: Any, **more: Any) -> Any:
        read.append(tokens.shape[1])
        return hidden(this, tokens, *args, **more)

    monkeypatch.setattr(type(loaded), "hidden", counting)
    template = sft_template.Template({"default": source}, tokenizer, tokenizer.named, "test")
    return Conversation(backend, loaded, tokenizer, template, set(), system), read, loaded, tokenizer


def ask(talk: Conversation, text: str, sample: SampleConfig = GREEDY) -> tuple[conversations.Answer, str]:
    pieces: list[str] = []
    return talk.answer(text, sample, pieces.append, lambda: False), "".join(pieces)


@pytest.mark.parametrize("source", [sft_template.CHATML, FORGETFUL])
@pytest.mark.parametrize("package", ["mlx", "torch"])
def test_answers_are_those_of_the_whole_prompt(
    model: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: str
) -> None:
    talk, _, loaded, tokenizer = start(package, model, monkeypatch, source, "Be brief.")
    generate = backends.load(package).generate.generate
    for text in ("Hello there", "And again", "What is a list?"):
        messages = [*talk.all(), {"role": "user", "content": text}]
        prompt = talk._template.encode(messages, generation=True)
        turn = SampleConfig(temperature=0.0, max_tokens=12)
        answer, streamed = ask(talk, text, turn)
        expected = generate(loaded, tokenizer, [prompt], turn)[0]
        assert answer.text == streamed == expected.text
        assert answer.read + answer.held == len(prompt)


@pytest.mark.parametrize("package", ["mlx", "torch"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_leave_no_keys_of_another_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    more: dict[str, Any] = dict(rope_scaling=kind, rope_original=128)
    more |= dict(rope_factor=2.0) if kind == "dynamic" else dict(family="phi3", rope_short=[1] * 6, rope_long=[9.0] * 6)
    talk, _, loaded, tokenizer = start(package, written(tmp_path / "m", **more), monkeypatch)
    sizes = []
    for text in ("Hello there", "And again", "What is a list?", "A longer question, of many words and more"):
        prompt = talk._template.encode([*talk.all(), {"role": "user", "content": text}], generation=True)
        answer, _ = ask(talk, text)
        assert answer.text == backends.load(package).generate.generate(loaded, tokenizer, [prompt], GREEDY)[0].text
        sizes.append((len(prompt), answer.held))
    assert sizes[0][0] < 128 < sizes[-1][0] and any(held for _, held in sizes) and not sizes[-1][1]


@pytest.mark.parametrize("package", ["mlx", "torch"])
def test_a_turn_costs_its_new_tokens_only(model: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    talk, read, _, tokenizer = start(package, model, monkeypatch)
    first, _ = ask(talk, "Hello there, how are you today?")
    assert first.held == 0
    before = sum(read)
    second, _ = ask(talk, "Hm")
    fed = sum(read) - before
    # the end of the first answer, the question, the header of the answer; and what was drawn, a step ahead
    new = len(tokenizer.encode("<|im_end|>\n<|im_start|>user\nHm<|im_end|>\n<|im_start|>assistant\n"))
    assert second.held > first.read
    assert second.read <= new + 2
    assert fed <= second.read + second.tokens + 1


def test_a_cache_that_is_not_cut_is_seen(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: what the template rewrote stays in the cache."""
    talk, _, _, _ = start("mlx", model, monkeypatch, FORGETFUL)
    other, _, _, _ = start("mlx", model, monkeypatch, FORGETFUL)
    ask(talk, "Hello there")
    ask(other, "Hello there")
    monkeypatch.setattr(other, "_cut", lambda ids: other._cache[0].offset)
    assert ask(talk, "And again")[0].text != ask(other, "And again")[0].text


def test_it_stops_at_the_templates_end_of_turn(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, _, _, tokenizer = start("torch", model, monkeypatch)
    answer, _ = ask(talk, "Hello there")
    assert answer.reason == "length"
    drawn = tokenizer.encode(answer.text)
    talk.messages.clear()
    talk._ends = {drawn[2]}
    shorter, _ = ask(talk, "Hello there")
    assert shorter.reason == "eos"
    assert answer.text.startswith(shorter.text)
    assert shorter.tokens < answer.tokens


def test_a_full_context_forgets_the_oldest_and_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk, _, _, _ = start("torch", model, monkeypatch, system="Be brief.")
    dropped = 0
    for number in range(12):
        answer, _ = ask(talk, f"Question {number}: what is the sum of these and those numbers?")
        dropped += answer.dropped
        assert talk.all()[0]["role"] == "system"
    assert dropped > 0
    assert len(talk.messages) < 24
    held = list(talk.messages)
    with pytest.raises(UserError, match=r"tokens with the system prompt: the model's context holds 256"):
        ask(talk, "word " * 400)
    assert talk.messages == held


def script(model: Path, text: str, *flags: str) -> tuple[int, str, str]:
    """The verb on lines of standard input."""
    out, err = io.StringIO(), io.StringIO()
    stdin, stdout, stderr = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(text), out, err
    try:
        code = cli.main(["chat", "-m", str(model), "--backend", "torch", "--device", "cpu", "-n", "6", *flags])
    finally:
        sys.stdin, sys.stdout, sys.stderr = stdin, stdout, stderr
    return code, out.getvalue(), err.getvalue()


def test_a_script_is_answered_line_by_line(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    text = 'Hello\n\nfirst \\\nsecond\n"""\none\n\ntwo\n"""\n/temp\n/temp 0\n/system Be kind.\n/system\n'
    text += f"/save {saved}\n/quit\nnever\n"
    code, out, err = script(model, text)
    assert code == 0
    assert len(out.splitlines()) >= 3
    for said in ("0.8", "Be kind.", "(6 messages in", "truncated at 6 tokens"):
        assert said in err
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 3]
    assert [m["content"] for m in messages[1::2]] == ["Hello", "first \nsecond", "one\n\ntwo"]
    code, again, err = script(model, f"/load {saved}\n/save {saved}\n/reset\n/save {tmp_path / 'empty.json'}\n")
    assert (code, again) == (0, "")
    assert json.loads(saved.read_text())["messages"] == messages
    assert json.loads((tmp_path / "empty.json").read_text())["messages"] == messages[:1]


def test_the_same_script_says_the_same(model: Path) -> None:
    text = "Hello\nHello\n"
    first = script(model, text, "--seed", "3")
    assert first == script(model, text, "--seed", "3")
    assert first[1] != script(model, text, "--seed", "4")[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/rest\n", r"unknown command /rest (did you mean '/reset'?)"),
        ("/temp hot\n", "/temp hot: expected a number"),
        ("/temp -1\n", "sample.temperature = -1.0"),
        ("/save\n", "/save: expected a file"),
        ("/save /nowhere/at/all.json\n", "cannot write"),
        ("/load /nowhere.json\n", "No such file"),
    ],
)
def test_what_goes_wrong_is_a_line_and_the_chat_goes_on(model: Path, text: str, said: str) -> None:
    code, out, err = script(model, text + "Hello\n")
    assert code == 1
    assert said in err
    assert out.strip()
    assert "Traceback" not in err


def test_a_message_may_begin_with_a_slash(model: Path, tmp_path: Path) -> None:
    script(model, f"//usr is a folder\n/save {tmp_path / 'a.json'}\n")
    assert json.loads((tmp_path / "a.json").read_text())["messages"][0]["content"] == "/usr is a folder"


def test_damaged_conversations_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, _, _, _ = start("torch", model, monkeypatch)
    for row in (
        {}, {"messages": "x"}, {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]},
    ):  # fmt: skip
        with pytest.raises(UserError, match="expected"):
            talk.restore(row, "talk.json")


def test_a_model_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = train_tokenizer("bpe", [templates.TEXT], 320)
    config = tiny(family="gpt2", vocab_size=tokenizer.n_vocab)
    model_folder.write_model(tmp_path / "plain", config, weights(config), tokenizer=tokenizer)
    code, _, err = script(tmp_path / "plain", "Hello\n")
    assert code == 2
    assert "no chat template: expected --template FILE" in err


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, _, _, _ = start("torch", model, monkeypatch)
    chat = Chat(talk, SampleConfig(temperature=0.0, max_tokens=100), terminal=False)
    written: list[str] = []

    def interrupting(piece: str, **_: Any) -> None:
        written.append(piece)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("builtins.print", lambda *text, **more: interrupting("".join(text)))
    chat._answer("Hello")
    monkeypatch.undo()
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    assert talk.messages[1]["content"]
    answer, _ = ask(talk, "And again")
    assert answer.held > 0


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_a_terminal_gets_a_prompt_and_ctrl_d_leaves(model: Path) -> None:
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "torch_ref", "chat", "-m", str(model), "-n", "4", "--temperature", "0"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = b""

    def wait(for_what: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while for_what not in seen and time.monotonic() < deadline:
            seen += os.read(mine, 1024)
        assert for_what in seen, seen

    wait(b"> ")
    seen = b""
    os.write(mine, b"Hello\n")
    wait(b"truncated at 4 tokens")
    wait(b"> ")
    os.write(mine, b"\x04")
    assert process.wait(30) == 0
    os.close(mine)


def test_both_frameworks_say_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = SampleConfig(temperature=0.7, max_tokens=16, seed=5)
    said = []
    for package in ("mlx", "torch"):
        talk, _, _, _ = start(package, model, monkeypatch)
        said.append([ask(talk, text, sample)[0].text for text in ("Hello", "Why?", "And then?")])
    assert said[0] == said[1]
    assert np.unique(said[0]).size == 3
