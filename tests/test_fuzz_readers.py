"""Damaged files are read or refused in one line: some hundred of each kind, and what longer runs once found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz_damage import typed
from fuzz_readers import LLAMA, READERS, TEXT, Fuzzer, files_of, model, written

from convert import open_model
from convert.formats.gguf import model as gguf
from convert.formats.gguf import names as gguf_names
from convert.formats.gguf.file import Value, read_gguf, write_gguf
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.folders.tensors import read_header, write_tensors
from mlxgpt.common.model import families
from mlxgpt.common.tokenizers.load import load_tokenizer, train_tokenizer


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_read_or_refused(reader: str, tmp_path: Path) -> None:
    fuzzer = Fuzzer(reader, tmp_path)
    assert not [found for number in range(300) if (found := fuzzer.one(0, number))]


def test_a_reader_that_raises_hangs_or_takes_memory_is_found(tmp_path: Path) -> None:
    fuzzer = Fuzzer("safetensors", tmp_path)

    def fails(path: Path) -> None:
        raise KeyError("a")

    def takes(path: Path) -> None:
        np.ones(1 << 27)

    def says(path: Path) -> None:
        raise UserError("two\nlines")

    cases = [(fails, "KeyError at"), (says, "more than one line")]
    if Path("/proc/self/statm").exists():  # elsewhere no limit on memory is enforced
        cases.append((takes, "MemoryError at"))
    for read, expected in cases:
        fuzzer.read = read
        assert (fuzzer.one(0, 0) or "").removeprefix("_Array").startswith(expected)


def test_most_damage_is_refused(tmp_path: Path) -> None:
    """The faults are not so hard that nothing gets past the first check, nor so soft that all is read."""
    fuzzer = Fuzzer("safetensors", tmp_path)
    outcomes = []

    def read(path: Path) -> None:
        try:
            read_header(path)
        except UserError as error:
            outcomes.append(str(error).split(": ")[1][:12])
            raise
        outcomes.append("read")

    fuzzer.read = read
    for number in range(300):
        fuzzer.one(0, number)
    assert 0 < outcomes.count("read") < 200
    assert len(set(outcomes)) > 6


def refused(call: Any, *args: Any) -> str:
    with pytest.raises(UserError) as raised:
        call(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("layers", [2**31, 2**70])
def test_a_config_of_endless_layers(layers: int) -> None:
    values = families.config_to_hf(LLAMA) | {"num_hidden_layers": layers}
    del values["rope_parameters"]
    assert "num_hidden_layers" in refused(families.config_from_hf, values)


def test_an_index_that_names_what_is_no_file_name(tmp_path: Path) -> None:
    place = written("hf", LLAMA, tmp_path, max_shard=60_000)
    path = place / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("a\nb", "a\0b"):
        index["weight_map"]["lm_head.weight"] = name
        path.write_text(json.dumps(index))
        assert "weight_map names" in refused(model_folder.find_tensors, place)


@pytest.mark.parametrize("metadata", ["[]", "0", "false", '""'])
def test_safetensors_metadata_that_is_no_table(metadata: str, tmp_path: Path) -> None:
    head = f'{{"__metadata__":{metadata}}}'.encode()
    (tmp_path / "a.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    assert "__metadata__ in the header: expected strings" in refused(read_header, tmp_path / "a.safetensors")


def test_a_tensor_name_of_two_lines(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"a\nb": np.ones(3, np.float32)})
    assert "tensor name 'a\\nb'" in refused(read_header, tmp_path / "a.safetensors")
    write_gguf(tmp_path / "a.gguf", {"a\nb": Value("u32", 1)}, {}, lambda name: iter([]))
    assert "metadata key 'a\\nb'" in refused(gguf.read, tmp_path / "a.gguf")


@pytest.mark.parametrize("where", ["config.json", "model.safetensors", "mlxgpt.config"])
def test_half_a_character_that_no_file_could_hold(where: str, tmp_path: Path) -> None:
    place = written("hf", LLAMA, tmp_path)
    if where == "config.json":
        (place / where).write_text((place / where).read_text().replace('"model_type"', '"x": "\\ud800", "model_type"'))
        assert "not JSON: 'utf-8' codec can't encode" in refused(open_model, place)
    elif where == "model.safetensors":
        head = b'{"__metadata__":{"a":"\\ud800"}}'
        (tmp_path / "a.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
        assert "not JSON: 'utf-8' codec can't encode" in refused(read_header, tmp_path / "a.safetensors")
    else:
        path = gguf_with(tmp_path, {where: Value("str", '{"model_type": "llama", "x": "\\ud800"}')})
        assert "mlxgpt.config: not JSON" in refused(gguf.read, path)


def gguf_with(place: Path, changes: dict[str, Value]) -> Path:
    """A valid file but for these keys."""
    path = written("gguf", LLAMA, place)
    values, stored = read_gguf(path)
    data = path.read_bytes()
    write_gguf(
        path,
        {key: typed(value) for key, value in values.items()} | changes,
        {name: (one.type, one.shape) for name, one in stored.items()},
        lambda name: iter([np.frombuffer(data[stored[name].start : stored[name].stop], np.uint8)]),
    )
    return path


@pytest.mark.parametrize("key", ["general.architecture", "tokenizer.ggml.tokens"])
def test_a_gguf_key_that_is_numbers(key: str, tmp_path: Path) -> None:
    assert key in refused(gguf.read, gguf_with(tmp_path, {key: Value("f32[]", np.zeros(3, np.float32))}))


def test_a_gguf_of_others_with_a_key_that_is_numbers(tmp_path: Path) -> None:
    values = {"general.architecture": "llama", "llama.attention.causal": np.zeros(3)}
    assert "llama.attention.causal" in refused(gguf_names.config_from, "a.gguf", values, {})


@pytest.mark.parametrize("data", [b"", b"\x12\x00"])
def test_sentencepiece_without_pieces(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert "not a SentencePiece model" in refused(load_tokenizer, tmp_path)


@pytest.mark.parametrize("key", ["tokenizer.ggml.model", "tokenizer.ggml.pre"])
def test_a_gguf_tokenizer_kind_that_is_no_word(key: str) -> None:
    from convert.formats.gguf.restore import restore

    values = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], key: np.zeros(3)}
    files, notes = restore(values, Path("a.gguf"), 1, "llama", {})
    assert not files and key in notes[0]


def bpe_files(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    train_tokenizer("bpe", [TEXT], 300).save(folder)
    return json.loads((folder / "tokenizer.json").read_text())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["model"]["vocab"].update({"zz": 2**31}), "largest id 2147483648: expected tokens"),
        (lambda c: c["model"].update(continuing_subword_prefix="a" * 50), "not a tokenizer that `tokenizers` reads"),
    ],
)
def test_tokenizer_json_that_would_panic_or_take_all_memory(change: Any, says: str, tmp_path: Path) -> None:
    content = bpe_files(tmp_path / "t")
    change(content)
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content))
    assert says in refused(load_tokenizer, tmp_path / "t")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder: expected"),
        ({"added_tokens_decoder": {"1": {}}}, "added_tokens_decoder: expected"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder: expected"),
    ],
)
def test_settings_of_another_type(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    bpe_files(tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert says in refused(load_tokenizer, tmp_path / "t")


@pytest.mark.parametrize("eos", [[], {}, 3, {"content": []}])
def test_an_end_of_text_that_is_no_text(eos: Any, tmp_path: Path) -> None:
    bpe_files(tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert load_tokenizer(tmp_path / "t").eos_id == 0  # by its well-known name


def test_a_word_level_tokenizer_without_a_word_for_the_unknown(tmp_path: Path) -> None:
    train_tokenizer("char", ["abc"], 0).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}  # so that it is none of ours
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert "character 'z' (U+007A) at position 0: expected one of" in refused(load_tokenizer(tmp_path).encode, "z")


def test_characters_without_whole_numbers_are_none_of_ours(tmp_path: Path) -> None:
    train_tokenizer("char", ["abc"], 0).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"d": "x"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert "not a tokenizer" in refused(load_tokenizer, tmp_path)


def test_ids_of_gpt2_files_that_are_no_numbers(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": "x"}')
    (tmp_path / "merges.txt").write_text("")
    assert "vocab.json: expected ids" in refused(load_tokenizer, tmp_path)


def test_sentencepiece_with_a_piece_that_is_no_text(tmp_path: Path) -> None:
    train_tokenizer("sp-bpe", [TEXT], 300).save(tmp_path)
    path = tmp_path / "tokenizer.model"
    data = path.read_bytes()
    at = data.index("\u2581".encode())
    path.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    assert "not UTF-8" in refused(load_tokenizer, tmp_path)


def test_a_pickle_that_wants_a_persistent_object(tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04Pa\n.")
    assert "holds the opcode PERSID" in refused(load_tokenizer, tmp_path / "meta.pkl")


def test_the_fuzzer_puts_back_what_it_damaged(tmp_path: Path) -> None:
    fuzzer = Fuzzer("folder", tmp_path)
    for number in range(20):
        fuzzer.one(1, number)
    assert {file: file.read_bytes() for file in files_of(fuzzer.path)} == fuzzer.seeds
    assert model(LLAMA).config == model_folder.read_config(fuzzer.path)
