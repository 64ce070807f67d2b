"""``train --data``: the recipe that is made for a corpus, its run folder, flags, and the paths of a recipe."""

from pathlib import Path
from typing import Any

import pytest

from mlxgpt import cli
from mlxgpt.arguments import training
from mlxgpt.common import recipes
from mlxgpt.common.config import DataConfig, Recipe
from mlxgpt.common.data import prepare
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import params
from mlxgpt.common.recipes import read_toml
from mlxgpt.common.runs import metrics
from mlxgpt.common.train import made, schedule
from mlxgpt.common.train.pretrain import Pretraining

LINES = [
    f"{who} {verb} the {what} {where}, and nobody {heard} of it until the morning.\n"
    for who in ("Anna", "The miller", "Old Peter", "A stranger", "The queen")
    for verb in ("carried", "hid", "sold", "painted")
    for what in ("clock", "letter", "barrel", "lantern", "ring")
    for where in ("under the bridge", "in the cellar", "by the sea")
    for heard in ("heard", "spoke")
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with ``books/``: three texts of 13 KB each, and a picture."""
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    (work / "books").mkdir(parents=True)
    for number in range(3):
        (work / f"books/{number}.txt").write_text("".join(LINES[number::3]))
    (work / "books/cover.jpg").write_bytes(b"\xff\xd8")
    monkeypatch.chdir(work)
    return work


def begun(*words: str) -> tuple[Recipe, str, Pretraining]:
    """The recipe of ``train WORDS`` before any training, the name of its run, and its kind."""
    parser = cli.Parser(prog="train")
    training.train(parser)
    kind = Pretraining(parser.parse_args(words))
    _, name = kind.read_settings()
    kind.open_model()
    kind.open_source()
    return kind.recipe, name, kind


def error_of(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main([*words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and not Path("runs").exists()
    return said


def test_the_recipe_follows_from_the_corpus_and_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, name, kind = begun("--data", "books/")
    assert name == "books" and recipe.data.source == str(place / "books")
    assert recipe.data.tokenizer == "bpe" and recipe.model.vocab_size <= 512
    tokens, each = kind.source.n_train_tokens, recipe.train.batch_size * recipe.model.block_size
    assert recipe.train.steps == max(100, made._round(30 * tokens / each))
    assert recipe.optim.schedule == "wsd" and recipe.data.sampling == "epoch"
    assert recipe.train.dropout == 0.1  # seen more than four times
    schedule.check_schedule(recipe.optim, recipe.train.steps)
    assert recipe.train.eval_every == recipe.train.save_every
    out = capsys.readouterr().out.splitlines()
    assert len(kind.reasons) <= 4 and out[-len(kind.reasons) :] == list(kind.reasons)
    told = "\n".join(kind.reasons)
    for part in ("recipe for books: ", " bytes in 3 documents; tokenizer: bpe of ", "an entry for 1,000 bytes"):
        assert part in told
    assert f"{recipe.train.steps} steps of 8 x {recipe.model.block_size} tokens" in told
    assert repr(recipe.sample.prompt) in told and "--resume RUN --steps N" in told


def test_samples_begin_as_a_validation_text_does(place: Path) -> None:
    recipe, _, kind = begun("--data", "books")
    assert kind.tokenizer and recipe.sample.prompt
    text = kind.tokenizer.decode(kind.source.text("val", 10**6).tolist())
    assert recipe.sample.prompt in text
    assert begun("--data", "books", "--set", "sample.prompt=Anna")[0].sample.prompt == "Anna"
    assert begun("pydocs", "--data", "books")[0].sample.prompt == recipe.sample.prompt


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("CHAPTER I\n\nIt was a bright cold day in April\n", "It was a bright cold"),
        (
            "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所でニャーニャー泣いていた",
            None,
        ),
        ("1 2 3\n\n--\n", ""),
        ("\ufffdhalf of a character begins this\n", ""),
    ],
)
def test_a_prompt_is_the_beginning_of_a_line(text: str, prompt: str | None) -> None:
    found = made.prompt(text)
    assert found == prompt if prompt is not None else text.startswith(found) and 0 < len(found) <= 40


@pytest.mark.parametrize(
    ("size", "parameters"), [("1m", 1.115e6), ("10m", 10.43e6), ("30m", 30.75e6), ("124m", 123.6e6)]
)
def test_a_size_has_the_parameters_that_it_says(size: str, parameters: float) -> None:
    facts = made.Facts(size=10**9, documents=9)
    recipe = recipes.build(made.sections(DataConfig(), facts, size))
    model = made.dataclasses.replace(recipe.model, vocab_size=recipe.data.vocab_size)
    assert params.count(model) == pytest.approx(parameters, rel=0.01)
    schedule.check_schedule(recipe.optim, recipe.train.steps)
    assert recipe.train.batch_size % (recipe.train.micro_batch_size or 1) == 0


def test_the_sizes_of_the_flag_are_those_there_are() -> None:
    assert tuple(made.SIZES) == training._SIZES


@pytest.mark.parametrize(
    ("size", "entries", "context"),
    [(3000, 512, 32), (40_000, 512, 256), (600_000, 512, 256), (1_100_000, 1024, 256), (10**8, 2048, 256)],
)
def test_vocabulary_and_context_follow_from_the_bytes(size: int, entries: int, context: int) -> None:
    sections = made.sections(DataConfig(), made.Facts(size=size), "1m")
    assert (sections["data"]["vocab_size"], sections["model"]["block_size"]) == (entries, context)


def test_flags_and_settings_are_stronger_than_what_is_made(place: Path) -> None:
    flags = ["--size", "1M", "--lr", "5e-4", "--batch-size", "4", "--epochs", "2"]
    recipe, _, kind = begun("--data", "books", *flags, "--set", "train.dropout=0.3", "--set", "optim.schedule=cosine")
    assert (recipe.optim.lr, recipe.optim.min_lr, recipe.train.batch_size) == (5e-4, 5e-5, 4)
    assert recipe.train.steps == round(2 * kind.source.n_train_tokens / (4 * recipe.model.block_size))
    assert (recipe.train.dropout, recipe.optim.schedule) == (0.3, "cosine")
    assert "--resume" not in "".join(kind.reasons)
    assert begun("--data", "books", "--steps", "7", "--set", "optim.warmup=1")[0].train.steps == 7


def test_flags_of_a_recipe(place: Path) -> None:
    """The last rate keeps its share of the peak; an epoch is each token once, so batches are drawn that way."""
    recipe, name, kind = begun("pydocs", "--data", "books", "--lr", "1e-4", "--epochs", "3", "--batch-size", "2")
    assert name == "books"
    assert (recipe.optim.lr, recipe.optim.min_lr) == (1e-4, 2e-5)
    assert recipe.train.steps == round(3 * kind.source.n_train_tokens / (2 * 128))
    assert recipe.data.sampling == "epoch" and recipe.optim.schedule == "cosine"


def test_files_in_place_of_a_folder(place: Path) -> None:
    recipe, name, kind = begun("--data", "books/0.txt", "books/2.txt")
    assert name == "books" and recipe.data.source == tuple(str(place / f"books/{n}.txt") for n in (0, 2))
    assert recipes.build(made.dataclasses.asdict(recipe)) == recipe  # as a checkpoint and recipe.toml hold it
    both = (place / "books/0.txt").read_bytes() + (place / "books/2.txt").read_bytes()
    assert kind._facts and kind._facts.size == len(both)
    assert begun("--data", "books/1.txt")[1] == "1"
    twice = begun("--data", "books/0.txt", "--data", "books/2.txt")
    assert twice[0].data.source == recipe.data.source


@pytest.mark.parametrize("source", ["shards", "flat"])
def test_what_data_prepare_made_is_trained_on_as_it_is(place: Path, source: str) -> None:
    prepare.prepare(
        prepare.corpora.open_corpus("books"), DataConfig(source="books", vocab_size=300), Path("shards"), None
    )
    if source == "flat":
        Path("flat").mkdir()
        for split in ("train", "val"):
            (Path("flat") / f"{split}.bin").write_bytes(next(Path("shards").glob(f"{split}-*.bin")).read_bytes())
    recipe, name, kind = begun("--data", source)
    assert name == source and recipe.model.vocab_size <= 300
    assert kind._facts and kind._facts.tokens
    assert any(" tokens; tokenizer: " in line for line in kind.reasons)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["books/"], "books/: a folder, not a recipe: mlxgpt train --data books/"),
        (["books"], "mlxgpt train --data books"),
        (["books/0.txt"], "books/0.txt: a file, not a recipe: mlxgpt train --data books/0.txt"),
        (["config/train_shakespeare_char.py"], "mlxgpt train shakespeare-char has the same setting"),
        (["lora.yaml"], "mlxgpt finetune --config lora.yaml"),
        (["old"], "a run: mlxgpt train --resume old continues it"),
        (["model"], "a model: mlxgpt train --data PATH --init-from model"),
        (["--data", "absent/"], "absent/: no such file or folder"),
        (["--data", "tiny.txt"], "1 bytes: too little to train on and to validate data.val_fraction = 0.1 of;"),
        (["--data", "qa.jsonl"], "no key 'text': found 'question', 'answer'; --set data.text_key=KEY names another; "
                                 "rows of questions and answers: mlxgpt finetune --model DIR --data "),
        (["--data", "books", "--set", "data.val_fraction=0.001"], "= 0.001 of; expected 132,000 bytes at least"),
        (["--data", "qa.csv"], "qa.csv: rows, not texts; rows of questions and answers: mlxgpt finetune --model DIR"),
        (["my books"], "mlxgpt train --data 'my books'"),
        (["--data", "books", "--steps", "1", "--set", "train.steps=2"], "--steps and --set train.steps: expected one"),
        (["--data", "books/cover.jpg"], "cannot tell what .jpg holds"),
        (["--data", "books", "pydocs"], "expected the recipe first: mlxgpt train pydocs --data PATH"),
        (["--size", "10m"], "expected --data, no RECIPE"),
        (["pydocs", "--size", "10m"], "expected --data, no RECIPE"),
        (["--data", "books", "--init-from", "x", "--size", "10m"], "expected one of the two"),
        (["--data", "books", "--size", "7b"], "'7b' (choose from"),
        (["--data", "books", "--lr", "1", "--set", "optim.lr=2"], "--lr and --set optim.lr: expected one of them"),
        (["--data", "books", "--epochs", "1", "--steps", "2"], "--epochs 1 and --steps: expected one of them"),
        (["--data", "books", "--lr", "0"], "--lr: '0': expected a positive number"),
        (["--resume", "x", "--lr", "1e-3"], "--lr 0.001: not with --resume"),
        (["--resume", "x", "--size", "1m"], "--size 1m: not with --resume"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_with_the_cure(
    place: Path, words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("tiny.txt").write_text("x")
    Path("qa.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    Path("qa.csv").write_text("question,answer\na,b\n")
    Path("my books").mkdir()
    Path("lora.yaml").write_text("model: x\n")
    Path("config").mkdir()
    Path("config/train_shakespeare_char.py").write_text("max_iters = 5\n")
    for folder, file in (("old", "recipe.toml"), ("model", "config.json")):
        Path(folder).mkdir()
        Path(folder, file).touch()
    assert part in error_of("train", *words, "--backend", "mlx", capsys=capsys)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.source", "../books"),
        ("data.source", ["../books/0.txt"]),
        ("data.tokenizer", "tok"),
        ("tune.source", "tok"),
    ],
)
def test_a_recipes_paths_are_relative_to_it(place: Path, key: str, value: Any) -> None:
    folder = place / "mine"
    (folder / "tok").mkdir(parents=True)
    section, _, name = key.partition(".")
    (folder / "r.toml").write_text(f"[{section}]\n{name} = {value if isinstance(value, list) else repr(value)}\n")
    found = recipes.read(Path("mine/r.toml"), pytest.fail)[section][name]
    wanted = [value] if isinstance(value, str) else value
    assert ([found] if isinstance(found, str) else found) == [str((folder / each).resolve()) for each in wanted]


def test_what_is_not_beside_a_recipe_is_taken_from_the_working_directory_and_said(place: Path) -> None:
    """As recipes were read before; names, hub ids and shipped recipes stay as they are."""
    (place / "mine").mkdir()
    recipe = place / "mine/r.toml"
    recipe.write_text('[data]\nsource = "books"\ntokenizer = "char"\n[tune]\nmodel = "Qwen/Qwen3-0.6B"\n')
    said: list[str] = []
    read = recipes.read(recipe, said.append)
    assert read == read_toml(recipe)
    assert len(said) == 1 and "data.source = 'books': not beside the recipe" in said[0]
    (place / "mine/books").mkdir()
    (place / "mine/char").mkdir()  # a word stays a word
    assert recipes.read(recipe, pytest.fail)["data"] == {"source": str(place / "mine/books"), "tokenizer": "char"}
    (place / "openwebtext").mkdir()
    assert recipes.read(recipes.find("gpt2-124m"), pytest.fail) == read_toml(recipes.find("gpt2-124m"))


def test_settings_are_relative_to_the_working_directory(place: Path) -> None:
    (place / "mine/books").mkdir(parents=True)
    (place / "mine/books/0.txt").write_text("other text\n" * 300)
    (place / "mine/r.toml").write_text('[data]\nsource = "books"\n[model]\nblock_size = 32\n')
    assert begun("mine/r.toml")[0].data.source == str(place / "mine/books")
    recipe, name, _ = begun("mine/r.toml", "--set", "data.source=books")
    assert (recipe.data.source, name) == (str(place / "books"), "books")


def test_the_run_holds_a_recipe_with_its_reasons_which_trains_the_same_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--set", "model.n_layer=1", "--set", "sample.max_tokens=4", "--backend", "torch"]
    assert cli.main(["train", "--data", "books", *small, "--steps", "6"]) == 0
    lines = Path("runs/books/recipe.toml").read_text().splitlines()
    assert lines[0].startswith("# recipe for books: ") and lines[3].startswith("# longer later")
    assert cli.main(["train", "runs/books/recipe.toml", "--out", "again", "--backend", "torch"]) == 0
    assert cli.main(["train", "--data", "books", *small, "--stop-after", "1"]) == 0
    assert Path("runs/books-2").is_dir()
    first, again = (
        [line["loss"] for line in metrics.read_lines(Path(run) / metrics.FILE)] for run in ("runs/books", "again")
    )
    assert first == again and len(first) > 6
    assert cli.main(["train", "--resume", "runs/books", "--steps", "9", "--backend", "torch"]) == 0
    assert Path("runs/books/recipe.toml").read_text().splitlines()[0] == lines[0]
    capsys.readouterr()


def test_epochs_make_a_run_longer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--set", "model.n_layer=1", "--set", "sample.max_tokens=0", "--backend", "torch"]
    assert cli.main(["train", "--data", "books", *small, "--epochs", "3", "--stop-after", "1"]) == 0
    stored = recipes.build(read_toml(Path("runs/books/recipe.toml")))
    assert (
        cli.main(["train", "--resume", "runs/books", "--epochs", "6", "--stop-after", "2", "--backend", "torch"]) == 0
    )
    longer = recipes.build(read_toml(Path("runs/books/recipe.toml")))
    assert abs(longer.train.steps - 2 * stored.train.steps) <= 1
    capsys.readouterr()


def test_a_run_whose_data_moved_says_how_to_go_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--set", "model.n_layer=1", "--set", "sample.max_tokens=0", "--backend", "torch"]
    assert cli.main(["train", "--data", "books", *small, "--stop-after", "1"]) == 0
    (place / "books").rename(place / "moved")
    capsys.readouterr()
    resume = ["train", "--resume", "runs/books", "--stop-after", "2", "--backend", "torch"]
    assert cli.main(resume) == 2
    assert f"its data is not here: {place / 'books'}: no such file" in capsys.readouterr().err
    assert cli.main([*resume, "--data", "moved"]) == 0
    capsys.readouterr()


def test_a_corpus_is_measured_without_being_tokenized(place: Path) -> None:
    facts = made.measure(DataConfig(source="books"))
    assert facts == made.Facts(sum(path.stat().st_size for path in place.glob("books/*.txt")), 3, 3)
    with pytest.raises(UserError, match="absent"):
        made.measure(DataConfig(source="absent.bin"))
