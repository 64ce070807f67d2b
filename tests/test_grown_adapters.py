"""PEFT's adapters with another vocabulary, with heads apart from a tied embedding, with rows of tokens: all the ways.

The judge is PEFT's own forward pass. Its merge_and_unload is one where nothing tied was adapted: there it changes the
shared matrix for embedding and head, and is another model than the adapter.
"""

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import interop
import numpy as np
import peft
import pytest
import safetensors.numpy
import templates
import torch
import transformers
from interop import GATE, MODELS
from models import CASES, tiny, weights

from convert import adapters as convert_adapters
from convert.conversion import convert
from convert.fuse import fuse
from mlxgpt import cli
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, model_folder, resolve
from mlxgpt.common.folders.adapter import Adapter, add_up
from mlxgpt.common.folders.peft import settings as peft_settings
from mlxgpt.common.model import adapters
from mlxgpt.common.tokenizers.load import load_tokenizer, train_tokenizer

Tensors = dict[str, np.ndarray]
# by a name: the model, rows that are added, LoraConfig's arguments, whether the fused model is tied
PEFT: dict[str, tuple[str, int, dict[str, Any], bool]] = {
    "whole": ("llama-untied", 5, {"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "whole-parted": ("llama-gqa", 5, {"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "whole-tied": ("llama-gqa", 5, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "head-whole": ("llama-gqa", 0, {"modules_to_save": ["lm_head"]}, False),
    "embedding-whole": ("llama-gqa", 4, {"modules_to_save": ["embed_tokens"]}, False),
    "carried": ("gpt2", 4, {"target_modules": ["c_attn"]}, True),
    "carried-untied": ("gpt_neox", 4, {"target_modules": ["query_key_value"]}, False),
    "carried-bias": ("phi", 4, {}, False),
    "carried-and-adapted": ("llama-untied", 5, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
    "smaller": ("llama-gqa", -4, {}, True),
    "head-adapted": ("llama-gqa", 5, {"target_modules": ["q_proj", "lm_head"]}, False),
    "head-dora": ("llama-gqa", 0, {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, False),
    "embedding-adapted": ("llama-gqa", 0, {"target_modules": ["q_proj", "embed_tokens"]}, False),
    "both-adapted": ("llama-gqa", 3, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    "rows": ("llama-gqa", 0, {"trainable_token_indices": [7, 3]}, True),
    "rows-untied": ("llama-untied", 0, {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [1, 9]}}, False),
    "rows-parted": ("llama-gqa", 0, {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [1]}}, False),
    "rows-new": ("llama-gqa", 3, {"trainable_token_indices": [80, 81, 82, 5]}, True),
}  # fmt: skip


class Made(NamedTuple):
    """A base, PEFT's adapter for it, the logits of both, and those of merge_and_unload."""

    base: Path
    adapter: Path
    logits: np.ndarray
    merged: np.ndarray


def resized(base: Path, size: int) -> Any:
    """transformers' model with so many tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if size != model.config.vocab_size:
        model.resize_token_embeddings(size)
    return model


def logits(model: Any, tokens: np.ndarray = interop.TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens % model.config.vocab_size)).logits.numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """An adapter of PEFT's by its name, made when it is first asked for."""
    done: dict[str, Made] = {}

    def make(choice: str) -> Made:
        if choice in done:
            return done[choice]
        name, more, settings, _ = PEFT[choice]
        place = tmp_path_factory.mktemp(choice)
        config = MODELS.get(name) or CASES[name]
        base = interop.write_base(place / "base", config)
        done[choice] = write(base, place / "adapter", config.vocab_size + more, **settings)
        return done[choice]

    return make


def write(base: Path, place: Path, size: int, **settings: Any) -> Made:
    """An adapter as PEFT saves it, off its start, for ``base`` with so many tokens."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = copy.deepcopy({"target_modules": ["q_proj"], "r": 4, "task_type": "CAUSAL_LM"} | settings)
        model = peft.get_peft_model(resized(base, size), peft.LoraConfig(**given))
        with torch.no_grad():
            for _, each in model.named_parameters():
                if each.requires_grad:
                    each.add_(0.05 * torch.randn(each.shape))
        model.save_pretrained(str(place))
        expected = logits(model)
        return Made(base, place, expected, logits(model.merge_and_unload()))


def loaded(base: Path, adapter: Path, size: int) -> Any:
    """PEFT's model with an adapter's folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that are not PEFT's own, and of what is tied
        return peft.PeftModel.from_pretrained(resized(base, size), str(adapter))


def ours(package: Any, base: Path, adapter: Path | None = None) -> np.ndarray:
    """Logits of one of our frameworks."""
    model, _ = package.load.load(base, adapter=adapter, device="cpu")
    tokens = interop.TOKENS % model.config.vocab_size
    if package is interop.mlxgpt:
        return np.array(model(interop.mx.array(tokens)))
    return model(torch.tensor(tokens)).detach().numpy()


def worst(made: Made, base: Path, adapter: Path | None = None) -> float:
    """The largest difference of both frameworks from PEFT, relative to the largest logit."""
    return max(
        interop.worst("logits", ours(p, base, adapter), made.logits) for p in (interop.mlxgpt, interop.torch_ref)
    )


@pytest.mark.parametrize("choice", PEFT)
def test_it_loads_and_fuses_and_goes_back(choice: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    it, tied = made(choice), PEFT[choice][3]
    assert worst(it, it.base, it.adapter) <= GATE
    fuse(it.base, it.adapter, tmp_path / "fused")
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["tie_word_embeddings"] is tied
    fused = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32))
    assert interop.worst("fused", fused, it.logits) <= GATE
    parts = {"lm_head.weight", "lm_head.lora_a", "wte.lora_a", "lm_head.rows"}
    config = model_folder.read_config(it.base)
    found = adapter_folder.read_adapter(it.adapter, it.base, config)
    if not config.tied or not parts & set(found.params):
        assert interop.worst("merge_and_unload", fused, it.merged) <= GATE
    convert_adapters.convert(it.adapter, tmp_path / "peft", "peft", model=it.base)
    model = loaded(it.base, tmp_path / "peft", it.logits.shape[-1])
    assert interop.worst("back in PEFT", logits(model), it.logits) <= GATE
    assert same(found, read(it, tmp_path / "peft"))


def read(it: Made, adapter: Path | None = None) -> Adapter:
    return adapter_folder.read_adapter(adapter or it.adapter, it.base, model_folder.read_config(it.base))


def changed(it: Made, place: Path, change: Callable[[dict[str, Any], Tensors], Any]) -> Path:
    """A copy of the adapter, changed."""
    shutil.copytree(it.adapter, place)
    values = json.loads((place / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(place / "adapter_model.safetensors")
    change(values, tensors)
    (place / "adapter_config.json").write_text(json.dumps(values))
    safetensors.numpy.save_file(tensors, place / "adapter_model.safetensors")
    return place


def same(a: Adapter, b: Adapter) -> bool:
    equal = a.targets == b.targets and a.params.keys() == b.params.keys() and a.apart == b.apart
    return equal and all(np.array_equal(a.params[name], b.params[name]) for name in a.params)


def renamed(rename: Callable[[str], str]) -> Callable[[dict[str, Any], Tensors], Any]:
    def change(values: dict[str, Any], tensors: Tensors) -> None:
        old = dict(tensors)
        tensors.clear()
        tensors.update({rename(name): array for name, array in old.items()})

    return change


def named(name: str) -> str:
    """As a state_dict of PEFT's model has it, with the adapter's name."""
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "modules_to_save", "delta"):
        name = name.replace(part, f"{part}.default")
    return name


SPELLINGS: dict[str, Callable[[str], str]] = {
    "named": named,
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "compiled-whole": lambda name: f"_orig_mod.{name}",
    "distributed": lambda name: f"module.{name}",
    "sharded": lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "bare": lambda name: name.removeprefix("base_model.model."),
    "headless": lambda name: name.replace("model.model.model.", "model.model.", 1),
    "part": lambda name: name.replace("base_model.model.model.", "base_model.model.model.language_model.", 1),
    "part-whole": lambda name: name.replace("base_model.model.", "base_model.model.language_model.", 1),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_are_known_with_what_trainers_put_around_them(
    spelling: str, made: Callable[[str], Made], tmp_path: Path
) -> None:
    for choice in ("whole-parted", "both-adapted", "rows"):
        it = made(choice)
        assert same(read(it), read(it, changed(it, tmp_path / choice, renamed(SPELLINGS[spelling]))))


def test_patterns_are_held_against_the_names_of_the_file(made: Callable[[str], Made], tmp_path: Path) -> None:
    it, rename = made("head-whole"), SPELLINGS["part"]

    def change(values: dict[str, Any], tensors: Tensors) -> None:
        renamed(rename)(values, tensors)
        values["target_modules"] = r"model\.language_model\.layers\.\d+\.self_attn\.q_proj"

    assert same(read(it), read(it, changed(it, tmp_path / "adapter", change)))


def test_a_whole_state_dict_is_read(made: Callable[[str], Made], tmp_path: Path) -> None:
    """With every weight of the base in it; one that is not the base's is refused by name."""
    it = made("embedding-whole")
    model = loaded(it.base, it.adapter, it.logits.shape[-1])
    whole = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("q_proj.base_layer.weight") for name in whole)
    assert same(read(it), read(it, changed(it, tmp_path / "whole", lambda v, t: (t.clear(), t.update(whole)))))
    name = next(name for name in whole if name.endswith("down_proj.weight"))
    whole[name] = whole[name] + np.float32(1)
    with pytest.raises(UserError, match=r"h\.\d\.mlp\.c_proj\.weight, which is not the base's"):
        read(it, changed(it, tmp_path / "other", lambda v, t: (t.clear(), t.update(whole))))


LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A{}.weight"
DAMAGED: dict[str, tuple[str, Callable[[dict[str, Any], Tensors], Any], str]] = {
    "prefix": ("rows", renamed(lambda n: f"policy.{n}"), r"prefix 'policy\.(base_model\.model\.)?' of tensor"),
    "two": ("rows", lambda v, t: t.update({LORA.format(f".{n}"): np.ones((4, 48), np.float32) for n in ("one", "two")}),
            r"2 adapters in one file \(one, two\)"),
    "twice": ("rows", lambda v, t: t.update({LORA.format(".one"): t[LORA.format("")] + 1}), "is there twice"),
    "no-ids": ("rows", lambda v, t: v.update(trainable_token_indices=None), "trainable_token_indices does not name it"),
    "negative": ("rows", lambda v, t: v.update(trainable_token_indices=[-1, 2]), "expected token ids"),
    "repeated": ("rows", lambda v, t: v.update(trainable_token_indices=[2, 2]), "an id is there twice"),
    "text": ("rows", lambda v, t: v.update(trainable_token_indices="all"), "expected token ids"),
    "module": ("rows", lambda v, t: v.update(trainable_token_indices={"q_proj": [1]}),
               "expected the embedding or the head"),
    "count": ("rows", lambda v, t: v.update(trainable_token_indices=[1, 2, 3]), r"shape \[2, 48\], expected \[3, 48\]"),
    "beyond": ("rows", lambda v, t: v.update(trainable_token_indices=[3, 90]), "resized from 80 to 91, and the file"),
    "huge": ("rows", lambda v, t: v.update(trainable_token_indices=[3, 2**30]), "the file does not hold wte.weight"),
    "no-head": ("carried-untied", lambda v, t: t.pop("base_model.model.lm_head.weight"),
                r"does not hold lm_head.weight of that size: expected .*save_embedding_layers=True"),
    "no-embedding": ("carried-and-adapted", lambda v, t: [t.pop(n) for n in list(t) if "base_layer" in n],
                     "lora_a of wte is for a vocabulary of 85, the base's is 80"),
    "rows-differ": ("whole", lambda v, t: t.update({"base_model.model.lm_head.weight": np.ones((84, 48), np.float32)}),
                    "expected one vocabulary"),
    "saved-twice": ("whole", lambda v, t: t.update({"base_model.model.lm_head.weight": np.ones((85, 48), np.float32)}),
                    "modules_to_save.weight differ"),
    "bases-differ": ("both-adapted", lambda v, t: t["base_model.model.lm_head.base_layer.weight"].fill(1),
                     "but they are tied in this model"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_does_not_fit_is_refused_by_name(case: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    choice, change, said = DAMAGED[case]
    with pytest.raises(UserError, match=said):
        read(made(choice), changed(made(choice), tmp_path / "adapter", change))


def test_every_setting_of_peft_is_read_or_without_effect_or_refused(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    """A field that a later PEFT adds is refused where it is set; the lists here know those of this one."""
    it = made("head-whole")
    values = json.loads((it.adapter / "adapter_config.json").read_text())
    refused = {
        "megatron_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication",
        "lora_bias", "target_parameters", "use_bdlora", "arrow_config", "kasa_config",
    }  # fmt: skip
    known = {field for field in peft.LoraConfig.__dataclass_fields__ if not field.startswith("_")}
    assert known - refused <= peft_settings.READ | peft_settings.IDLE
    assert not refused & (peft_settings.READ | peft_settings.IDLE)

    def velora(values: dict[str, Any], tensors: Tensors) -> None:  # of its backward pass alone
        values["velora_config"] = {"num_groups": 1}
        tensors[LORA.format("").replace("lora_A.weight", "lora_velora_embed")] = np.ones(1, np.float32)

    assert same(read(it), read(it, changed(it, tmp_path / "velora", velora)))
    for key in [*sorted(refused), "a_later_field"]:
        with pytest.raises(UserError, match=f"{key} = .* is not supported: expected it unset"):
            peft_settings.check(values | {key: [1]}, "here")
    for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard"):
        with pytest.raises(UserError, match=f"init_lora_weights '{init}' changes the base model"):
            peft_settings.check(values | {"init_lora_weights": init}, "here")
    for kind in set(peft.PeftType) - {peft.PeftType.LORA}:
        with pytest.raises(UserError, match=f"peft_type '{kind.value}' is not supported"):
            peft_settings.check(values | {"peft_type": kind.value}, "here")
    for task in ("SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS"):
        with pytest.raises(UserError, match=f"task_type '{task}' is not supported"):
            peft_settings.check(values | {"task_type": task}, "here")


def test_a_head_apart_gets_what_another_adapter_does_to_both(made: Callable[[str], Made]) -> None:
    it = made("head-dora")
    config = model_folder.read_config(it.base)
    base = model_folder.read_params(it.base, config)
    rng = np.random.default_rng(0)

    def update(path: str, n_out: int, n_in: int, apart: bool) -> Adapter:
        shapes = {"lora_a": (2, n_in), "lora_b": (n_out, 2)}
        arrays = {f"{path}.{kind}": rng.normal(0, 1, shape).astype(np.float32) for kind, shape in shapes.items()}
        return Adapter("lora", {path: adapters.Target(n_out, n_in, 2, 0.5)}, arrays, apart=apart)

    head, both = update("lm_head", 80, 48, True), update("wte", 48, 80, False)
    found = add_up(config, [(head, 0.5), (both, 2.0)])
    assert not found.config.tied
    shared = base["wte.weight"] + 2.0 * adapters.delta(both.targets["wte"], both.params, "wte")
    merged = {
        path: adapters.fuse(np.asarray(found.onto(base)[f"{path}.weight"]), found.targets[path], found.params, path)
        for path in ("wte", "lm_head")
    }
    alone = 0.5 * adapters.delta(head.targets["lm_head"], head.params, "lm_head")
    assert np.abs(merged["wte"] - shared).max() <= 1e-5
    assert np.abs(merged["lm_head"] - (shared + alone)).max() <= 1e-5


def test_what_replaces_a_matrix_is_alone_with_it(made: Callable[[str], Made]) -> None:
    whole, rows, head = (read(made(choice)) for choice in ("head-whole", "rows-parted", "head-dora"))
    config = model_folder.read_config(made("rows").base)
    for pair in ((whole, head), (head, whole), (rows, whole), (rows, head), (rows, rows)):
        with pytest.raises(UserError, match="is trained whole: expected it in one of them, without a weight"):
            add_up(config, [(each, 1.0) for each in pair])
    grown = read(made("whole"))
    plain = read(made("carried-and-adapted"))
    plain.params = {name: array for name, array in plain.params.items() if not name.endswith(".weight")}
    untied = model_folder.read_config(made("whole").base)
    grown.params = {name: array for name, array in grown.params.items() if name != "lm_head.weight"}
    grown.vocab_size, plain.vocab_size = 85, None
    plain.targets = {"lm_head": adapters.Target(80, 48, 4, 1.0)}
    with pytest.raises(
        UserError, match=r"the update of lm_head is for \[80, 48\], but with the others it is \[85, 48\]"
    ):
        add_up(untied, [(grown, 1.0), (plain, 1.0)])


def test_a_copy_of_the_base_is_left_out_and_another_takes_its_place(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    it = made("head-dora")
    assert "lm_head.weight" not in read(it).params
    shutil.copytree(it.base, tmp_path / "sizes", ignore=shutil.ignore_patterns("*.safetensors"))
    _, notes = convert_adapters.convert(it.adapter, tmp_path / "peft", "peft", model=tmp_path / "sizes")
    told = {f"{name}.weight is a copy of the base's, and left out" for name in ("wte", "lm_head")}
    assert {note.partition(": ")[2] for note in notes} == told
    assert same(read(it), read(it, tmp_path / "peft"))
    base = "base_model.model.lm_head.base_layer.weight"
    other = read(it, changed(it, tmp_path / "other", lambda v, t: t.update({base: t[base] + np.float32(0.5)})))
    assert set(other.carried) == {"wte.weight", "lm_head.weight"}
    assert "lm_head.weight is not the base's, and takes its place (as in PEFT)" in " ".join(other.notes)


def test_a_quantized_base_takes_them_too(made: Callable[[str], Made], tmp_path: Path) -> None:
    config = tiny(family="llama", n_embd=64, n_hidden=128, block_size=32, vocab_size=96)
    model_folder.write_model(tmp_path / "plain", config, weights(config))
    convert(tmp_path / "plain", tmp_path / "base", to="mlx-lm", bits=8, group_size=64)
    kinds = {"rows": {"trainable_token_indices": [3, 5]}, "head": {"target_modules": ["q_proj", "lm_head"]}}
    for name, settings in kinds.items():
        write(tmp_path / "plain", tmp_path / name, 96, **settings)
        values = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert values["peft_type"] == "LORA"
        tensors = safetensors.numpy.load_file(tmp_path / name / "adapter_model.safetensors")
        kept = {key: array for key, array in tensors.items() if "base_layer" not in key}  # of the plain base
        safetensors.numpy.save_file(kept, tmp_path / name / "adapter_model.safetensors")
        fuse(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-exact", dequantize=True, dtype="float32")
        fuse(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-fused")
        expected = ours(interop.torch_ref, tmp_path / f"{name}-exact")
        for package in (interop.mlxgpt, interop.torch_ref):
            found = ours(package, tmp_path / "base", tmp_path / name)
            assert interop.worst("with the adapter", found, expected) <= GATE
        assert model_folder.read_config(tmp_path / f"{name}-fused").tied is (name == "rows")
        assert interop.worst("8 bits", ours(interop.mlxgpt, tmp_path / f"{name}-fused"), expected) <= 0.05


def test_finetune_goes_on_with_them_or_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer("bpe", [templates.TEXT], 300)
    config = tiny(family="llama", vocab_size=tokenizer.n_vocab)
    model_folder.write_model(Path("base"), config, weights(config), tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained("base")
    theirs.add_tokens(["<|call|>", "<|done|>"], special_tokens=True)
    base, size = Path("base"), len(theirs)
    write(base, Path("parted"), size, modules_to_save=["embed_tokens", "lm_head"])
    theirs.save_pretrained("parted")
    write(base, Path("head"), config.vocab_size, target_modules=["q_proj", "lm_head"])
    write(base, Path("rows"), config.vocab_size, trainable_token_indices=[4])
    rows = [{"prompt": f"the {n} <|call|>", "completion": f" {n} dogs <|done|>"} for n in range(12)]
    Path("data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = ["-d", "data.jsonl", "--steps", "3", "--device", "cpu", "--set", "train.batch_size=4"]
    words += ["--set", "sample.max_tokens=0"]
    for name, backend in (("parted", "mlx"), ("head", "torch")):
        run = f"run-{name}"
        more = ["--stop-after", "2", "--backend", backend, "-o", run]
        assert cli.main(["finetune", "-m", "base", "--adapter", name, *words, *more]) == 0
        assert cli.main(["finetune", "--resume", run, "--backend", backend, "--device", "cpu"]) == 0
        place = resolve.resolve_model(run)
        found = adapter_folder.read_adapter(place, base, config)
        assert found.apart
        assert not same(found, adapter_folder.read_adapter(Path(name), base, config))
        expected = logits(loaded(base, place, found.vocab_size or config.vocab_size))
        assert worst(Made(base, place, expected, expected), base, place) <= GATE
        assert (place / "tokenizer.json").is_file() is (name == "parted")
    assert load_tokenizer(resolve.resolve_model("run-parted")).n_vocab == size
    capsys.readouterr()
    assert cli.main(["finetune", "-m", "base", "--adapter", "rows", *words, "-o", "no"]) == 2
    said = capsys.readouterr().err
    assert "has single rows of wte (trainable_token_indices), which does not train here" in said
    assert "mlxgpt fuse -m" in said and not Path("no").exists()
    assert cli.main(["fuse", "-m", "base", "--adapter", "rows", "-o", "merged"]) == 0
    assert cli.main(["finetune", "-m", "merged", *words, "-o", "yes"]) == 0
