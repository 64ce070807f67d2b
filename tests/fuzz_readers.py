"""Damages small valid models at random and reads them: each must be read, or be refused by one UserError.

    python tests/fuzz_readers.py [--minutes 10] [--seed 0] [READER ...]

Another exception, five seconds of processor time, or 300 MB more memory than before is a finding, printed with the seed
and number that make it again; where the whole process ends, its input stays in the folder that is named. So is reading
what is not there: what a reader takes must be a model of its config, go to a Hugging Face folder and come back bit for
bit, and hold what safetensors, numpy or gguf find in the same file. ``fuzz_guided.py`` searches by coverage instead.
"""

import argparse
import json
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import fuzz_weights
import gguf
import hub
import models
import numpy as np
import safetensors
import tokenizers
from fuzz_damage import damaged, typed
from tokenizers import decoders, pre_tokenizers, trainers

from convert import Opened, Options, Tensor, format_of
from convert.formats.gguf.file import read_gguf, write_gguf
from mlxgpt.common.config import AdapterConfig, ModelConfig, Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, model_folder
from mlxgpt.common.folders.adapter import Adapter, add_up
from mlxgpt.common.folders.tensors import read_header, read_tensor, write_tensors
from mlxgpt.common.model import adapters, params
from mlxgpt.common.tokenizers.load import load_tokenizer, train_tokenizer

SECONDS = 5
MEMORY = 300 << 20
TEXT = "the quick brown fox; caf\u00e9 \u4f60\u597d 12 times.\n" * 8
LLAMA = models.tiny(family="llama", n_layer=1, n_embd=32, n_head=2, n_hidden=64, vocab_size=300, tied=False)
GPT2 = models.tiny(family="gpt2", n_layer=1, n_embd=32, n_head=2, vocab_size=64, block_size=16)
NANO = replace(GPT2, activation="gelu")


def model(config: ModelConfig, **fields: Any) -> Opened:
    arrays = models.weights(config)

    def lazy(array: np.ndarray) -> Tensor:
        return Tensor(array.shape, array.dtype, lambda: array)

    return Opened(
        Path("model"), "hf", config, {name: lazy(arrays[name]) for name in params.table(config)}, (), **fields
    )


def written(name: str, config: ModelConfig, place: Path, **options: Any) -> Path:
    """The model in one of the formats of ``convert``."""
    module = format_of(name)
    path = place / ("model" if module.KIND == "folder" else "model.bin")
    companions = tokenizer_files("bpe" if name == "gguf" else "sp-bpe", place)
    module.write(model(config, companions=companions), path, Options(**options))
    return path


def tokenizer_files(kind: str, place: Path) -> dict[str, Path | bytes]:
    files = place / f"tokenizer-{kind}"
    files.mkdir()
    train_tokenizer(kind, [TEXT], 300).save(files)
    return {path.name: path.read_bytes() for path in files.iterdir()}


def open_with(name: str) -> Callable[[Path], None]:
    """Recognizes, reads, takes every tensor, and takes the model to a Hugging Face folder and back."""

    def read(path: Path) -> None:
        module = format_of(name)
        module.recognize(path)
        opened = module.read(path)
        assert list(opened.tensors) == list(params.table(opened.config)), "not the tensors of its config"
        for key, tensor in opened.tensors.items():
            array = tensor.read()
            assert array.shape == tensor.shape == params.table(opened.config)[key].shape, f"{key}: shape"
            assert array.dtype == tensor.dtype, f"{key}: dtype"
        for moments in (opened.moments.m, opened.moments.v) if opened.moments else ():
            for tensor in moments.values():
                assert tensor.read().shape == tensor.shape
        there_and_back(opened)

    return read


def there_and_back(opened: Opened) -> None:
    """Demands every bit again of a model that goes through a Hugging Face folder."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "m"
        format_of("hf").write(replace(opened, moments=None), place, Options(hash=False, allow_nan=True))
        back = format_of("hf").read(place)
        assert back.config == opened.config, f"{back.config} of {opened.config}"
        for name, tensor in opened.tensors.items():
            assert back.tensors[name].read().tobytes() == tensor.read().tobytes(), f"{name}: other bits"


def seed_safetensors(place: Path) -> Path:
    write_tensors(place / "a.safetensors", {"a": np.ones((3, 4), np.float32), "b": np.ones(5, np.float16)})
    return place / "a.safetensors"


def seed_int8(place: Path) -> Path:
    """Version 2 of llama2.c, which nothing here writes: version 1's norms, then each matrix in groups of 16."""
    data, c, hidden = written("llama2c", LLAMA, place, version=1).read_bytes(), LLAMA.n_embd, LLAMA.n_hidden
    start = 256 + 4 * c * (2 * LLAMA.n_layer + 1)
    heads, keys = c * c, c * LLAMA.n_kv_head * LLAMA.head_dim
    counts = [LLAMA.vocab_size * c, heads, keys, keys, heads, *[hidden * c] * 3, LLAMA.vocab_size * c]
    body = [data[:4], struct.pack("<i", 2), data[8:37], struct.pack("<i", 16).ljust(219, b"\0"), data[256:start]]
    for values in np.split(np.frombuffer(data[start:], "<f4"), np.cumsum(counts)[:-1]):
        rows = values.reshape(-1, 16)
        scales = np.abs(rows).max(1) / np.float32(127)
        body += [np.round(rows / scales[:, None]).astype(np.int8).tobytes(), scales.tobytes()]
    (place / "int8.bin").write_bytes(b"".join(body))
    return place / "int8.bin"


def seed_folder(place: Path) -> Path:
    model_folder.write_model(place / "model", LLAMA, models.weights(LLAMA), max_shard=60_000)
    return place / "model"


def seed_configs(place: Path) -> Path:
    from mlxgpt.common.model.families import config_to_hf

    (place / "configs").mkdir()
    for name, config in models.CASES.items():
        (place / "configs" / f"{name}.json").write_text(json.dumps(config_to_hf(config)))
    for name, values in hub.PUBLISHED.items():
        (place / "configs" / f"{name.replace('/', ' ')}.json").write_text(json.dumps(values))
    return place / "configs"


def read_configs(path: Path) -> None:
    from mlxgpt.common.files import read_json
    from mlxgpt.common.model.families import config_from_hf, config_to_hf

    for file in changed(path):
        config = config_from_hf(read_json(file), str(file))
        again = config_from_hf(json.loads(json.dumps(config_to_hf(config))), "again")
        assert again == config, f"{again} of {config}"


def changed(path: Path) -> list[Path]:
    """The one file of a folder that was damaged: it is the newest."""
    return [max((file for file in path.iterdir()), key=lambda file: file.stat().st_mtime_ns)]


def trained(kinds: Sequence[str], place: Path) -> Path:
    for kind in kinds:
        (place / "all" / kind).mkdir(parents=True)
        train_tokenizer(kind, [TEXT], 300).save(place / "all" / kind)
    return place / "all"


def seed_tokenizers(place: Path) -> Path:
    trained(("char", "bpe", "sp-unigram"), place)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=280, show_progress=False))
    (place / "all" / "pair").mkdir()
    backend.model.save(str(place / "all" / "pair"))
    return place / "all"


def read_tokenizers(path: Path) -> None:
    newest = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_mtime_ns)
    tokenizer = load_tokenizer(newest.parent)
    tokenizer.decode(tokenizer.encode(TEXT[:40] if tokenizer.kind == "char" else TEXT[:40] + "z\u0b95"))


def seed_llama2c_tokenizer(place: Path) -> Path:
    tokens = [
        "<unk>",
        "\n<s>\n",
        "\n</s>\n",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        " ",
        "a",
        "b",
        " a",
        "ab",
        "\u00e9",
    ]
    encoded = [token.encode() for token in tokens]
    body = b"".join(struct.pack("<fi", -i if i > 258 else 0.0, len(each)) + each for i, each in enumerate(encoded))
    (place / "tokenizer.bin").write_bytes(struct.pack("<i", max(map(len, encoded))) + body)
    return place / "tokenizer.bin"


def seed_meta(place: Path) -> Path:
    names = dict(enumerate("abc \u00e9"))
    (place / "meta.pkl").write_bytes(
        pickle.dumps({"vocab_size": 5, "itos": names, "stoi": {c: i for i, c in names.items()}})
    )
    return place / "meta.pkl"


def read_given_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    try:
        assert tokenizer.decode(tokenizer.encode("ab a")).strip() == "ab a"
    except UserError as error:
        assert "character" in str(error), error  # a meta.pkl without one of them


def seed_adapter(layout: str) -> Callable[[Path], Path]:
    """A LoRA adapter in the layout of PEFT or of mlx-lm."""

    def make(place: Path) -> Path:
        model_folder.write_model(place / "base", LLAMA, models.weights(LLAMA))
        settings = AdapterConfig(rank=4)
        recipe = Recipe(model=LLAMA, adapter=settings)
        arrays = adapters.init(recipe, models.weights(LLAMA))
        adapter = Adapter("lora", adapters.targets(LLAMA, settings), arrays, settings)
        (place / "adapter").mkdir()
        adapter_folder.save(place / "adapter", LLAMA, adapter, (layout,))
        return place / "adapter"

    return make


def seed_grown(place: Path) -> Path:
    """A LoRA adapter of PEFT's layout with more tokens: rows of the embedding, others of the head."""
    config = replace(LLAMA, vocab_size=LLAMA.vocab_size + 2)
    settings = AdapterConfig(rank=4)
    arrays = adapters.init(Recipe(model=config, adapter=settings), models.weights(config))
    for path, more in (("wte", 3), ("lm_head", 4)):
        arrays[f"{path}.tokens"] = np.array([more, config.vocab_size - 1, config.vocab_size - 2])
        arrays[f"{path}.rows"] = np.ones((3, config.n_embd), np.float32)
    (place / "adapter").mkdir()
    adapter = Adapter("lora", adapters.targets(config, settings), arrays, settings, apart=True)
    adapter_folder.save(place / "adapter", config, adapter, ("peft",))
    return place / "adapter"


def read_adapter(path: Path, base: ModelConfig = LLAMA) -> None:
    """Finite, of the shapes that its targets ask for, and not of two minds."""
    found = adapter_folder.read_adapter(path, None, base)
    for name, array in found.params.items():
        assert np.isfinite(array).all() and array.dtype == (np.int64 if name.endswith(".tokens") else np.float32), name
    for name, target in found.targets.items():
        adapters.delta(target, found.params, name)
    together = add_up(base, [(found, 1.0)])
    for name, param in params.table(together.config).items():
        assert name not in together.whole or together.whole[name].shape == param.shape


def read_safetensors(path: Path) -> None:
    """As the library of the format reads it."""
    entries = read_header(path)[0]
    found = {name: read_tensor(entry) for name, entry in entries.items()}
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    assert {name: (list(a.shape), a.tobytes()) for name, a in found.items()} == {
        name: (each["shape"], bytes(each["data"])) for name, each in theirs.items()
    }, "safetensors reads something else"


def read_gguf_as_others(path: Path) -> None:
    """As the library of the format reads it, where it does."""
    stored = read_gguf(path)[1]
    try:
        theirs = {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
    except Exception:  # it has no words for damage
        theirs = None
    open_with("gguf")(path)
    data = path.read_bytes()
    ours = {name: data[one.start : one.stop] for name, one in stored.items()}
    assert theirs in (None, ours), "gguf reads something else"


def read_folder(path: Path) -> None:
    model_folder.read_params(path, model_folder.read_config(path))


# reader -> how a valid model is made, and how it is read
READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None]]] = {
    "safetensors": (seed_safetensors, read_safetensors),
    "config": (seed_configs, read_configs),
    "folder": (seed_folder, read_folder),
    "hf": (lambda place: written("hf", LLAMA, place, max_shard=60_000), open_with("hf")),
    "mlx-lm": (lambda place: written("mlx-lm", LLAMA, place, bits=4, group_size=32), open_with("mlx-lm")),
    "npz": (lambda place: written("npz", LLAMA, place), open_with("npz")),
    "nanogpt": (lambda place: written("nanogpt", NANO, place), open_with("nanogpt")),
    "pytorch": (lambda place: fuzz_weights.pickled(LLAMA, place), open_with("pytorch")),
    "pytorch-legacy": (lambda place: fuzz_weights.pickled(LLAMA, place, legacy=True), open_with("pytorch")),
    "pytorch-meta": (lambda place: fuzz_weights.pickled(LLAMA, place, meta=True), open_with("pytorch")),
    "fp8": (lambda place: fuzz_weights.as_fp8(seed_folder(place)), open_with("hf")),
    "mxfp4": (
        lambda place: fuzz_weights.as_mxfp4(written("mlx-lm", LLAMA, place, bits=4, group_size=32)),
        open_with("mlx-lm"),
    ),
    "mingpt": (lambda place: written("mingpt", replace(GPT2, tied=False), place), open_with("mingpt")),
    "gptmodel": (lambda place: written("gptmodel", replace(GPT2, tied=False), place), open_with("gptmodel")),
    "llama2c-v0": (lambda place: written("llama2c", LLAMA, place, version=0), open_with("llama2c")),
    "llama2c-v1": (lambda place: written("llama2c", LLAMA, place, version=1), open_with("llama2c")),
    "llama2c-v2": (seed_int8, open_with("llama2c")),
    "gguf": (lambda place: written("gguf", LLAMA, place, bits=8), read_gguf_as_others),
    "gguf-foreign": (lambda place: foreign(written("gguf", LLAMA, place)), read_gguf_as_others),
    "tokenizer": (seed_tokenizers, read_tokenizers),
    "sentencepiece": (lambda place: trained(["sp-bpe"], place), read_tokenizers),
    "llama2c-tokenizer": (seed_llama2c_tokenizer, read_given_tokenizer),
    "meta.pkl": (seed_meta, read_given_tokenizer),
    "adapter-peft": (seed_adapter("peft"), read_adapter),
    "adapter-grown": (seed_grown, lambda path: read_adapter(path, replace(LLAMA, tied=True))),
    "adapter-mlx-lm": (seed_adapter("mlx-lm"), read_adapter),
}


def foreign(path: Path) -> Path:
    """A GGUF file with llama3 rope scaling and without what is ours."""
    values, stored = read_gguf(path)
    kept = {key: typed(value) for key, value in values.items() if not key.startswith(("mlxgpt.", "tokenizer.hugg"))}
    data = path.read_bytes()
    tensors = {name: (one.type, one.shape) for name, one in stored.items()}

    def pieces(name: str) -> Iterator[np.ndarray]:
        yield np.frombuffer(data[stored[name].start : stored[name].stop], np.uint8)

    write_gguf(path, kept, tensors, pieces)
    return path


class Hang(BaseException):
    """A reader that has not ended in time."""


@contextmanager
def limits() -> Iterator[None]:
    """No more than ``SECONDS`` and ``MEMORY``; macOS takes a limit on memory and does not enforce it."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    held = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else None
    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    if held is not None:
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))
    try:
        yield
    finally:
        if held is not None:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Fuzzer:
    """One reader, with a valid model of its own below ``place``."""

    def __init__(self, reader: str, place: Path) -> None:
        make, self.read = READERS[reader]
        self.path = make(place)
        self.seeds = {file: file.read_bytes() for file in files_of(self.path)}
        self.read(self.path)  # what it is made of is valid, and what it needs is imported

    def one(self, seed: int, number: int) -> str | None:
        """Damages a file and reads: what was found wrong, None if all is well."""
        rng = random.Random(f"{seed} {number}")
        file = rng.choice(list(self.seeds))
        return self.read_with(file, damaged(self.seeds[file], file.name, rng))

    def read_with(self, file: Path, content: bytes) -> str | None:
        """Reads with this content in a file's place: what was found wrong."""
        file.write_bytes(content)
        try:
            with warnings.catch_warnings(), limits():
                warnings.simplefilter("ignore")
                self.read(self.path)
        except UserError as error:
            text = str(error)
            return f"more than one line: {text!r}" if "\n" in text else None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            own = [one for one in traceback.extract_tb(error.__traceback__) if "site-packages" not in one.filename]
            where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
            return f"{type(error).__name__} at {where} ({Path(last.filename).name}): {str(error)[:200]!r}"
        finally:
            file.write_bytes(self.seeds[file])
        return None


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def run(reader: str, minutes: float, seed: int, place: Path) -> int:
    """Damages and reads until the time is over; prints each kind of finding once."""
    fuzzer = Fuzzer(reader, place)
    found: dict[str, int] = {}
    until, number = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < until:
        wrong = fuzzer.one(seed, number)
        if wrong:
            kind = wrong.split(": ")[0]
            if kind not in found:
                print(f"{reader}: seed {seed} number {number}: {wrong}", flush=True)
            found[kind] = found.get(kind, 0) + 1
        number += 1
    print(
        f"{reader}: {number} damaged inputs in {minutes:g} minutes, {len(found)} kinds of findings {found}", flush=True
    )
    return int(bool(found))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("reader", nargs="*", choices=[*READERS, []], default=list(READERS))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        return run(args.reader[0], args.minutes, args.seed, args.here)
    worst = 0
    for reader in args.reader:
        place = Path(tempfile.mkdtemp(prefix=f"fuzz-{reader}-"))
        command = [sys.executable, __file__, reader, "--here", place]
        code = subprocess.run([*command, "--minutes", str(args.minutes), "--seed", str(args.seed)]).returncode
        if code in (0, 1):
            shutil.rmtree(place)
        else:
            print(f"{reader}: the process ended with {code}; the input is below {place}")
        worst = max(worst, abs(code))
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
