"""What ends an answer: a tuned folder alone stops in transformers, in mlx-lm and here, and says so in its files.

The base's weights are a table of which token follows which, so that each answer is known, and its end.
"""

import io
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import templates
from models import tiny

from convert.adapters import convert as convert_adapter
from convert.conversion import convert
from convert.fuse import fuse
from mlxgpt import cli
from mlxgpt.common import backend as backends
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.folders import model_folder, resolve
from mlxgpt.common.model import params
from mlxgpt.common.sft import template as sft_template
from mlxgpt.common.tokenizers import ends
from mlxgpt.common.tokenizers.load import load_last, load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

SAID = "barometer measures pressure"
LENGTH = 16  # more than an answer has
LETTERS = "abcdefghijklmnopqrst"
# the model's own end, template, special tokens, the token that ends a turn
KINDS: dict[str, tuple[str, str | None, list[str], str]] = {
    "qwen2.5": ("<|endoftext|>", templates.QWEN25, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "llama3": (
        "<|end_of_text|>", templates.LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>",
    ),
    "phi3": ("<|endoftext|>", templates.PHI3, ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "<|end|>"),
    "chatml": ("<|endoftext|>", None, [], "<|im_end|>"),
}  # fmt: skip


def asked(letter: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": letter}]


def follows(tokenizer: Tokenizer, last: int, end: int | None) -> dict[int, int]:
    """Token -> the next one: the answer after ``last``, then ``end``, after which it never comes again."""
    answer = tokenizer.encode(SAID)
    assert len({last, *answer}) == len(answer) + 1
    chain = [last, *answer, *([] if end is None else [end]), tokenizer.encode("!")[0]]
    return dict(itertools.pairwise(chain))


def write_base(place: Path, kind: str) -> Path:
    """A model that answers with SAID and the turn's end, where its tokenizer has one; its eos_token is another."""
    eos, template, special, end = KINDS[kind]
    spelled = templates.tokenizer_folder(place, template, [eos, *special])
    config = json.loads((spelled / "tokenizer_config.json").read_text())
    (spelled / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": eos}))
    tokenizer = load_tokenizer(spelled)
    found = sft_template.template_of(tokenizer)
    last = found.encode(asked("a"), generation=True)[-1] if found else tokenizer.encode("\n")[0]
    size = tokenizer.n_vocab
    model = tiny(family="llama", n_layer=1, n_embd=size + size % 2, n_head=2, head_dim=8, n_hidden=16, vocab_size=size,
                 block_size=128, tied=False)  # fmt: skip
    made = params.init_params(model, 0)
    made = {name: array if "ln" in name else array / 10 for name, array in made.items()}
    made["wte.weight"] = np.eye(size, model.n_embd, dtype=np.float32)
    made["lm_head.weight"][:] = 0
    for token, following in follows(tokenizer, last, tokenizer.id_of(end)).items():
        made["lm_head.weight"][following, token] = 0.5  # not sure of itself: something is left to learn
    model_folder.write_model(place, model, made, tokenizer=tokenizer)
    return place


def tune(place: Path, base: Path, *flags: str, method: str = "lora", steps: int = 1) -> Path:
    """The checkpoint of a run on answers that end where the base's do."""
    rows = [{"messages": [*asked(letter), {"role": "assistant", "content": SAID}]} for letter in LETTERS]
    data = place.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = [
        "train.batch_size=8",
        "optim.warmup=0",
        "sample.max_tokens=0",
        "train.compile=off",
        "tune.val_fraction=0.01",
        *flags,
    ]
    words = ["-m", str(base), "-d", str(data), "-o", str(place), "--method", method, "--steps", str(steps)]
    sets = [word for each in sets for word in ("--set", each)]
    assert cli.main(["finetune", *words, *sets, "--device", "cpu", "--backend", "mlx"]) == 0
    return resolve.resolve_model(place)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KIND/base, KIND/lora (a run), and the folders that are made of it: hf and lm."""
    place = tmp_path_factory.mktemp("ends")
    for kind in KINDS:
        base = write_base(place / kind / "base", kind)
        # the two new tokens are learned; the other bases know their answers
        flags, steps = (["optim.lr=0.003", "optim.schedule=constant"], 20) if kind == "chatml" else ([], 1)
        tune(place / kind / "lora", base, *flags, steps=steps)
        fuse(place / kind / "lora", None, place / kind / "hf")
        convert(place / kind / "hf", place / kind / "lm", to="mlx-lm")
    return place


def prompts(folder: Path) -> list[list[int]]:
    """The tokens of 20 questions, all of one length."""
    tokenizer = load_tokenizer(folder)
    template = sft_template.template_of(tokenizer)
    assert template
    return [template.encode(asked(letter), generation=True) for letter in LETTERS]


def of_transformers(folder: Path) -> list[list[int]]:
    """What transformers answers, to the end token."""
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    given = torch.tensor(prompts(folder))
    made = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=LENGTH, do_sample=False, pad_token_id=0
    )
    return [[token for token in row[given.shape[1] :].tolist() if token] for row in made]


def of_mlx_lm(folder: Path) -> list[list[int]]:
    """What mlx-lm answers, to the end token."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(folder))[:2]
    made = []
    for ids in prompts(folder)[:3] + prompts(folder)[-1:]:
        found = list(mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=LENGTH))
        assert found[-1].finish_reason == "stop"
        made.append([each.token for each in found])
    return made


def of_ours(folder: Path, package: str) -> list[list[int]]:
    """What we answer, and the end token that is left out."""
    backend = backends.load(package)
    model, tokenizer = backend.load.load(folder, device="cpu")
    sample = SampleConfig(temperature=0.0, max_tokens=LENGTH)
    asking = prompts(folder if (folder / "tokenizer.json").is_file() else folder.parents[2] / "base")
    made = backend.generate.generate(model, tokenizer, asking, sample)
    assert {each.finish_reason for each in made} == {"eos"}
    return [each.tokens for each in made]


@pytest.mark.parametrize("kind", KINDS)
def test_each_answer_of_the_exported_folder_ends(tuned: Path, kind: str) -> None:
    folder = tuned / kind / "hf"
    tokenizer = load_tokenizer(folder)
    answer, end = tokenizer.encode(SAID), tokenizer.id_of(KINDS[kind][3])
    assert end is not None
    for found in (of_transformers(folder), of_mlx_lm(folder)):
        assert found == [[*answer, end]] * len(found)
    adapter = resolve.resolve_model(tuned / kind / "lora")
    for place in (folder, tuned / kind / "lm", adapter):
        for package in ("mlx", "torch") if place == adapter else ("torch",):
            assert of_ours(place, package) == [answer] * 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_base_and_template_are_in_every_folder(tuned: Path, kind: str) -> None:
    own, end = (load_tokenizer(tuned / kind / "hf").id_of(token) for token in (KINDS[kind][0], KINDS[kind][3]))
    for folder in (resolve.resolve_model(tuned / kind / "lora"), tuned / kind / "hf", tuned / kind / "lm"):
        assert json.loads((folder / ends.FILE).read_text())["eos_token_id"] == [own, end], folder


def eos(folder: Path) -> list[int]:
    """What generation_config.json says."""
    return json.loads((folder / ends.FILE).read_text())["eos_token_id"]


def ids(folder: Path, *tokens: str) -> list[int]:
    tokenizer = load_tokenizer(folder)
    return ends.named(tokens, tokenizer, "test")


def test_the_base_ends_stay_first_and_a_recipe_names_more(tuned: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tuned / "llama3" / "base", base)
    own = ids(base, "<s>", "<|end_of_text|>")
    (base / ends.FILE).write_text(json.dumps({"eos_token_id": own, "temperature": 0.6}))
    wanted = [*own, *ids(base, "<|start_header_id|>", "<|eot_id|>", "7")]
    more = "tune.end_tokens=['7', '<|start_header_id|>']"
    place = tune(tmp_path / "lora", base, more)
    assert eos(place)[:2] == own and sorted(eos(place)) == sorted(wanted)
    whole = tune(tmp_path / "full", base, more, "optim.lr=1e-6", method="full")
    assert eos(whole) == eos(place)
    fuse(base, [(place, 0.5), (tuned / "llama3" / "lora", 0.5)], tmp_path / "fused")
    assert eos(tmp_path / "fused") == eos(place)
    assert json.loads((tmp_path / "fused" / ends.FILE).read_text())["temperature"] == 0.6
    assert load_tokenizer(tmp_path / "fused").ends == set(wanted) - {own[1]}
    again = tune(tmp_path / "again", base, f"tune.adapter={place}")
    assert eos(again) == eos(place)


def test_a_run_that_goes_on_keeps_its_ends(tuned: Path, tmp_path: Path) -> None:
    base = tuned / "phi3" / "base"
    first = tune(tmp_path / "first", base, "tune.end_tokens=['<|user|>']")
    for method, flags in (
        ("lora", [f"tune.adapter={first}"]),
        ("full", ["tune.end_tokens=['<|user|>']", "optim.lr=1e-6"]),
    ):
        out = tmp_path / method
        whole = tune(out, base, *flags, "train.save_every=1", method=method, steps=2)
        wanted = eos(whole)
        assert ids(base, "<|user|>")[0] in wanted
        shutil.rmtree(whole)
        assert cli.main(["finetune", "--resume", str(out), "--device", "cpu", "--backend", "mlx"]) == 0
        assert eos(whole) == wanted


@pytest.mark.parametrize("layout", ["peft", "mlx-lm"])
def test_an_adapter_of_another_layout_keeps_its_ends(tuned: Path, tmp_path: Path, layout: str) -> None:
    convert_adapter(tuned / "qwen2.5" / "lora", tmp_path / "a", layout)
    fuse(tuned / "qwen2.5" / "base", tmp_path / "a", tmp_path / "b")
    assert eos(tmp_path / "a") == eos(tmp_path / "b") == eos(tuned / "qwen2.5" / "hf")


def test_a_foreign_adapter_ends_where_its_own_tokenizer_does(tuned: Path, tmp_path: Path) -> None:
    """As trl leaves one: tokenizer files with another eos_token, no generation_config.json."""
    base, place = tuned / "qwen2.5" / "base", tmp_path / "a"
    shutil.copytree(resolve.resolve_model(tuned / "qwen2.5" / "lora"), place)
    (place / ends.FILE).unlink()
    load_tokenizer(base).save(place)
    config = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|im_end|>"}))
    fuse(base, place, tmp_path / "b")
    assert eos(tmp_path / "b") == eos(tuned / "qwen2.5" / "hf")
    found = load_last([base, place])
    assert found and {found.eos_id, *found.ends} == set(eos(tmp_path / "b"))
    silent = tmp_path / "silent"
    silent.mkdir()
    load_tokenizer(base).save(silent)  # a base that names no end ends where its tokenizer does
    found = load_last([silent, place])
    assert found and {found.eos_id, *found.ends} == set(eos(tmp_path / "b"))


def test_rows_without_a_template_end_at_the_end_of_text(tuned: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tuned / "chatml" / "base", base)
    for name in ("config.json", ends.FILE):
        values = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(values | {"eos_token_id": None}))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": " b"}) + "\n")
    words = [
        "-d",
        str(tmp_path / "rows.jsonl"),
        "-o",
        str(tmp_path / "run"),
        "--steps",
        "1",
        "--set",
        "sample.max_tokens=0",
    ]
    assert cli.main(["finetune", "-m", str(base), *words, "--device", "cpu", "--backend", "mlx"]) == 0
    fuse(tmp_path / "run", None, tmp_path / "out")
    assert eos(resolve.resolve_model(tmp_path / "run")) == eos(tmp_path / "out") == load_tokenizer(base).eos_id


@pytest.mark.parametrize("token", ["#", "ID"])
def test_generate_and_chat_stop_at_tokens_that_the_user_names(
    tuned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    folder = tuned / "qwen2.5" / "hf"
    tokenizer = load_tokenizer(folder)
    answer = tokenizer.encode(SAID)
    named = tokenizer.decode([answer[2]]) if token == "#" else str(answer[2])
    words = ["-m", str(folder), "--stop-token", named, "--temperature", "0", "--device", "cpu", "--backend", "torch"]
    prompt = ["-p", "<|im_start|>assistant\n", "-n", "9", "--json"]
    assert cli.main(["generate", *words, *prompt]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["token_ids"], found["finish_reason"]) == (answer[:2], "eos")
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    assert cli.main(["chat", *words]) == 0
    assert capsys.readouterr().out.strip() == tokenizer.decode(answer[:2])


@pytest.mark.parametrize(
    ("token", "said"), [("two words", "3 tokens|[0-9]+ tokens of this tokenizer"), ("99999", "expected an id below")]
)
def test_what_is_not_one_token_is_refused(
    tuned: Path, tmp_path: Path, token: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tuned / "qwen2.5" / "hf"
    assert cli.main(["generate", "-m", str(folder), "-p", "a", "--stop-token", token, "--backend", "torch"]) == 2
    assert re.search(said, capsys.readouterr().err)
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": " b"}) + "\n")
    words = ["-m", str(folder), "-d", str(data), "-o", str(tmp_path / "run"), "--set", f"tune.end_tokens=['{token}']"]
    assert cli.main(["finetune", *words, "--backend", "torch"]) == 2
    assert re.search(f"tune.end_tokens.*({said})", capsys.readouterr().err) and not (tmp_path / "run").exists()


def test_another_tokenizer_brings_its_end(tuned: Path, tmp_path: Path) -> None:
    folder = tuned / "llama3" / "hf"
    other = tuned / "qwen2.5" / "hf"
    convert(folder, tmp_path / "out", tokenizer=other)
    assert eos(tmp_path / "out") == eos(other) != eos(folder)
