"""``--module FILE.py:Class``: a user's own code is imported, built, loaded and called; and what stands in its way."""

import json
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from convert.adopt import evidence, module, roles, source
from convert.adopt.module import Sizes
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders.tensors import write_tensors
from mlxgpt.common.user_code import imports
from mlxgpt.common.user_code import run as user_run
from mlxgpt.common.user_code.imports import TheirError
from mlxgpt.sample import Library as Mlx
from torch_ref.sample import Library as Torch

V, L, C, BLOCK = 11, 2, 8, 48

# one attention and MLP for all of them; each test's class says how it is built and called
CORE = """
import torch, math
import torch.nn as nn
import torch.nn.functional as F
from dataclasses import dataclass

class Block(nn.Module):
    def __init__(self, c, h):
        super().__init__()
        self.h = h
        self.ln_1, self.ln_2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.fc, self.proj = nn.Linear(c, 2 * c), nn.Linear(2 * c, c)
        self.drop = nn.Dropout(0.5)
    def forward(self, x, causal=True, mask=None):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.h, -1).transpose(1, 2) for y in self.qkv(self.ln_1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(b, t, c)))
        return x + self.proj(F.gelu(self.fc(self.ln_2(x))))

class Body(nn.Module):
    def __init__(self, vocab_size=11, n_layer=2, n_head=2, n_embd=8, block_size=48):
        super().__init__()
        self.block_size = block_size
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList([Block(n_embd, n_head) for _ in range(n_layer)])
        self.ln_f, self.head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size, bias=False)
    def body(self, idx, **more):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[-1]))
        for block in self.blocks:
            x = block(x, **more)
        return self.head(self.ln_f(x))
"""

CLASSES = {
    "plain": "class M(Body):\n    def forward(self, idx): return self.body(idx)",
    "a tuple": "class M(Body):\n    def forward(self, idx): return self.body(idx), None",
    "a loss first": "class M(Body):\n    def forward(self, idx): return torch.tensor(0.5), self.body(idx)",
    "a dict": "class M(Body):\n    def forward(self, idx): return {'hidden': self.wte(idx), 'logits': self.body(idx)}",
    "an object": """
        @dataclass
        class Out:
            loss: object
            logits: object
        class M(Body):
            def forward(self, input_ids, labels=None, use_cache=True): return Out(None, self.body(input_ids))""",
    "targets for all": """
        class M(Body):
            def forward(self, idx, targets=None):
                x = self.body(idx)
                if targets is None: return x[:, [-1]], None
                return x, F.cross_entropy(x.view(-1, x.shape[-1]), targets.view(-1))""",
    "flattened with targets": """
        class M(Body):
            def forward(self, idx, targets=None):
                x = self.body(idx)
                if targets is None: return x[:, -1], None
                x = x.view(-1, x.shape[-1])
                return x, F.cross_entropy(x, targets.view(-1))""",
    "the last alone": "class M(Body):\n    def forward(self, idx): return self.body(idx)[:, -1]",
    "one row": """
        class M(Body):
            def forward(self, idx):
                assert idx.ndim == 1
                return self.body(idx[None])[0]""",
    "time first": "class M(Body):\n    def forward(self, src): return self.body(src.t()).transpose(0, 1)",
    "a position": "class M(Body):\n    def forward(self, idx, start_pos: int): return self.body(idx)[:, start_pos:]",
    "positions": """
        class M(Body):
            def forward(self, idx, pos, cache):
                assert cache is None and pos.tolist() == list(range(idx.shape[1]))
                return self.body(idx)""",
    "a mask that adds": """
        class M(Body):
            def forward(self, src, src_mask): return self.body(src, causal=False, mask=src_mask + 0.0)""",
    "a mask that is optional": """
        class M(Body):
            def forward(self, idx, mask=None): return self.body(idx, causal=False, mask=mask)""",
    "a mask of what is hidden, time first": """
        class M(Body):
            def forward(self, src, src_mask):
                assert src_mask.dtype == torch.bool and src_mask.shape == (src.shape[0],) * 2
                return self.body(src.t(), causal=False, mask=~src_mask).transpose(0, 1)""",
    "one length": """
        class M(Body):
            def forward(self, idx):
                assert idx.shape[1] == self.block_size, 'full windows only'
                return self.body(idx)""",
    "targets it insists on": """
        class M(Body):
            def forward(self, idx, targets):
                x = self.body(idx)
                return (x, F.cross_entropy(x.view(-1, 11), targets.view(-1)))""",
    "a loss alone with targets": """
        class M(Body):
            def forward(self, idx, targets):
                x = self.body(idx)
                return x if targets is None else F.cross_entropy(x.view(-1, 11), targets.view(-1))""",
    "classes before tokens": "class M(Body):\n    def forward(self, x): return self.body(x).transpose(1, 2)",
}
SAID = {
    "targets for all": "targets: the ids are given as such",
    "flattened with targets": "targets: the ids are given as such",
    "targets it insists on": "targets: the ids are given as such",
    "the last alone": "called once for every length",
    "one row": "one row of tokens at a time",
    "time first": "time first",
    "a mask that adds": "src_mask: 0 and -inf",
    "a mask that is optional": "mask: 0 and -inf",
    "a mask of what is hidden, time first": "true where a token may not look",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for a user's files; what running them in this process changes is put back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")) or not hasattr(
            sys.modules[name], "__spec__"
        ):
            del sys.modules[name]


def weights_of(source: str, **kwargs: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The class in a source, built, with weights drawn wide; and these by name."""
    space: dict[str, Any] = {"__name__": "source"}
    sys.modules["source"] = type(sys)("source")
    exec(source, space)
    torch.manual_seed(0)
    model = space["M"](**kwargs)
    for value in model.parameters():
        nn.init.normal_(value, std=0.5)
    return model.eval(), {key: value.numpy().copy() for key, value in model.state_dict().items()}


def request(place: Path, source: str, weights: dict[str, np.ndarray], **more: Any) -> user_run.Request:
    """A request to run class M of a file model.py."""
    if source:
        (place / "model.py").write_text(source)
    write_tensors(place / "x1.safetensors", weights)
    given = {"path": str(place / "model.py"), "name": "M", "vocab_size": V, "n_layer": L, "block_size": BLOCK}
    given |= {"out": str(place / "sample.npz"), "weights": {"x1": str(place / "x1.safetensors")}}
    return user_run.Request(**{**given, **more})


def ran(library: Any, asked: user_run.Request) -> tuple[evidence.Sample, list[str]]:
    """The sample of a request that is run in this process, and what was said."""
    said = user_run.run(library, asked, user_run.Answer(Path(asked.out)))
    return evidence.read(asked.out), said


def expected(source: str, weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """The logits of the core with these weights."""
    model, _ = weights_of(CORE + "\nclass M(Body): pass\n")
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    with torch.no_grad():
        return model.body(torch.from_numpy(ids).long()).numpy()


@pytest.mark.parametrize("kind", CLASSES)
def test_a_model_is_called_as_it_wants_to_be(place: Path, kind: str) -> None:
    source = CORE + textwrap.dedent(CLASSES[kind])
    _, weights = weights_of(source)
    found, said = ran(Torch(), request(place, source, weights))
    assert found.ids.shape == (1, BLOCK)
    np.testing.assert_allclose(found.logits, expected(source, weights, found.ids), atol=2e-5)
    assert found.hidden is not None and len(found.hidden) == L + 1
    embedded = weights["wte.weight"][found.ids] + weights["wpe.weight"]
    np.testing.assert_allclose(found.hidden[0], embedded, atol=1e-6)
    assert SAID.get(kind, "") in " ".join(said) and bool(said) == (kind in SAID)


def test_a_list_of_parts_of_blocks_gives_no_hidden_states(place: Path) -> None:
    """What leaves an MLP is not what enters the next one."""
    source = (
        CORE
        + """
class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.mlps = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
    def forward(self, i):
        x = self.wte(i)
        for mlp in self.mlps:
            x = x + mlp(x)
        return self.head(x)
"""
    )
    _, weights = weights_of(source)
    found, _ = ran(Torch(), request(place, source, weights))
    assert found.hidden is None


def test_log_probabilities_are_known_as_such(place: Path) -> None:
    source = CORE + "\nclass M(Body):\n    def forward(self, x): return F.log_softmax(self.body(x), -1)\n"
    _, weights = weights_of(source)
    found, _ = ran(Torch(), request(place, source, weights))
    assert found.normalized
    np.testing.assert_allclose(found.logits, found.comparable(expected(source, weights, found.ids)), atol=2e-5)


def test_a_length_beyond_the_usual_is_tried(place: Path) -> None:
    source = CORE + textwrap.dedent(CLASSES["one length"]).replace("(Body):", "(Body):\n    long = True")
    _, weights = weights_of(source, block_size=80)
    found, said = ran(Torch(), request(place, source, weights, block_size=80, kwargs={"block_size": 80}))
    assert found.ids.shape == (1, 80) and "it takes 80 tokens and no other number" in said


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_encoder_of_the_tutorial(place: Path) -> None:
    source = """
import math, torch
from torch import nn
class M(nn.Module):
    def __init__(self, ntoken: int, d_model: int, nhead: int, d_hid: int, nlayers: int, dropout: float = 0.5):
        super().__init__()
        layer = nn.TransformerEncoderLayer(d_model, nhead, d_hid, dropout)
        self.transformer_encoder = nn.TransformerEncoder(layer, nlayers)
        self.encoder, self.decoder = nn.Embedding(ntoken, d_model), nn.Linear(d_model, ntoken)
        self.register_buffer('pe', torch.randn(100, 1, d_model))
    def forward(self, src, src_mask):
        return self.decoder(self.transformer_encoder(self.encoder(src) + self.pe[:src.size(0)], src_mask))
"""
    kwargs = {"ntoken": V, "d_model": C, "nhead": 2, "d_hid": 16, "nlayers": L}
    model, weights = weights_of(source, **kwargs)
    found, said = ran(Torch(), request(place, source, weights, kwargs=kwargs))
    mask = nn.Transformer.generate_square_subsequent_mask(BLOCK)
    with torch.no_grad():
        right = model(torch.from_numpy(found.ids.T).long(), mask).transpose(0, 1).numpy()
    np.testing.assert_allclose(found.logits, right, atol=2e-5)
    assert found.hidden is not None and found.hidden[0].shape == (1, BLOCK, C) and any("time first" in s for s in said)


CONFIGS = {
    "a dataclass": """
        @dataclass
        class GPTConfig:
            vocab_size: int = 999
            n_layer: int = 12
            n_head: int = 2
            n_embd: int = 8
        class M(Body):
            def __init__(self, config): super().__init__(config.vocab_size, config.n_layer, config.n_head)
            def forward(self, idx): return self.body(idx)""",
    "an annotated dataclass": """
        @dataclass
        class Arguments:
            vocab_size: int
            n_layer: int
        class M(Body):
            def __init__(self, given: Arguments): super().__init__(given.vocab_size, given.n_layer)
            def forward(self, idx): return self.body(idx)""",
    "a dict": """
        class M(Body):
            def __init__(self, cfg): super().__init__(cfg['vocab_size'], cfg['n_layer'], n_head=cfg.get('n_head', 2))
            def forward(self, idx): return self.body(idx)""",
    "a namespace": """
        class M(Body):
            def __init__(self, args):
                assert args.device == "cpu"
                super().__init__(args.vocab_size, args.n_layer)
            def forward(self, idx): return self.body(idx)""",
    "a dict beside a class that is another's": """
        class TrainConfig:
            n_layer = 5
        class M(Body):
            def __init__(self, config, device): super().__init__(config['vocab_size'], config['n_layer'])
            def forward(self, idx): return self.body(idx)""",
    "a default that is filled": """
        class Node:
            def __init__(self, **kw): self.__dict__.update(kw)
        class M(Body):
            @staticmethod
            def get_default_config(): return Node(model_type='gpt', vocab_size=None, n_layer=None)
            def __init__(self, config): super().__init__(config.vocab_size, config.n_layer)
            def forward(self, idx): return self.body(idx)""",
    "a plain class": """
        class Config:
            vocab_size = 999
            n_layer = 12
        class M(Body):
            def __init__(self, config): super().__init__(config.vocab_size, config.n_layer)
            def forward(self, idx): return self.body(idx)""",
    "a class with a constructor": """
        class ModelConfig:
            def __init__(self, vocab_size=999, n_layer=12, n_head=2):
                self.vocab_size, self.n_layer, self.n_head = vocab_size, n_layer, n_head
        class M(Body):
            def __init__(self, config): super().__init__(config.vocab_size, config.n_layer, config.n_head)
            def forward(self, idx): return self.body(idx)""",
    "keywords": "class M(Body):\n    def forward(self, idx): return self.body(idx)",
    "a function": """
        class Model(Body):
            def forward(self, idx): return self.body(idx)
        def M(vocab_size, n_layer): return "tokenizer", Model(vocab_size, n_layer)""",
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("given", ["kwargs", "model_args", "config"])
def test_a_constructor_gets_what_it_takes(place: Path, kind: str, given: str) -> None:
    source = CORE + textwrap.dedent(CONFIGS[kind])
    _, weights = weights_of(CORE + "\nclass M(Body): pass\n")
    values = {"vocab_size": V, "n_layer": L}
    more: dict[str, Any] = (
        {"kwargs": values} if given == "kwargs" else {"extras": {given: values | {"device": "cuda"}, "n": 5}}
    )
    found, said = ran(Torch(), request(place, source, weights, **more))
    np.testing.assert_allclose(found.logits, expected(source, weights, found.ids), atol=2e-5)
    assert (said == []) == (given == "kwargs")
    assert given == "kwargs" or (f"vocab_size={V}" in said[0] and "device" not in said[0])


def test_characters_of_a_vocabulary_are_no_arguments(place: Path) -> None:
    source = (
        CORE + "\nclass M(Body):\n    def __init__(self, d=7):\n        super().__init__()\n        assert d == 7\n"
    )
    source += "    def forward(self, idx): return self.body(idx)\n"
    _, weights = weights_of(CORE + "\nclass M(Body): pass\n")
    _, said = ran(Torch(), request(place, source, weights, extras={"stoi": {"a": 0, "b": 1, "d": 2}}))
    assert said == []


@pytest.mark.parametrize("work", ["for step in range(10): open('trained', 'w')", "train()"])
def test_a_script_that_trains_below_its_class_is_run_up_to_it(place: Path, work: str) -> None:
    below = f"model = M()\ndef train(): open('trained', 'w')\n{work}\nmore = model.n\nhelper = [1]\n"
    below += "def late(x): return x * helper[0]\n"
    source = CORE + "\nclass M(Body):\n    def forward(self, idx): return late(self.body(idx))\n" + below
    _, weights = weights_of(CORE + "\nclass M(Body): pass\n")
    _, said = ran(Torch(), request(place, source, weights))
    assert not (place / "trained").exists() and "run up to M" in said[0]


def test_a_notebook_and_its_commands(place: Path) -> None:
    cells = [
        CORE,
        "!pip install torch\n",
        "%matplotlib inline\nclass M(Body):\n    def forward(self, i): return self.body(i)",
    ]
    text = json.dumps({"cells": [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in cells]})
    (place / "model.ipynb").write_text(text)
    _, weights = weights_of(CORE + "\nclass M(Body): pass\n")
    found, _ = ran(Torch(), request(place, "", weights, path=str(place / "model.ipynb")))
    np.testing.assert_allclose(found.logits, expected("", weights, found.ids), atol=2e-5)


def test_files_beside_it_and_packages_are_found(place: Path) -> None:
    folder = place / "ours" / "nets"
    folder.mkdir(parents=True)
    for name in ("ours/__init__.py", "ours/nets/__init__.py"):
        (place / name).write_text("")
    (folder / "core.py").write_text(CORE)
    (place / "ours" / "more.py").write_text("scale = 1.0\n")
    source = "from .core import Body\nfrom ..more import scale\nimport ours.more\n"
    source += "import wandb_of_nobody as w\nfrom w_nobody.x import log\n"
    (folder / "model.py").write_text(source + "class M(Body):\n    def forward(self, i): return self.body(i) * scale\n")
    _, weights = weights_of(CORE + "\nclass M(Body): pass\n")
    found, said = ran(Torch(), request(place, "", weights, path=str(folder / "model.py")))
    np.testing.assert_allclose(found.logits, expected("", weights, found.ids), atol=2e-5)
    assert said == ["not installed here, and stood in for by nothing: wandb_of_nobody, w_nobody"]


def test_a_folder_that_no_import_could_name_is_a_package(place: Path) -> None:
    folder = place / "TinyGPT-v1.2"
    folder.mkdir()
    (folder / "core.py").write_text(CORE)
    (folder / "model.py").write_text(
        "from .core import Body\nclass M(Body):\n    def forward(self, i): return self.body(i)\n"
    )
    _, weights = weights_of(CORE + "\nclass M(Body): pass\n")
    found, _ = ran(Torch(), request(place, "", weights, path=str(folder / "model.py")))
    np.testing.assert_allclose(found.logits, expected("", weights, found.ids), atol=2e-5)


def test_what_it_imports_by_its_full_name_is_found_above(place: Path) -> None:
    folder = place / "src" / "nets"
    folder.mkdir(parents=True)
    (folder / "core.py").write_text(CORE)
    text = "from src.nets.core import Body\nclass M(Body):\n    def forward(self, i): return self.body(i)\n"
    (folder / "model.py").write_text(text)
    assert imports.framework_of(folder / "model.py") == "torch"
    _, weights = weights_of(CORE + "\nclass M(Body): pass\n")
    found, said = ran(Torch(), request(place, "", weights, path=str(folder / "model.py")))
    np.testing.assert_allclose(found.logits, expected("", weights, found.ids), atol=2e-5)
    assert said == []


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "model.", "net.transformer."])
def test_prefixes_of_wrappers_do_not_matter(place: Path, prefix: str) -> None:
    source = CORE + "\nclass M(Body):\n    def forward(self, idx): return self.body(idx)\n"
    _, weights = weights_of(source)
    found, _ = ran(Torch(), request(place, source, {prefix + name: value for name, value in weights.items()}))
    np.testing.assert_allclose(found.logits, expected(source, weights, found.ids), atol=2e-5)


def test_a_buffer_that_only_the_checkpoint_has_is_left_out(place: Path) -> None:
    source = CORE + "\nclass M(Body):\n    def forward(self, idx): return self.body(idx)\n"
    _, weights = weights_of(source)
    more = weights | {"blocks.0.mask": np.ones((4, 4), np.float32)}
    _, said = ran(Torch(), request(place, source, more, left=["blocks.0.mask"]))
    assert said == ["left out, as M has no such buffer: blocks.0.mask"]
    with pytest.raises(UserError, match=r"M has no blocks\.0\.mask of the checkpoint \(0 missing, 1 unexpected\)"):
        ran(Torch(), request(place, source, more))


MLX = """
import mlx.core as mx
import mlx.nn as nn
class M(nn.Module):
    def __init__(self, vocab_size, num_layers, dims):
        super().__init__()
        self.embedding, self.pe = nn.Embedding(vocab_size, dims), nn.SinusoidalPositionalEncoding(dims)
        self.transformer = nn.TransformerEncoder(num_layers, dims, 2, norm_first=True, dropout=0.5)
        self.out_proj = nn.Linear(dims, vocab_size)
    def __call__(self, x):
        mask = nn.MultiHeadAttention.create_additive_causal_mask(x.shape[1])
        x = self.embedding(x)
        x = x + self.pe(mx.arange(x.shape[1]))
        return self.out_proj(self.transformer(x, mask))
"""


def test_a_model_of_mlx(place: Path) -> None:
    import mlx.core as mx

    space: dict[str, Any] = {}
    exec(MLX, space)
    model = space["M"](V, L, C)
    weights = {name: np.array(value) for name, value in Mlx().shapes(model).items()}
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in Mlx().shapes(model).items()}
    asked = request(place, MLX, weights, kwargs={"vocab_size": V, "num_layers": L, "dims": C}, block_size=0)
    found, said = ran(Mlx(), asked)
    Mlx().put(model, weights)
    np.testing.assert_allclose(found.logits, np.array(model(mx.array(found.ids))), atol=1e-5)
    assert said == [] and found.hidden is not None and len(found.hidden) == L + 1
    assert type(model.transformer.layers[0]).__name__ == "TransformerEncoderLayer"


PLAIN = "class M(Body): pass"
WRONG = {
    "raises": ("class M(Body):\n    def forward(self, i): return self.nothing", {}, "line 35, in forward: Attr"),
    "raises when built": ("class M(Body):\n    def __init__(self): 1 / 0", {}, "in __init__: ZeroDivisionError"),
    "no such class": ("class N(Body): pass", {}, "no M: has Block, Body, N"),
    "no model": ("def M(): return 5", {}, "M gives int, expected a model"),
    "raises when imported": ("raise RuntimeError('no\\nway')", {}, "in <module>: RuntimeError: no way"),
    "a file that is not there": ("open('input.txt')", {}, "put that under if __name__ == '__main__'"),
    "leaves": ("import sys\nsys.exit(3)", {}, "SystemExit: 3; the file does work"),
    "no Python": ("def M(:\n", {}, "line 34: SyntaxError"),
    "another kwarg": (PLAIN, {"n_layers": 2}, "M takes no 'n_layers' (did you mean 'n_layer'?)"),
    "a missing kwarg": (
        "class M(Body):\n    def __init__(self, n_vocab, width): super().__init__()",
        {"width": 3},
        """M needs n_vocab: give --kwargs '{"n_vocab": ...}'""",
    ),
    "a missing key of a config": (
        "class M(Body):\n    def __init__(self, cfg): super().__init__(cfg['v'], cfg['n'])",
        {"v": 11},
        """KeyError: 'n'; give --kwargs '{"n": ...}'""",
    ),
    "other sizes": (PLAIN, {"n_embd": 16}, "M: wte.weight has shape [11, 16], the checkpoint [11, 8]"),
    "more layers": (PLAIN, {"n_layer": 3}, "M has blocks.2.ln_1.weight, which the checkpoint does not have"),
    "fewer layers": (PLAIN, {"n_layer": 1}, "M has no blocks.1.fc.bias of the checkpoint (0 missing, 12"),
    "tied": (
        "class M(Body):\n    def __init__(self):\n        super().__init__()\n"
        "        self.head.weight = self.wte.weight",
        {},
        "wte.weight and head.weight are one array, but two in the checkpoint",
    ),
    "no logits": ("class M(Body):\n    def forward(self, i): return self.wte(i)", {}, "M gives (2, 48, 8) for ids"),
    "looks ahead": (
        "class M(Body):\n    def forward(self, i): return self.body(i, causal=False)",
        {},
        "the last token changes the logits of earlier ones: expected a causal model (its forward takes no mask)",
    ),
    "dropout": (
        "class M(Body):\n    def forward(self, i): return F.dropout(self.body(i), 0.5)",
        {},
        "gives other logits each time",
    ),
    "wants something": ("class M(Body):\n    def forward(self, i, f): return self.body(i)", {}, "its forward needs f,"),
    "is built of what is not installed": (
        "import nobody_has_this as n\nclass M(n.Module): pass",
        {},
        "nobody_has_this is not installed here; install nobody_has_this",
    ),
    "uses what is not installed": (
        "import nobody_has_this as n\nclass M(Body):\n    def forward(self, i): return n.run(i)",
        {},
        "nobody_has_this is not installed here",
    ),
    "not finite": ("class M(Body):\n    def forward(self, i): return self.body(i) * float('nan')", {}, "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_stands_in_the_way_is_said_in_one_line(place: Path, kind: str) -> None:
    source, kwargs, said = WRONG[kind]
    _, weights = weights_of(CORE + "\nclass M(Body): pass\n")
    with pytest.raises((UserError, TheirError)) as error:
        ran(Torch(), request(place, CORE + source + "\n", weights, kwargs=kwargs))
    assert said in str(error.value) and "\n" not in str(error.value)


ASIDE = """
import os, socket, urllib.request
def close(path, act):
    try:
        act()
        said = "reached"
    except OSError as error:
        said = str(error)
    os.environ.setdefault("SEEN", "")
    open(path, "a").write(said + "\\n")
close("seen.txt", lambda: socket.create_connection(("127.0.0.1", int(open("port.txt").read()))))
open("seen.txt", "a").write(" ".join(sorted(os.environ)) + "\\n")
print("x" * 300_000)
os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "1000")
"""


def test_the_process_has_no_network_no_secrets_and_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = CORE + ASIDE + "class M(Body):\n    def forward(self, i): return self.body(i)\n"
    _, weights = weights_of(CORE + "\nclass M(Body): pass\n")
    (place / "model.py").write_text(text)
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "https_proxy", "OPENAI_API_KEY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "secret")
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        (place / "port.txt").write_text(str(server.getsockname()[1]))
        held = {f"_orig_mod.{name}": torch.from_numpy(value) for name, value in weights.items()}
        held |= {f"_orig_mod.blocks.{n}.mask": torch.ones(BLOCK, BLOCK).tril() for n in range(L)}
        torch.save({"model": held, "model_args": {"n_layer": L, "vocab_size": V}}, place / "ckpt.pt")
        state = source.read(place / "ckpt.pt")
        made = roles.propose(state).map
        found = module.of_state(module.parse(f"{place / 'model.py'}:M"), state, made, say=said.append)
    np.testing.assert_allclose(found.logits, expected("", weights, found.ids), atol=2e-5)
    assert said == [f"executes {place / 'model.py'}:M in a process of its own, without network, at most 120 s"]
    reached, names = (place / "seen.txt").read_text().splitlines()
    assert "no network here" in reached
    assert {"HF_HUB_OFFLINE", "PATH"} <= set(names.split())
    assert not [name for name in names.split() if name.endswith(("TOKEN", "KEY")) or name.lower() == "https_proxy"]
    assert capfd.readouterr().out == ""
    assert not (place / "__pycache__").exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "open('up', 'w')\nopen('input.txt', 'w')\nwhile True: pass",
            "ended after 120 s, while it was imported; the file does",
        ),
        (
            "print('so long')\nos._exit(7)",
            "exit code 7 while it was imported, without an answer; it last said: so long",
        ),
        ("os.kill(os.getpid(), 11)", "ended by SIGSEGV while it was imported, without an answer"),
    ],
)
def test_a_process_that_dies_is_told_of(place: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str) -> None:
    (place / "model.py").write_text(f"import os\n{source}\n")
    (place / "light").mkdir()
    (place / "light" / "__init__.py").write_text("")
    runner = "import sys\nfrom mlxgpt.common.user_code import run\nrun.main(None, sys.argv[1:])\n"
    (place / "light" / "sample.py").write_text(runner)  # without a framework, which would take seconds to import
    asked = request(place, "", {})
    (place / "request.json").write_text(json.dumps(vars(asked)))
    monkeypatch.setenv("PYTHONPATH", str(place))

    def once_it_runs(process: subprocess.Popen[bytes], seconds: float) -> bool:
        while process.poll() is None and not (place / "up").exists():
            time.sleep(0.01)
        return process.poll() is None

    monkeypatch.setattr(module, "_is_late", once_it_runs)
    with pytest.raises(UserError) as error:
        module._process(module.parse(f"{place / 'model.py'}:M"), "light", place, 120)
    assert said in str(error.value)


def test_what_a_process_started_ends_with_it() -> None:
    """The sleeping child holds the pipe: if it lived, reading would hang."""
    command = ["sh", "-c", "sleep 1000 & echo done"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        process.wait()
        module._end(process)
        assert process.stdout and process.stdout.read() == b"done\n"


@pytest.mark.parametrize(
    ("given", "kwargs", "said"),
    [
        ("model.py", None, "expected FILE.py:CLASS"),
        ("model.py:", None, "expected FILE.py:CLASS"),
        ("none.py:GPT", None, "none.py: no such file"),
        ("model.txt:GPT", None, "model.txt: expected a .py file"),
        ("model.py:GPT", "{", "no JSON"),
        ("model.py:GPT", "[1]", "expected a JSON object"),
    ],
)
def test_what_names_no_module_is_refused(place: Path, given: str, kwargs: str | None, said: str) -> None:
    for name in ("model.py", "model.txt"):
        (place / name).write_text("")
    with pytest.raises(UserError, match=said):
        module.parse(given, kwargs)


def test_a_file_with_both_frameworks_is_run_by_that_of_the_class(place: Path) -> None:
    source = "import torch\nimport mlx.core as mx\nimport mlx.nn as nn\nfrom torch import nn as tnn\n"
    (place / "model.py").write_text(source + "class A(nn.Module): pass\nclass B(tnn.Module): pass\nclass C(A): pass\n")
    found = [imports.framework_of(place / "model.py", name) for name in "ABC"]
    assert found == ["mlx", "torch", "mlx"]


@pytest.mark.parametrize(
    ("source", "said"), [("import jax", "but jax: make a sample"), ("x = 1", "imports neither torch nor mlx: make")]
)
def test_a_file_of_another_framework_is_refused(place: Path, source: str, said: str) -> None:
    (place / "model.py").write_text(source)
    with pytest.raises(UserError, match=said):
        module.run(module.parse(f"{place / 'model.py'}:M"), {"x1": {}}, Sizes(V), {})
