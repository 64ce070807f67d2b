"""What is no animal of the zoo: other networks, broken files, wrong samples; each with what the refusal has to say."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from zoo.animals import Animal, ids, make
from zoo.choices import Spec
from zoo.weights import laid_out

SPEC = Spec(seed=901, style="snake", file="safetensors", position="halves", bias="none", act="silu", tie="untied")
"""The healthy animal that most are made of."""


@dataclass(frozen=True)
class Stranger:
    """``said``: words of which the refusal has each; ``code``: of the exit; ``sample``: whether one is given.

    ``known``: of ``--set``, what is not searched, so that a refusal takes no minute.
    """

    make: Callable[[Path], Path]
    said: tuple[str, ...]
    code: int = 2
    sample: bool = True
    known: tuple[str, ...] = ()


def _tensors(*named: tuple[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=dice) * 0.1 for name, shape in named}


def _saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, folder / "model.pt")
    return folder / "model.pt"


def cnn(folder: Path) -> Path:
    """A small ResNet, with torchvision's names."""
    named = [("conv1.weight", (16, 3, 7, 7)), *((f"bn1.{k}", (16,)) for k in ("weight", "bias", "running_mean"))]
    for layer in (1, 2):
        for block in (0, 1):
            at = f"layer{layer}.{block}"
            named += [(f"{at}.conv{n}.weight", (16, 16, 3, 3)) for n in (1, 2)]
            named += [(f"{at}.bn{n}.{k}", (16,)) for n in (1, 2) for k in ("weight", "bias", "running_mean")]
    return _saved(folder, _tensors(*named, ("fc.weight", (10, 16)), ("fc.bias", (10,))))


def lstm(folder: Path) -> Path:
    """A language model of two LSTM layers."""
    named = [("encoder.weight", (50, 32))]
    for n in (0, 1):
        named += [(f"rnn.weight_{k}_l{n}", (128, 32)) for k in ("ih", "hh")]
        named += [(f"rnn.bias_{k}_l{n}", (128,)) for k in ("ih", "hh")]
    return _saved(folder, _tensors(*named, ("decoder.weight", (50, 32)), ("decoder.bias", (50,))))


def seq2seq(folder: Path) -> Path:
    """T5's names."""
    named: list[tuple[str, tuple[int, ...]]] = [("shared.weight", (50, 32))]
    for side in ("encoder", "decoder"):
        for n in (0, 1):
            at = f"{side}.block.{n}.layer"
            named += [(f"{at}.0.SelfAttention.{k}.weight", (32, 32)) for k in "qkvo"]
            named += [(f"{at}.0.layer_norm.weight", (32,))]
            if side == "decoder":
                named += [(f"{at}.1.EncDecAttention.{k}.weight", (32, 32)) for k in "qkvo"]
                named += [(f"{at}.1.layer_norm.weight", (32,))]
            last = 1 if side == "encoder" else 2
            named += [(f"{at}.{last}.DenseReluDense.wi.weight", (64, 32))]
            named += [(f"{at}.{last}.DenseReluDense.wo.weight", (32, 64)), (f"{at}.{last}.layer_norm.weight", (32,))]
        named += [(f"{side}.final_layer_norm.weight", (32,))]
    return _saved(folder, _tensors(*named))


def experts(folder: Path) -> Path:
    """A mixture of experts, with Meta's names for the rest."""
    named: list[tuple[str, tuple[int, ...]]] = [("tok_embeddings.weight", (50, 32)), ("norm.weight", (32,))]
    for n in (0, 1):
        named += [(f"layers.{n}.attention.w{k}.weight", (32, 32)) for k in "qkvo"]
        named += [(f"layers.{n}.feed_forward.gate.weight", (4, 32))]
        for e in range(4):
            at = f"layers.{n}.feed_forward.experts.{e}"
            named += [(f"{at}.w1.weight", (48, 32)), (f"{at}.w2.weight", (32, 48)), (f"{at}.w3.weight", (48, 32))]
        named += [(f"layers.{n}.attention_norm.weight", (32,)), (f"layers.{n}.ffn_norm.weight", (32,))]
    return _saved(folder, _tensors(*named, ("output.weight", (50, 32))))


def mamba(folder: Path) -> Path:
    """A state space model."""
    named: list[tuple[str, tuple[int, ...]]] = [("backbone.embedding.weight", (50, 32))]
    for n in (0, 1):
        at = f"backbone.layers.{n}.mixer"
        named += [(f"{at}.A_log", (64, 16)), (f"{at}.D", (64,)), (f"{at}.in_proj.weight", (128, 32))]
        named += [(f"{at}.conv1d.weight", (64, 1, 4)), (f"{at}.conv1d.bias", (64,)), (f"{at}.x_proj.weight", (34, 64))]
        named += [(f"{at}.dt_proj.weight", (64, 2)), (f"{at}.dt_proj.bias", (64,)), (f"{at}.out_proj.weight", (32, 64))]
        named += [(f"backbone.layers.{n}.norm.weight", (32,))]
    return _saved(folder, _tensors(*named, ("backbone.norm_f.weight", (32,)), ("lm_head.weight", (50, 32))))


def latent(folder: Path) -> Path:
    """Keys and values from a latent, as DeepSeek's attention has them."""
    named: list[tuple[str, tuple[int, ...]]] = [("tok_emb.weight", (50, 32)), ("pos_emb.weight", (64, 32))]
    for n in (0, 1):
        at = f"trf_blocks.{n}"
        named += [(f"{at}.att.W_query.weight", (32, 32)), (f"{at}.att.W_DKV.weight", (8, 32))]
        named += [(f"{at}.att.W_UK.weight", (32, 8)), (f"{at}.att.W_UV.weight", (32, 8))]
        named += [
            (f"{at}.att.out_proj.weight", (32, 32)),
            (f"{at}.ff.0.weight", (128, 32)),
            (f"{at}.ff.2.weight", (32, 128)),
        ]
        named += [(f"{at}.norm{k}.weight", (32,)) for k in (1, 2)]
    return _saved(folder, _tensors(*named, ("final_norm.weight", (32,)), ("out_head.weight", (50, 32))))


def healthy(folder: Path) -> Animal:
    """The animal that is broken below; its sample lies beside it."""
    return make(SPEC, folder)


def _changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    animal = healthy(folder)
    save_file(change(load_file(animal.file)), animal.file)
    return animal.file


def nan(folder: Path) -> Path:
    """One number of one weight is none."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["transformer_blocks.1.mlp.up_proj.weight"][3, 5] = torch.nan
        return tensors

    return _changed(folder, change)


def layer_missing(folder: Path) -> Path:
    """Block 1 of 2 is not in the file: the sample is of a deeper model."""
    return _changed(folder, lambda found: {k: v for k, v in found.items() if not k.startswith("transformer_blocks.1.")})


def hole(folder: Path) -> Path:
    """A matrix of block 1 is not in the file."""
    return _changed(folder, lambda found: {k: v for k, v in found.items() if "1.mlp.down_proj" not in k})


def heads_swapped(folder: Path) -> Path:
    """In block 1 two heads of the queries changed places."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = tensors["transformer_blocks.1.attention.query_proj.weight"]
        D = SPEC.D
        tensors["transformer_blocks.1.attention.query_proj.weight"] = torch.cat(
            [weight[D : 2 * D], weight[:D], weight[2 * D :]]
        )
        return tensors

    return _changed(folder, change)


def swapped_seen(folder: Path) -> Path:
    """The same, with hidden states in the sample."""
    path = heads_swapped(folder)
    animal = make(SPEC, folder / "whole")
    given = ids(SPEC)
    logits, stream = animal.run(animal.state, given)
    np.savez(folder / "sample.npz", ids=given, logits=logits, hidden=stream)
    return path


def other_seed(folder: Path) -> Path:
    """The sample is of a model of the same sizes from another seed."""
    animal = healthy(folder)
    other = make(Spec(**{**vars(SPEC), "seed": 905}), folder / "other")
    animal.sample.write_bytes(other.sample.read_bytes())
    return animal.file


def beyond(folder: Path) -> Path:
    """The sample has a token that the vocabulary has not."""
    animal = healthy(folder)
    given = ids(SPEC)
    given[7] = SPEC.V
    np.savez(animal.sample, ids=given, logits=np.load(animal.sample)["logits"])
    return animal.file


def truncated(folder: Path) -> Path:
    """The last quarter of a .safetensors is gone."""
    animal = healthy(folder)
    whole = animal.file.read_bytes()
    animal.file.write_bytes(whole[: len(whole) * 3 // 4])
    return animal.file


def truncated_pt(folder: Path) -> Path:
    """The last quarter of a .pt is gone."""
    animal = make(Spec(**{**vars(SPEC), "file": "pt"}), folder)
    whole = animal.file.read_bytes()
    animal.file.write_bytes(whole[: len(whole) * 3 // 4])
    return animal.file


def absurd(folder: Path) -> Path:
    """A .safetensors whose header has a tensor of a petabyte."""
    healthy(folder)
    header = b'{"wte.weight":{"dtype":"F32","shape":[1099511627776,256],"data_offsets":[0,1125899906842624]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    return folder / "model.safetensors"


def twice(folder: Path) -> Path:
    """Two names that mean the token embedding, with different values."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "tok_emb.weight": tensors["token_embedding.weight"] + 1}

    return _changed(folder, change)


def whole_module(folder: Path) -> Path:
    """torch.save(model): a pickle of classes."""
    healthy(folder)
    torch.save(torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Linear(32, 50)), folder / "model.pt")
    return folder / "model.pt"


def nothing(folder: Path) -> Path:
    """A checkpoint without a model."""
    torch.save({"epoch": 3, "loss": 1.5}, folder / "model.pt")
    return folder / "model.pt"


def odd_one_out(folder: Path) -> Path:
    """A weight that nothing here has: a gate on each block."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, **{f"transformer_blocks.{n}.skip_gate.weight": torch.randn(32, 32) for n in (0, 1)}}

    return _changed(folder, change)


KNOWN = ("n_head=4", "placement=pre", "position=rope", "attn_scale=0", "embed_scale=1", "rope_theta=10000",
         "final_softcap=0", "logit_scale=off", "attn_softcap=0")  # fmt: skip

STRANGERS: dict[str, Stranger] = {
    "cnn": Stranger(cnn, ("convolution",), sample=False),
    "lstm": Stranger(lstm, ("rnn",), sample=False),
    "seq2seq": Stranger(seq2seq, ("decoder",), sample=False),
    "experts": Stranger(experts, ("experts",), sample=False),
    "mamba": Stranger(mamba, ("mixer",), sample=False),
    "latent": Stranger(latent, ("W_DKV",), sample=False),
    "nan": Stranger(nan, ("transformer_blocks.1.mlp.up_proj.weight", "NaN")),
    "hole": Stranger(hole, ("down_proj",)),
    "truncated": Stranger(truncated, ("truncated",)),
    "truncated pt": Stranger(truncated_pt, ("model.pt",)),
    "absurd": Stranger(absurd, ("wte.weight",)),
    "twice": Stranger(twice, ("tok_emb.weight",)),
    "whole module": Stranger(whole_module, ("--module",)),
    "nothing": Stranger(nothing, ("no tensors",), sample=False),
    "odd one out": Stranger(odd_one_out, ("skip_gate",)),
    "ids beyond": Stranger(beyond, ("50",)),
    "another seed": Stranger(other_seed, ("first token's logits already depart",), code=1, known=KNOWN),
    "layer missing": Stranger(layer_missing, ("first token's logits already depart",), code=1, known=KNOWN),
    "heads swapped": Stranger(heads_swapped, ("first token's logits agree",), code=1, known=KNOWN),
    "heads swapped, with hidden states": Stranger(swapped_seen, ("block 1 is the first",), code=1, known=KNOWN),
}
"""What it is called -> how it is made and refused."""

assert laid_out(SPEC).keys() >= {"token_embedding.weight", "transformer_blocks.1.mlp.up_proj.weight"}
