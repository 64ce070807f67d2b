"""What `mlxgpt serve` serves: the base and its adapters in memory once; the verb's refusals, and the process's life."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import templates
from decoding import BACKENDS, make_config, make_weights
from test_fuse import quantized

from mlxgpt import cli
from mlxgpt.common import backend as backends
from mlxgpt.common.config import AdapterConfig, Recipe, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, model_folder
from mlxgpt.common.model import adapters
from mlxgpt.common.serve import models
from mlxgpt.common.serve.models import Options
from mlxgpt.common.sft.template import CHATML, with_chatml
from mlxgpt.common.tokenizers.hf import train_byte_bpe

ROOT = Path(__file__).parent.parent


def settings(**more: Any) -> AdapterConfig:
    return AdapterConfig(rank=2, **more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a chat template; adapters one and two; one that was trained on chats, with new tokens."""
    place, plain = tmp_path_factory.mktemp("served"), train_byte_bpe([templates.TEXT], 300)
    config = make_config("llama", vocab=plain.n_vocab, block_size=128, tied=False)
    model_folder.write_model(place / "base", config, make_weights(config), tokenizer=plain)
    chatty = with_chatml(plain)
    grown = dataclasses.replace(config, vocab_size=chatty.n_vocab)
    for number, (name, model, more, tokenizer) in enumerate(
        (
            ("one", config, settings(), None),
            ("two", config, settings(method="dora"), None),
            ("chats", grown, settings(train=("wte", "lm_head")), chatty),
        )
    ):
        recipe = Recipe(model=model, tune=TuneConfig(), adapter=more)
        rng = np.random.default_rng(number)
        arrays = {n: rng.normal(0, 0.3, p.shape).astype(np.float32) for n, p in adapters.trainable(recipe).items()}
        (place / name).mkdir()
        adapter_folder.write_adapter(place / name, recipe, place / "base", arrays, tokenizer=tokenizer)
    return place


def tensor(backend: str, tokens: list[list[int]]) -> Any:
    if backend == "torch":
        import torch

        return torch.tensor(tokens)
    import mlx.core as mx

    return mx.array(tokens)


def flat(backend: str, model: Any) -> dict[str, Any]:
    """Where the tensors of a model lie in memory, by name."""
    if backend == "torch":
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return {name: tensor.data_ptr() for name, tensor in tensors if not name.startswith("_")}
    from mlx.utils import tree_flatten

    held = dict(tree_flatten(model.parameters()))
    arrays = {name: np.asarray(memoryview(array)) for name, array in held.items()}  # pyright: ignore
    return {name: array.__array_interface__["data"][0] for name, array in arrays.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_share_what_they_leave_as_it_is(backend: str, place: Path) -> None:
    options = Options(str(place / "base"), adapters=[f"{name}={place / name}" for name in ("one", "two", "chats")])
    base, one, two, chats = models.load_all(backends.load(backend), options)
    assert [each.name for each in (base, one, two, chats)] == ["base", "one", "two", "chats"]
    assert [each.parent for each in (base, one, two, chats)] == [None, "base", "base", "base"]
    held = flat(backend, base.model)
    for each in (one, two):
        theirs = flat(backend, each.model)
        assert {name: theirs[name] for name in held} == held
    theirs = flat(backend, chats.model)
    assert {name for name in held if theirs[name] != held[name]} == {"wte.weight", "lm_head.weight"}
    assert (base.template, one.template) == (None, None) and chats.template
    assert chats.n_vocab == base.n_vocab + 2
    assert chats.template.end_id in chats.ends
    assert len({each.digest for each in (base, one, two, chats)}) == 4
    package, generate = backends.load(backend).load, backends.load(backend).generate
    for each, name in ((one, "one"), (two, "two"), (chats, "chats")):
        alone, _ = package.load(place / "base", place / name)
        generate.prepare(alone)
        for tokens in ([[5]], [list(range(4, 70))]):  # bit for bit: of one row, and of several
            mine, theirs = (np.asarray(model(tensor(backend, tokens)).tolist()) for model in (each.model, alone))
            assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_base_is_read_once(backend: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, stored = [], model_folder.read_stored

    def spy(*args: Any, **kwargs: Any) -> Any:
        read.append(sorted(found := stored(*args, **kwargs)))
        return found

    monkeypatch.setattr(model_folder, "read_stored", spy)
    options = Options(str(place / "base"), adapters=[f"{name}={place / name}" for name in ("one", "two", "chats")])
    models.load_all(backends.load(backend), options)
    assert "h.0.attn.q_proj.weight" in read[0] and read[1:] == [[], [], ["lm_head.weight", "wte.weight"]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("free", (0, 2**40), ids=("quantized", "dequantized"))
def test_adapters_share_a_quantized_base(
    backend: str, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = quantized(tmp_path, 4)
    backend_of = backends.load(backend)
    monkeypatch.setattr("mlxgpt.common.plan.machine.free", lambda: free)
    first, second = models.load_all(backend_of, Options(str(base), adapters=[f"x={adapter}"]))
    held, theirs = flat(backend, first.model), flat(backend, second.model)
    assert any(name.endswith(".words") for name in held) == (free == 0)
    assert {name: theirs[name] for name in held} == held


def test_a_digest_sees_what_training_changes(place: Path, tmp_path: Path) -> None:
    config = model_folder.read_config(place / "base")
    weights = model_folder.read_params(place / "base", config)
    (before,) = models.load_all(backends.load("torch"), Options(str(place / "base")))
    weights["h.1.mlp.c_proj.weight"] = weights["h.1.mlp.c_proj.weight"] * np.float32(1.0001)
    model_folder.write_model(tmp_path / "new", config, weights)
    (after,) = models.load_all(backends.load("torch"), Options(str(tmp_path / "new")))
    assert before.tokenizer and after.tokenizer is None
    model_folder.write_model(tmp_path / "copy", config, model_folder.read_params(place / "base", config))
    (copy,) = models.load_all(backends.load("torch"), Options(str(tmp_path / "copy")))
    assert copy.digest == before.digest != after.digest


def test_a_stop_token_may_be_that_of_some_of_the_models(place: Path) -> None:
    options = Options(str(place / "base"), adapters=[f"chats={place / 'chats'}"], stop_tokens=["<|im_start|>"])
    base, chats = models.load_all(backends.load("torch"), options)
    assert chats.tokenizer and chats.ends > base.ends
    assert chats.tokenizer.id_of("<|im_start|>") in chats.ends - base.ends
    with pytest.raises(UserError, match="--stop-token 'nope nope'"):
        models.load_all(backends.load("torch"), dataclasses.replace(options, stop_tokens=["nope nope"]))


def test_a_run_gives_its_name_and_a_hub_folder_its_id(tmp_path: Path) -> None:
    for folder, name in (
        ("first/checkpoints/step-0000010", "first"),
        ("models--Org--Model-1B/snapshots/0123abc", "Org/Model-1B"),
        ("mine", "mine"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        assert models._called(tmp_path / folder) == name
    assert models._called("Org/Other") == "Org/Other"


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_are_added_with_weights(backend: str, place: Path) -> None:
    one = place / "one"
    given = [f"{name}={text}" for name, text in (("half", f"{one}:0.5"), ("sum", f"{one}:0.25+{one}:0.25"))]
    base, half, both = models.load_all(backends.load(backend), Options(str(place / "base"), adapters=given))
    alone, _ = backends.load(backend).load.load(place / "base", [(one, 0.5)])
    logits = [
        np.asarray(model(tensor(backend, [[5, 6, 7]])).tolist())
        for model in (base.model, half.model, both.model, alone)
    ]
    assert np.abs(logits[0] - logits[1]).max() > 1e-2
    assert max(np.abs(logits[1] - each).max() for each in logits[2:]) < 1e-4
    assert len({each.digest for each in (base, half, both)}) == 3


def test_an_adapter_is_served_with_its_base_beside_it(place: Path) -> None:
    found = models.check(Options(str(place / "one"), adapters=[f"other={place / 'two'}"]))
    assert found == [("one", [(place / "one", 1.0)]), ("base", []), ("other", [(place / "two", 1.0)])]
    assert models.check(Options(str(place / "base"), name="mine"))[0] == ("mine", [])
    loaded = models.load_all(backends.load("torch"), Options(str(place / "one")))
    assert [(each.name, each.parent) for each in loaded] == [("one", "base"), ("base", None)]


@pytest.mark.parametrize(
    ("adapter", "said"),
    (
        ("{one}", "expected NAME=DIR, such as one="),
        ("base={one}", "model name base: given twice"),
        (" x={one}", "expected 1 to 200 printable characters"),
        ("x={base}", "a model, expected an adapter"),
        ("x=/nowhere", "/nowhere: no such folder"),
        ("x={one}:much", "weight 'much': expected a number"),
    ),
)
def test_a_name_that_is_none_is_refused(adapter: str, said: str, place: Path) -> None:
    adapter = adapter.format(one=place / "one", base=place / "base")
    with pytest.raises(UserError) as refused:
        models.check(Options(str(place / "base"), adapters=[adapter]))
    assert said in str(refused.value)


def test_a_template_of_a_file_and_further_ends(place: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(CHATML.replace("<|im_end|>", "!"))
    options = Options(str(place / "base"), template=str(tmp_path / "t.jinja"), stop_tokens=("7", "<|endoftext|>"))
    (base,) = models.load_all(backends.load("torch"), options)
    assert base.template and base.tokenizer and base.tokenizer.eos_id is not None
    assert base.ends >= {7, base.tokenizer.eos_id}
    with pytest.raises(UserError, match="none of the models has one"):
        models.load_all(backends.load("torch"), Options(str(place / "base"), template_kwargs={"a": 1}))
    with pytest.raises(UserError, match=r"--template .*: No such file"):
        models.load_all(backends.load("torch"), Options(str(place / "base"), template=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("flags", "said"),
    (
        (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines could reach it without a key"),
        (["--host", "192.168.1.2"], "expected --api-key-file"),
        (["--api-key-file", "/nowhere"], "--api-key-file /nowhere: No such file"),
        (["--api-key-file", "{short}"], "a key of 3 characters: expected a key a line, of 8"),
        (["--max-body", "much"], "--max-body much: expected a size"),
        (["--cache-bytes", "1TB"], "--cache-bytes 1TB: expected a size"),
        (["--port", "70000"], "expected 0 to 65535"),
        (["--max-batch", "0"], "expected a positive whole number"),
        (["--host", "no.such.host.invalid", "--api-key-file", "{key}"], "--host no.such.host.invalid --port 8000:"),
        (["--template-kwargs", "[]"], "--template-kwargs"),
        (["--template", "/nowhere"], "--template /nowhere: No such file"),
    ),
)
def test_the_verb_refuses_before_it_loads(
    flags: list[str], said: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    (tmp_path / "short").write_text("abc\n")
    (tmp_path / "key").write_text("# a comment\n\nlong-enough\n")
    (tmp_path / "key").chmod(0o600)
    monkeypatch.setattr(models, "load_all", lambda *_: pytest.fail("loaded"))
    flags = [flag.format(short=tmp_path / "short", key=tmp_path / "key") for flag in flags]
    assert cli.main(["serve", "-m", str(place / "base"), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 + ("warning" in error)


def test_a_port_that_is_taken_is_named(place: Path, capsys: pytest.CaptureFixture) -> None:
    from mlxgpt.common.serve.web import life

    with life.bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert cli.main(["serve", "-m", str(place / "base"), "--port", str(port)]) == 2
    assert f"--port {port}: address already in use; --port takes another" in capsys.readouterr().err


def test_without_the_extra_the_verb_says_what_to_install(place: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("mlxgpt.commands.serve.NEEDS", ("no_such_package",))
    assert cli.main(["serve", "-m", str(place / "base")]) == 2
    assert "no_such_package is not installed: pip install 'mlxgpt[serve]'" in capsys.readouterr().err


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_generate_follows_a_schema_alike_in_both_frameworks(place: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    flags = ["-p", "a", "-p", "a", "-n", "90", "--temperature", "1.5", "--seed", "3", "--json", "--logprobs", "1"]
    made, command = [], []
    for backend in BACKENDS:
        command = ["generate", "-m", str(place / "chats"), *flags, "--json-schema", str(tmp_path / "schema.json")]
        assert cli.main([*command, "--backend", backend]) == 0
        made.append(json.loads(capsys.readouterr().out)["results"])
    found = [json.loads(each["text"]) for each in made[0]]
    assert all(set(each) == {"name", "age"} and 0 <= each["age"] <= 120 for each in found)
    assert found[0] != found[1]
    assert [[each["token_ids"] for each in results] for results in made[:1]] == [
        [each["token_ids"] for each in results] for results in made[1:]
    ]
    assert len(made[0][0]["logprobs"]) == made[0][0]["tokens"]
    (tmp_path / "schema.json").write_text("{")
    assert cli.main(command) == 2
    assert "schema.json: not JSON" in capsys.readouterr().err


# ---- the life of the process


class Server:
    """`mlxgpt serve` as a process."""

    def __init__(self, model: Path, *flags: str, code: str = "") -> None:
        program = f"import sys\nfrom mlxgpt import cli\n{code}\nsys.exit(cli.main(sys.argv[1:]))"
        command = [sys.executable, "-c", program, "serve", "-m", str(model), "--port", "0", *flags]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        assert self.process.stderr
        first = self.process.stderr.readline()
        assert first.startswith("http://"), first + self.process.stderr.read()
        self.url = first.split()[0]

    def ask(self, tokens: int, stream: bool = True) -> Any:
        """An answer as it comes."""
        body = {
            "model": "base",
            "prompt": [5],
            "max_tokens": tokens,
            "stream": stream,
            "seed": 1,
            "logit_bias": {"0": -100},
        }
        headers = {"Content-Type": "application/json"}
        return urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers), timeout=60
        )

    def end(self) -> tuple[int, str]:
        """The exit code, and what was said on stderr since the start."""
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


SLOW = """
import time
from mlxgpt.common.serve.engine import slot
take = slot.Slot.take
slot.Slot.take = lambda self, chosen: (time.sleep(0.02), take(self, chosen))[1]
"""


def test_a_server_that_is_told_to_end_finishes_what_it_began(place: Path) -> None:
    with Server(place / "base", code=SLOW) as server:
        with server.ask(60) as answer:
            assert answer.readline().startswith(b"data: ")
            server.process.send_signal(signal.SIGTERM)
            rest = answer.read().decode()
        assert rest.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in rest
        code, said = server.end()
    assert code == 0, said


def test_what_outlasts_the_grace_is_told(place: Path) -> None:
    with Server(place / "base", "--grace", "0.3", code=SLOW) as server:
        with server.ask(100) as answer:
            answer.readline()
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in answer.read().decode().splitlines() if line][-1]
        assert '"message":"the server is ending"' in last
        code, said = server.end()
    assert code == 0, said


def test_who_still_sends_holds_nothing_up(place: Path) -> None:
    code = "from mlxgpt.common.serve.web import life\nlife.LAST_BYTES = 0.2"
    with Server(place / "base", code=code) as server:
        host = server.url.removeprefix("http://")
        with socket.create_connection(host.split(":")) as client:
            lines = ["GET /health HTTP/1.1", f"Host: {host}", "", "POST /tokenize HTTP/1.1", f"Host: {host}"]
            lines += ["Content-Type: application/json", "Content-Length: 9", "", ""]
            client.sendall("\r\n".join(lines).encode())
            assert client.recv(20).startswith(b"HTTP/1.1 200")
            time.sleep(0.2)  # the second request is read behind the first
            server.process.send_signal(signal.SIGTERM)
            code, said = server.end()
    assert code == 0 and "30 s" not in said, said


@pytest.mark.parametrize("told", (SystemExit(143), KeyboardInterrupt()))
def test_a_thread_that_computes_is_not_outlived(place: Path, monkeypatch: pytest.MonkeyPatch, told: Any) -> None:
    from mlxgpt.common.serve.engine import Engine
    from mlxgpt.common.serve.web import life

    computes, codes = True, []
    monkeypatch.setattr(Engine, "join", lambda *_: not computes)
    monkeypatch.setattr(life.os, "_exit", codes.append)
    monkeypatch.setattr(Engine, "start", lambda _: (_ for _ in ()).throw(told))
    with pytest.raises(SystemExit) if isinstance(told, SystemExit) else contextlib.nullcontext():
        cli.main(["serve", "-m", str(place / "base"), "--port", "0"])
    assert codes == [143 if isinstance(told, SystemExit) else 130]
    computes = False
    life.leave(Engine(backends.load("torch"), list), 0)
    assert len(codes) == 1


def test_a_second_signal_ends_at_once(place: Path) -> None:
    with Server(place / "base", code=SLOW.replace("0.02", "0.5")) as server, server.ask(100) as answer:
        answer.readline()
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)  # signals of one kind that wait are one
        server.process.send_signal(signal.SIGINT)
        code, said = server.end()
    assert code == 130, said
    assert "ending: 1 answer may take 30 s more; Ctrl-C again ends at once\n" in said


def test_a_dead_engine_ends_the_process(place: Path) -> None:
    bug = "from mlxgpt.common.serve.engine import steps\nsteps.Steps._draw = lambda *_: 1 / 0\n"
    with Server(place / "base", code=bug) as server:
        for ask in (
            lambda: server.ask(5, False).read(),
            lambda: urllib.request.urlopen(f"{server.url}/health", timeout=9),
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask()
            refused.value.close()
            assert refused.value.code == 503
        code, said = server.end()
    assert code == 1
    assert "mlxgpt: error: the engine died: ZeroDivisionError" in said
