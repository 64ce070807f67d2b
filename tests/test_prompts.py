"""generate's prompts: in the model's chat template, raw, or in token ids; and the command that finetune ends with."""

import json
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import mlxgpt.generate as mlx_generate  # first: it loads a BLAS before MLX

# isort: split
import pytest
import templates
import transformers
from models import tiny, weights
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from mlxgpt import cli
from mlxgpt.common.folders.model_folder import write_model
from mlxgpt.common.inference.generation import Result
from mlxgpt.common.tokenizers.char import CharTokenizer
from mlxgpt.common.tokenizers.load import load_tokenizer
from mlxgpt.common.train.pretrain import Pretraining

SHORT = ("-n", "6", "--temperature", "0", "--device", "cpu")


def model_of(place: Path, template: str | None, special: list[str], begins: bool = True) -> Path:
    """A random model whose tokenizer puts <s> before a text, also where its template writes one."""
    templates.tokenizer_folder(place / "tokenizer", template, special)
    if begins:
        backend = Backend.from_file(str(place / "tokenizer" / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        backend.save(str(place / "tokenizer" / "tokenizer.json"))
    tokenizer = load_tokenizer(place / "tokenizer")
    config = tiny(family="llama", vocab_size=tokenizer.n_vocab, block_size=96)
    write_model(place / "model", config, weights(config, scale=6.0), tokenizer=tokenizer)
    return place / "model"


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(tmp_path_factory.mktemp("llama3"), *templates.FAMILIES["llama3"][:2])


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without a tokenizer, whose generation_config.json names an end."""
    place = tmp_path_factory.mktemp("bare") / "model"
    config = tiny(family="llama")
    write_model(place, config, weights(config, scale=6.0))
    return place


def ran(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    code = cli.main(["generate", *SHORT, *words])
    return code, *capsys.readouterr()


def results(capsys: pytest.CaptureFixture, *words: str) -> Any:
    code, out, _ = ran(capsys, *words, "--json")
    assert code == 0
    return json.loads(out)


def spelled(ids: list[int]) -> list[str]:
    return ["--prompt-ids", ",".join(map(str, ids))]


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_prompt_is_a_users_message_in_the_models_template(
    llama3: Path, backend: str, capsys: pytest.CaptureFixture
) -> None:
    judge: Any = transformers.AutoTokenizer.from_pretrained(llama3)
    common = ("-m", str(llama3), "--backend", backend)
    for system in ("", "Be brief."):
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "What is it?"}]
        ids = judge.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids.count(judge.bos_token_id) == 1  # by the template; the post-processor would put a second one
        found = results(capsys, *common, "-p", "What is it?", *(["--system", system] if system else []))
        assert found == results(capsys, *common, *spelled(ids)) and found["prompt_tokens"] == len(ids)
    typed = "Say <|eot_id|>"  # a control token that a person types is text
    messages = [{"role": "user", "content": typed}]
    ids = judge.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    assert results(capsys, *common, "-p", typed) == results(capsys, *common, *spelled(ids))
    raw = judge("What is it?").input_ids
    found = results(capsys, *common, "-p", "What is it?", "--raw")
    assert found == results(capsys, *common, *spelled(raw)) and found["prompt_tokens"] == len(raw)


def test_prompts_of_every_kind_stand_in_one_batch(llama3: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "p.txt").write_text("He goes.")
    alone = [["-p", "What is it?"], ["--prompt-file", str(tmp_path / "p.txt")], ["--prompt-ids", "0, 7 8"]]
    expected = [results(capsys, "-m", str(llama3), *words) for words in alone]
    assert expected[2]["prompt_tokens"] == 3
    together = [word for words in reversed(alone) for word in words]
    assert results(capsys, "-m", str(llama3), *together)["results"] == expected


def test_an_answer_ends_where_the_template_ends_it(
    llama3: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where generation_config.json does not name that token, as those of many base models."""
    ends: list[frozenset[int]] = []

    def generated(model: Any, tokenizer: Any, asked: list[Any], *rest: Any) -> list[Result]:
        ends.append(tokenizer.ends)
        return [Result("", [], 1, "eos")]

    monkeypatch.setattr(mlx_generate, "generate", generated)
    end = load_tokenizer(llama3).id_of("<|eot_id|>")
    for words in ([], ["--raw"]):
        assert ran(capsys, "-m", str(llama3), "-p", "What is it?", "--backend", "mlx", *words)[0] == 0
    assert [end in each for each in ends] == [True, False]


def test_token_ids_need_no_tokenizer(bare: Path, capsys: pytest.CaptureFixture) -> None:
    for backend in ("mlx", "torch"):
        words = ("-m", str(bare), "--prompt-ids", "1,2,3", "--backend", backend)
        found = results(capsys, *words)
        assert (found["text"], found["tokens"], found["prompt_tokens"]) == (None, 6, 3)
        code, out, _ = ran(capsys, *words)
        assert (code, out) == (0, ",".join(map(str, found["token_ids"])) + "\n")
        again = ["--prompt-ids", out.strip()]  # what is printed can be given
        assert results(capsys, "-m", str(bare), *again, "--backend", backend)["prompt_tokens"] == 6
        code, out, _ = ran(capsys, *words, "--prompt-ids", "4")
        assert code == 0 and out.startswith(f"--- prompt 1\n{','.join(map(str, found['token_ids']))}\n--- prompt 2\n")
        end = str(found["token_ids"][2])
        stopped = results(capsys, *words, "--stop-token", end)
        assert (stopped["finish_reason"], stopped["tokens"]) == ("eos", found["token_ids"].index(int(end)))


def test_biases_and_penalties_are_flags(bare: Path, capsys: pytest.CaptureFixture) -> None:
    for backend in ("mlx", "torch"):
        words = ("-m", str(bare), "--prompt-ids", "1,2,3", "--backend", backend)
        biased = results(capsys, *words, "--logit-bias", '{"7": 1e4, "9": 9.9e3}', "--presence-penalty", "150")
        assert biased["token_ids"] == [7, 9] + [7] * 4  # 10,000 - 150 is below 9,900 until that has come, too
        biased = results(capsys, *words, "--logit-bias", '{"7": 1e4, "9": 9.9e3}', "--frequency-penalty", "90")
        assert biased["token_ids"] == [7, 7, 9, 7, 9, 7]


def test_log_probabilities_stand_beside_the_ids(bare: Path, capsys: pytest.CaptureFixture) -> None:
    found = [
        results(capsys, "-m", str(bare), "--prompt-ids", "1,2,3", "--backend", backend, "--logprobs", "2")
        for backend in ("mlx", "torch")
    ]
    assert found[0]["token_ids"] == found[1]["token_ids"]
    for one, other in zip(*(each["logprobs"] for each in found), strict=True):
        assert one.keys() == {"token", "logprob", "top"} and one["token"] == other["token"] == one["top"][0][0]
        assert one["logprob"] == one["top"][0][1] == pytest.approx(other["logprob"], abs=1e-5)
        assert [pair[0] for pair in one["top"]] == [pair[0] for pair in other["top"]]
    alone = results(capsys, "-m", str(bare), "--prompt-ids", "1,2,3", "--logprobs", "0")["logprobs"]
    assert [each["top"] for each in alone] == [[]] * 6
    code, out, err = ran(capsys, "-m", str(bare), "--prompt-ids", "1,2,3", "--logprobs", "2")
    assert (code, out, err) == (2, "", "mlxgpt: error: --logprobs 2: is for --json\n")


def test_a_folder_without_tokenizer_ends_where_it_says(
    bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    drawn = results(capsys, "-m", str(bare), "--prompt-ids", "1,2,3")["token_ids"]
    for file in bare.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [79, drawn[0]]}))
    found = results(capsys, "-m", str(tmp_path), "--prompt-ids", "1,2,3")
    assert (found["finish_reason"], found["tokens"]) == ("eos", 0)


def test_what_a_prompt_cannot_be_is_one_line(
    llama3: Path, bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plain = model_of(tmp_path, None, [])
    gemma = model_of(tmp_path / "gemma", *templates.FAMILIES["gemma"][:2])
    for words, message in [
        ((bare, "-p", "a"), f"{bare}: no tokenizer files; expected tokenizer.json or tokenizer.model: "
         f"mlxgpt convert {bare} NEW --tokenizer FILE makes a folder with one; --prompt-ids takes token ids"),
        ((bare, "--prompt-ids", "1", "--stop", "a"), "stop strings need a tokenizer"),
        ((bare, "--prompt-ids", "1", "--stop-token", "</s>"), "--stop-token '</s>': text needs a tokenizer"),
        ((bare, "--prompt-ids", "80"), "token id 80; expected 0 to 79"),
        ((bare, "--prompt-ids", "1,x"), "--prompt-ids '1,x': expected token ids, such as 1,2,3"),
        ((bare, "--prompt-ids", ""), "--prompt-ids '': expected token ids"),
        ((bare, "--prompt-ids", "1", "--logit-bias", '{"80": 1}'), "logit_bias: token id 80; expected 0 to 79"),
        ((bare, "--prompt-ids", "1", "--logit-bias", '{"8": NaN}'), "logit_bias of token 8 = nan: expected a number"),
        ((bare, "--prompt-ids", "1", "--logit-bias", '{"x": 1}'), "--logit-bias: 'x' is no token id; expected a JSON"),
        ((bare, "--prompt-ids", "1", "--logit-bias", '{"08": 1}'), "--logit-bias: '08' is no token id"),
        ((bare, "--prompt-ids", "1", "--logit-bias", '[1]'), """= [1]: expected a JSON object, such as {"42": -100}"""),
        ((bare, "--prompt-ids", "1", "--logit-bias", '{'), "--logit-bias = {: not JSON"),
        ((bare, "--prompt-ids", "1", "--presence-penalty", "nan"), "sample.presence_penalty = nan: expected a number"),
        ((llama3,), "expected --prompt TEXT or --prompt-file FILE, or --prompt-ids IDS"),
        ((llama3, "-p", "a", "--raw", "--system", "b"), "--system: is for a chat template, and --raw leaves it out"),
        ((plain, "-p", "a", "--system", "b"), "--system: is for a chat template, and the model has none"),
        ((llama3, "--prompt-ids", "1", "--system", "b"), "--system: is for a chat template, and token ids have none"),
        ((plain, "-p", "a", "--template-kwargs", '{"a": 1}'), "--template-kwargs: is for a chat template"),
        ((gemma, "-p", "a", "--system", "b"), "prompt 1: "),
    ]:  # fmt: skip
        code, out, err = ran(capsys, "-m", *map(str, words))
        assert (code, out) == (2, "") and message in err and len(err.strip().splitlines()) == 1, err


def test_the_cure_of_a_folder_without_tokenizer_works(
    bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = tmp_path / "t"
    tokenizer.mkdir()
    CharTokenizer("abcdefgh").save(tokenizer)
    _, _, err = ran(capsys, "-m", str(bare), "-p", "ab")
    command = next(part for part in err.replace("; ", ": ").split(": ") if part.startswith("mlxgpt convert"))
    words = shlex.split(command.partition(" makes")[0])[1:]
    assert cli.main([{"NEW": str(tmp_path / "m"), "FILE": str(tokenizer)}.get(word, word) for word in words]) == 0
    assert ran(capsys, "-m", str(tmp_path / "m"), "-p", "ab")[0] == 0


# ---- what finetune ends with

CHAT = [{"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It."}]}] * 8
PLAIN = [{"text": "He goes to the park every day."}] * 8
TUNE = ("--steps", "1", "--device", "cpu", "--set", "train.batch_size=2", "--set", "adapter.rank=2",
        "--set", "sample.max_tokens=0")  # fmt: skip


@pytest.mark.parametrize("rows", ["chat", "plain", "template"])
def test_the_last_line_of_finetune_is_a_command_that_asks_as_training_did(
    rows: str, llama3: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """``template``: one of a file, which the adapter's folder then has to bring."""
    given = {"chat": CHAT, "plain": PLAIN, "template": CHAT}[rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    own = "{% for m in messages %}<|start_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
    (tmp_path / "own.jinja").write_text(own)
    more = ("--set", f"tune.template={tmp_path / 'own.jinja'}") if rows == "template" else ()
    run = str(tmp_path / "run")
    words = ("finetune", "-m", str(llama3), "-d", str(tmp_path / "rows.jsonl"), "-o", run, *TUNE, *more)
    assert cli.main(list(words)) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    tried = f"generate --model {run} --prompt TEXT, or mlxgpt chat --model {run}"
    tried = f"generate --model {run} --raw --prompt TEXT" if rows == "plain" else tried
    assert line.endswith(f"try: mlxgpt {tried}")
    command = shlex.split(tried.partition(",")[0].replace("TEXT", "'What is it?'"))
    found = results(capsys, *command[1:])
    tokenizer = load_tokenizer(llama3)
    chat = (
        "<s><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    form = {"chat": chat, "plain": "<s>{}", "template": "<|start_header_id|>{}<|eot_id|>"}[rows]
    assert found["prompt_tokens"] == len(tokenizer.encode(form.format("What is it?")))


def test_a_pretrained_model_is_tried_on_text_as_it_is(llama3: Path) -> None:
    kind = Pretraining(Namespace())
    for tokenizer, expected in [
        (None, "generate --model r --prompt-ids IDS"),
        (load_tokenizer(llama3), "generate --model r --raw --prompt TEXT"),
        (CharTokenizer("ab"), "generate --model r --prompt TEXT"),
    ]:
        kind.tokenizer = tokenizer
        assert kind.trial(Path("r")) == expected
    assert shlex.split(kind.trial(Path("runs/my books")))[2] == "runs/my books"
    assert shlex.split(kind.again(Path("runs/my books"))) == ["mlxgpt", "train", "--resume", "runs/my books"]
