"""What stands before a text on every path: eval, rows, labels, shards and checkpoints, against AutoTokenizer.

The right values are transformers' (ids and losses) and mlx-lm's (rows of text and completions).
"""

import json
import os
from pathlib import Path
from typing import Any

import mlxgpt.generate as mlx_generate  # first: it loads a BLAS before MLX

# isort: split
import mlx_lm.tokenizer_utils
import mlx_lm.tuner.datasets
import numpy as np
import pytest
import templates
import tokenizers
import torch
import transformers
import vocabularies
from models import tiny, weights
from tokenizers import processors

from mlxgpt import cli
from mlxgpt.common.config import DataConfig, ModelConfig, TrainConfig, TuneConfig
from mlxgpt.common.data import prepare, shards, token_source
from mlxgpt.common.data.corpus import open_corpus
from mlxgpt.common.evaluate.text import open_text
from mlxgpt.common.folders.model_folder import write_model
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.tokenizers import beginning, separator
from mlxgpt.common.tokenizers.load import from_files, load_tokenizer, other_class, train_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

# Karpathy's stories260K.bin and tok512.bin, where the variable names a folder with them
STORIES = Path(os.environ.get("MLXGPT_STORIES260K", "stories260K"))
TEXT = "The device that measures atmospheric pressure is a barometer. He goes to the park every day. "
DOCUMENTS = [f"He goes to the park every day, {n} of them.\n" * 3 for n in range(40)]
# special tokens, what stands before a text, what after it, the template
SHAPES: dict[str, tuple[list[str], list[str], list[str], str | None]] = {
    "gpt2": ([], [], [], None),
    "qwen": (["<|im_start|>", "<|im_end|>"], [], [], templates.QWEN25),
    "llama2": ([], ["<s>"], [], None),
    "llama3": (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], ["<s>"], [], templates.LLAMA3),
    "gemma": (["<start_of_turn>", "<end_of_turn>"], ["<s>"], [], templates.GEMMA),
    "glm": (["<gmask>"], ["<gmask>", "<s>"], [], None),
    "adds eos": ([], ["<s>"], ["</s>"], None),
}


def folder_of(place: Path, shape: str) -> Path:
    """A tokenizer folder whose post-processor puts these tokens before and after a text."""
    special, before, after, template = SHAPES[shape]
    templates.tokenizer_folder(place, template, special)
    if before:
        backend = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json"))
        around = [(token, backend.token_to_id(token)) for token in {*before, *after}]
        single = " ".join([*before, "$A", *after])
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
        backend.save(str(place / "tokenizer.json"))
    return place


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer, Any]:
    """A folder, its tokenizer here and in transformers."""
    place = folder_of(tmp_path_factory.mktemp("shape"), request.param)
    return place, load_tokenizer(place), transformers.AutoTokenizer.from_pretrained(place)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with Llama's kind of tokenizer."""
    return model_of(tmp_path_factory.mktemp("llama"), "llama2")


def model_of(place: Path, shape: str) -> Path:
    tokenizer = load_tokenizer(folder_of(place / "tokenizer", shape))
    config = tiny(family="llama", vocab_size=tokenizer.n_vocab, block_size=64)
    write_model(place / "model", config, weights(config, scale=6.0), tokenizer=tokenizer)
    return place / "model"


def judged(folder: Path, text: str, put: int = 0) -> tuple[float, int]:
    """transformers' loss of a text without the first ``put`` tokens, and how many of its tokens that scores."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    labels = ids.clone()
    labels[:, :put] = -100
    with torch.no_grad():
        return model(ids, labels=labels).loss.item(), int((labels[:, 1:] >= 0).sum())


def evaluated(folder: Path, data: Path, capsys: pytest.CaptureFixture, *more: str) -> dict[str, Any]:
    code = cli.main(["eval", "-m", str(folder), "-d", str(data), "--json", "--device", "cpu", *more])
    assert code == 0
    return json.loads(capsys.readouterr().out)


# ---- the one function


def test_a_text_begins_and_ends_as_autotokenizer_has_it(shape: tuple[Path, Tokenizer, Any]) -> None:
    _, tokenizer, judge = shape
    for text in (TEXT, " a", ""):
        ids = judge(text).input_ids
        assert beginning.wrap(tokenizer, tokenizer.encode(text)).tolist() == ids
        assert beginning.start(tokenizer, text) == ids[: len(ids) - len(tokenizer.after)]
    cut = beginning.wrap(tokenizer, tokenizer.encode(TEXT), 9)
    assert cut.tolist() == judge(TEXT, truncation=True, max_length=9).input_ids and len(cut) == 9


def test_nothing_is_put_twice(shape: tuple[Path, Tokenizer, Any]) -> None:
    tokenizer = shape[1]
    written = tokenizer.decode(tokenizer.before) + "He goes."  # the text itself begins with BOS
    assert beginning.start(tokenizer, written) == [*tokenizer.before, *tokenizer.encode("He goes.")]
    assert beginning.begin(tokenizer, beginning.begin(tokenizer, [7, 8])).tolist() == [*tokenizer.before, 7, 8]
    ended = beginning.end(tokenizer, np.array([7], np.int32))
    assert ended.tolist() == [7, tokenizer.eos_id] and beginning.end(tokenizer, ended).tolist() == ended.tolist()


# ---- eval


@pytest.mark.parametrize("name", ["llama2", "gemma", "gpt2", "adds eos", "glm"])
def test_eval_gives_the_loss_of_transformers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = model_of(tmp_path, name)
    (tmp_path / "t.txt").write_text(TEXT)
    tokenizer = load_tokenizer(folder)
    expected, count = judged(folder, TEXT, len(tokenizer.before))
    for backend in ("mlx", "torch"):
        found = evaluated(folder, tmp_path / "t.txt", capsys, "--backend", backend)
        assert (found["tokens"], found["begins_with"]) == (count, tokenizer.before)
        assert found["loss"] == pytest.approx(expected, abs=1e-5)
        lost = 0 if tokenizer.before else len(tokenizer.decode(tokenizer.encode(TEXT)[:1]).encode())
        assert found["bytes"] == len(TEXT.encode()) - lost
    assert cli.main(["eval", "-m", str(folder), "-d", str(tmp_path / "t.txt"), "--device", "cpu"]) == 0
    assert f"begins with    {beginning.shown(tokenizer, tokenizer.before)}\n" in capsys.readouterr().out


def test_documents_are_scored_each_from_its_beginning(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    texts = [TEXT, "<s>He goes.", TEXT * 4, "It"]  # one begins with BOS itself, one is longer than the context
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    apart = [
        (evaluated(llama, tmp_path / f"{n}.txt", capsys)) for n in range(4) if write(tmp_path / f"{n}.txt", texts[n])
    ]
    found = evaluated(llama, path, capsys)
    assert found["tokens"] == sum(each["tokens"] for each in apart)
    assert found["bytes"] == sum(len(text.encode()) for text in texts) - len("<s>")
    expected = sum(each["loss"] * each["tokens"] for each in apart) / found["tokens"]
    assert found["loss"] == pytest.approx(expected, abs=1e-6)
    plain, _ = judged(llama, "He goes.")
    assert apart[1]["loss"] == pytest.approx(plain, abs=1e-5)


def write(path: Path, text: str) -> bool:
    return path.write_text(text) >= 0


def test_documents_of_a_model_whose_texts_begin_with_nothing_stay_one_stream(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path / "t", "gpt2"))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "He goes."}\n{"text": "It is."}\n')
    first, second, eos = tokenizer.encode("He goes."), tokenizer.encode("It is."), tokenizer.eos_id
    text = open_text(str(path), tokenizer, "text", "val")
    assert text.tokens[:].tolist() == [*first, eos, *second] and text.starts == (0,)
    assert text.size == 14 - len(tokenizer.decode(first[:1]))


def test_a_first_token_within_a_character_counts_its_bytes(tmp_path: Path) -> None:
    tokenizer = train_tokenizer("bpe", ["abc"], 257)  # bytes alone
    (tmp_path / "t.txt").write_text("\u65e5b")
    assert open_text(str(tmp_path / "t.txt"), tokenizer, "text", "val").size == 3


@pytest.mark.skipif(not STORIES.is_dir(), reason="stories260K is not here")
def test_eval_of_stories260k_gives_the_loss_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, tokens = str(STORIES / "stories260K.bin"), str(STORIES / "tok512.bin")
    assert cli.main(["convert", model, str(tmp_path / "m"), "--tokenizer", tokens]) == 0
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    (tmp_path / "t.txt").write_text(story)
    capsys.readouterr()
    for backend in ("mlx", "torch"):
        found = evaluated(tmp_path / "m", tmp_path / "t.txt", capsys, "--backend", backend)
        assert found["loss"] == pytest.approx(judged(tmp_path / "m", story)[0], abs=1e-4)
        assert found["begins_with"] == [1] and found["begins_with_text"] == "<s>" and found["loss"] < 1.2


# ---- rows

ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": TEXT}, {"text": "It is."}],
    "completion": [{"prompt": "What is it?", "completion": "A barometer."}] * 2,
    "chat": [{"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}]}] * 2,
}


def examples(tokenizer: Tokenizer, place: Path, rows: list[dict[str, Any]], **tune: Any) -> sft_source.SftSource:
    (place / "rows").mkdir(exist_ok=True)
    for name in ("train", "valid"):
        (place / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny(family="llama", vocab_size=tokenizer.n_vocab + 2, block_size=128)
    settings = TuneConfig(source=str(place / "rows"), **tune)
    return sft_source.open_source(settings, TrainConfig(), tokenizer, config, lambda line: None)


@pytest.mark.parametrize("form", ROWS)
def test_rows_are_those_of_mlx_lm(form: str, shape: tuple[Path, Tokenizer, Any], tmp_path: Path) -> None:
    folder, tokenizer, judge = shape
    if form == "chat" and not tokenizer.templates:
        pytest.skip("ChatML is added here; mlx-lm refuses")
    source = examples(tokenizer, tmp_path, ROWS[form])
    if form != "completion" or tokenizer.templates:
        peer: Any = mlx_lm.tokenizer_utils.load(folder)
        dataset = mlx_lm.tuner.datasets.create_dataset(ROWS[form], peer, None)
        expected = [dataset.process(row)[0] for row in ROWS[form]]
    else:  # mlx-lm needs a template
        expected = [judge(row["prompt"] + row["completion"]).input_ids for row in ROWS[form]]
        expected = [ids if ids[-1] == judge.eos_token_id else [*ids, judge.eos_token_id] for ids in expected]
    found = [[*row.tokens.tolist(), int(row.targets[-1])] for row in source.examples["train"]]
    assert found == expected
    begun = found[0][: len(tokenizer.before)] == tokenizer.before
    assert source.describe()["begins_with"] == (tokenizer.before if begun else [])


def test_no_token_that_is_put_before_a_text_is_trained(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path / "t", "glm"))
    (row, _) = examples(tokenizer, tmp_path, ROWS["text"]).examples["train"]
    assert row.weights.tolist() == [0.0] + [1.0] * (len(row) - 1)
    (row, _) = examples(tokenizer, tmp_path, ROWS["completion"], train_on_prompt=True).examples["train"]
    assert row.weights.tolist() == [0.0] + [1.0] * (len(row) - 1)
    (row, _) = examples(tokenizer, tmp_path, ROWS["completion"]).examples["train"]
    prompt = len(tokenizer.before) + len(tokenizer.encode("What is it?"))
    assert int(np.argmax(row.weights)) == prompt - 1


@pytest.mark.parametrize("name", ["gpt2", "llama2", "adds eos"])
def test_labels_are_predicted_from_the_text_as_autotokenizer_gives_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "t", name)
    tokenizer, judge = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    rows = [{"text": TEXT, "label": "a"}, {"text": "It is.", "label": "b"}]
    made = examples(tokenizer, tmp_path, rows, task="classify", block_size=12, overflow="truncate").examples["train"]
    expected = [judge(row["text"], truncation=True, max_length=12).input_ids for row in rows]
    assert [each.tokens.tolist() for each in made] == expected
    config = tiny(family="llama", vocab_size=tokenizer.n_vocab, block_size=12, labels=("a", "b"))
    write_model(tmp_path / "m", config, weights(config), tokenizer=tokenizer)
    seen: list[list[int]] = []

    def classified(model: Any, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        seen.extend(row[:n].tolist() for row, n in zip(tokens, lengths, strict=True))
        return np.zeros((len(tokens), 2))

    monkeypatch.setattr(mlx_generate, "classify", classified)
    words = [word for row in rows for word in ("--text", row["text"])]
    assert cli.main(["classify", "-m", str(tmp_path / "m"), *words, "--backend", "mlx", "--device", "cpu"]) == 0
    assert sorted(seen) == sorted(expected)


# ---- shards and checkpoints


def prepared(place: Path, tokenizer: Tokenizer, documents: list[str]) -> tuple[dict[str, Any], list[int]]:
    """The index of shards, and the tokens of both splits."""
    source = place.parent / f"{place.name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    prepare.prepare(open_corpus(str(source), "text"), DataConfig(), place, tokenizer, lambda line: None)
    index = shards.read_index(place)
    return index, [i for name in ("train", "val") for i in shards.open_split(place, index, name)[:].tolist()]


def test_every_document_in_shards_begins_and_ends(shape: tuple[Path, Tokenizer, Any], tmp_path: Path) -> None:
    _, tokenizer, judge = shape
    documents = [DOCUMENTS[0], tokenizer.decode(tokenizer.before) + DOCUMENTS[1], DOCUMENTS[2]]
    index, tokens = prepared(tmp_path / "s", tokenizer, documents)
    made = [[*tokenizer.before, *tokenizer.encode(text), tokenizer.eos_id] for text in DOCUMENTS[:3]]
    assert index["begins_with"] == tokenizer.before and judge(DOCUMENTS[0]).input_ids in (made[0], made[0][:-1])
    assert sorted(split(tokens, tokenizer.eos_id)) == sorted(made)
    assert index["splits"]["train"]["bytes"] + index["splits"]["val"]["bytes"] == sum(map(len, documents))


def split(tokens: list[int], end: int | None) -> list[list[int]]:
    made: list[list[int]] = [[]]
    for token in tokens:
        made[-1].append(token)
        made += [[]] * (token == end)
        made[-1] = list(made[-1])
    return made[:-1]


def test_the_cache_tells_beginnings_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is the same: a tokenizer.model's setting alone says that <s> is put before a text."""
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    tokenizer, found = train_tokenizer("sp-bpe", DOCUMENTS, 300), {}
    for name, settings in {
        "nothing": {"add_bos_token": False},
        "bos": {"add_bos_token": True},
        "separator": {"add_bos_token": True, "bos_token": "</s>"},
    }.items():
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        path = tmp_path / name / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        data = DataConfig(source=str(tmp_path / "d.jsonl"), tokenizer=str(tmp_path / name))
        found[name] = prepare.cached(data, lambda line: None)
    assert found["nothing"] == found["separator"] != found["bos"]
    assert shards.read_index(found["bos"])["begins_with"] == [1]
    assert shards.read_index(found["nothing"])["begins_with"] == []


TRAINED = ("bpe", "sp-bpe", "sp-unigram")


@pytest.mark.parametrize("kind", TRAINED)
def test_a_model_of_documents_says_that_its_texts_begin_with_the_separator(kind: str, tmp_path: Path) -> None:
    """In transformers and mlx-lm too; ids, digest and shards stay."""
    plain = train_tokenizer(kind, DOCUMENTS, 300)
    index, _ = prepared(tmp_path / "s", plain, DOCUMENTS)
    data = DataConfig(source=str(tmp_path / "s"))
    source, tokenizer = token_source.open_data(data, 16, TrainConfig(batch_size=2), say=lambda line: None)
    assert tokenizer and source.begins_with == index["begins_with"] == []
    write_model(tmp_path / "m", *fresh(tokenizer), tokenizer=tokenizer)
    judge: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    peer = mlx_lm.tokenizer_utils.load(tmp_path / "m")
    again = load_tokenizer(tmp_path / "m")
    for text in (TEXT, "", "a"):
        expected = [plain.eos_id, *plain.encode(text)]
        assert judge(text).input_ids == peer.encode(text) == beginning.start(again, text) == expected
    assert judge.bos_token_id == plain.eos_id and again.digest == plain.digest
    # a corpus tokenized with the checkpoint's tokenizer gives the stream that it was trained on
    assert prepared(tmp_path / "again", again, DOCUMENTS)[1] == prepared(tmp_path / "first", plain, DOCUMENTS)[1]


def fresh(tokenizer: Tokenizer) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    config = tiny(family="llama", vocab_size=tokenizer.n_vocab)
    return config, weights(config)


def test_a_single_document_has_no_separator(tmp_path: Path) -> None:
    plain = train_tokenizer("bpe", DOCUMENTS, 300)
    prepared(tmp_path / "s", plain, ["".join(DOCUMENTS)])
    data = DataConfig(source=str(tmp_path / "s"))
    _, tokenizer = token_source.open_data(data, 16, TrainConfig(batch_size=2), say=lambda line: None)
    assert tokenizer and tokenizer.before == [] and tokenizer.files == plain.files


def test_a_flat_file_with_separators_is_of_documents(tmp_path: Path) -> None:
    plain = train_tokenizer("bpe", DOCUMENTS, 300)
    plain.save((tmp_path / "tokenizer").mkdir() or tmp_path / "tokenizer")
    ids = [plain.encode(text) for text in DOCUMENTS]
    for name, between, before in (("a.bin", [plain.eos_id], [plain.eos_id]), ("b.bin", [], [])):
        np.array([i for each in ids for i in [*each, *between]], "<u2").tofile(tmp_path / name)
        data = DataConfig(source=str(tmp_path / name))
        _, tokenizer = token_source.open_data(data, 16, TrainConfig(batch_size=2), say=lambda line: None)
        assert tokenizer and tokenizer.before == before


def test_shards_without_bos_are_named(tmp_path: Path) -> None:
    """Those of an earlier version: read as they are, and said."""
    tokenizer = load_tokenizer(folder_of(tmp_path / "t", "llama2"))
    index, _ = prepared(tmp_path / "s", tokenizer, DOCUMENTS)
    lines: list[str] = []
    data = DataConfig(source=str(tmp_path / "s"))
    _, found = token_source.open_data(data, 16, TrainConfig(batch_size=2), say=lines.append)
    assert found and found.before == [0] and not any("begin with" in line for line in lines)
    shards.write_index(tmp_path / "s", {key: index[key] for key in index if key not in ("begins_with", "sha256")})
    token_source.open_data(data, 16, TrainConfig(batch_size=2), say=lines.append)
    (line,) = [line for line in lines if "begin with" in line]
    assert f"documents in {tmp_path / 's'} begin with nothing, where their tokenizer has <s> (0)" in line


@pytest.mark.parametrize("held", [None, processors.ByteLevel(trim_offsets=False)])
@pytest.mark.parametrize("token", ["<|endoftext|>", '"\\\u00e9"'])
def test_a_separator_is_taken_out_of_tokenizer_json_byte_for_byte(held: Any, token: str) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"post_processor": 0, token: 1, "a": 2}, []))
    if held:
        backend.post_processor = held
    backend.add_special_tokens([token])
    for pretty in (True, False):
        data = backend.to_str(pretty=pretty).encode()
        changed = separator.put(data, token, 1)
        assert separator.taken_out(changed) == data == separator.taken_out(data) and changed != data
        assert tokenizers.Tokenizer.from_buffer(changed).encode("a").ids == [1, 2]
        other = changed.replace(b'"type_id": 1', b'"type_id": 2')  # somebody else's post-processor
        assert separator.taken_out(other) == other


def test_data_inspect_shows_what_texts_begin_with(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder_of(tmp_path / "t", "llama2")
    prepared(tmp_path / "s", load_tokenizer(tmp_path / "t"), DOCUMENTS)
    corpus, model = str(tmp_path / "s.jsonl"), str(model_of(tmp_path, "gemma"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["completion"] * 3))
    for words in (
        [corpus, "--tokenizer", str(tmp_path / "t")],
        [str(tmp_path / "s")],
        [str(tmp_path / "rows.jsonl"), "--model", model, "--set", "tune.block_size=64"],
    ):
        assert cli.main(["data", "inspect", *words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["begins_with"], found["begins_with_text"]) == ([0], "<s>")
        assert cli.main(["data", "inspect", *words]) == 0
        assert "<s> (0)" in capsys.readouterr().out


@pytest.mark.parametrize(("family", "refused"), [("qwen2", "Qwen2Tokenizer"), ("qwen3", None), ("phi3", None)])
def test_a_family_that_reads_a_trained_tokenizer_otherwise_is_seen(family: str, refused: str | None) -> None:
    for kind in ("bpe", "sp-bpe"):
        assert other_class(train_tokenizer(kind, [TEXT] * 9, 300), family) == refused


def test_a_prefix_space_that_a_family_drops_is_seen() -> None:
    made = vocabularies.sentencepiece_model(False, True)
    files = {"tokenizer.model": made, "tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizer"}'}
    tokenizer = from_files(files, Path("."))
    assert other_class(tokenizer, "llama") is None and other_class(tokenizer, "phi3") == "TokenizersBackend"
