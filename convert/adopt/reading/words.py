"""Names into words: wq, W_Q, toQueries and q_proj.weight say the same once they are split."""

import re
from functools import cache

_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

QUERY = frozenset({"q", "qs", "query", "queries", "qry"})
KEY = frozenset({"k", "ks", "key", "keys"})
VALUE = frozenset({"v", "vs", "value", "values", "val", "vals"})
QKV = frozenset({"qkv", "qvk", "kqv", "kvq", "vqk", "vkq"})
ATTENTION = frozenset(
    {"attn", "att", "attention", "atten", "sa", "mha", "msa", "mhsa", "csa", "gqa", "mqa", "heads", "self", "mixer"}
)
MLP = frozenset(
    {
        "mlp",
        "ffn",
        "ff",
        "ffw",
        "ffwd",
        "fwd",
        "feed",
        "forward",
        "feedforward",
        "swiglu",
        "geglu",
        "glu",
        "pwff",
        "fnn",
    }
)
OUT = frozenset(
    {"o", "out", "output", "proj", "projection", "merge", "unify", "combine", "mix", "final", "dense", "to"}
)
NORM = frozenset(
    {"ln", "norm", "norms", "layernorm", "rms", "rmsnorm", "normalization", "normalize", "normalizer", "nrm"}
)
UP = frozenset(
    {"up", "fc", "in", "intermediate", "expand", "expansion", "inner", "enc", "hidden", "wi", "widen", "cfc"}
)
DOWN = frozenset({"down", "proj", "out", "output", "contract", "projection", "outer", "dec", "shrink", "squeeze", "o"})
GATE = frozenset({"gate", "gating", "gated"})
TOKEN = frozenset({"tok", "token", "tokens", "wte", "word", "words", "vocab", "char", "input", "txt", "text", "in"})
EMBED = frozenset({"emb", "embed", "embedding", "embeddings", "embedder", "embd", "lookup", "table", "e", "tte"})
POSITION = frozenset({"pos", "position", "positional", "positions", "wpe", "pe", "ape", "posn", "time", "timing"})
HEAD = frozenset(
    {"head", "lm", "unembed", "unembedding", "logits", "logit", "generator", "decoder", "classifier", "cls", "out"}
    | {"output", "vocab", "linear", "proj", "projection", "predict", "prediction", "fc", "to", "final", "u", "deembed"}
)
FINAL = frozenset({"final", "f", "last", "out", "output", "head", "post", "end", "decoder", "top"})

WEIGHT_KINDS = frozenset(
    {"weight", "weights", "kernel", "w", "scale", "gamma", "gain", "g", "a", "matrix", "mat", "embedding", "embeddings"}
)
BIAS_KINDS = frozenset({"bias", "biases", "b", "beta", "shift", "offset"})

_SHORT = {"qn": ("q", "norm"), "kn": ("k", "norm"), "lnf": ("ln", "f"), "nf": ("norm", "f")}
_KNOWN = frozenset().union(
    QUERY, KEY, VALUE, QKV, ATTENTION, MLP, OUT, NORM, UP, DOWN, GATE, TOKEN, EMBED, POSITION, HEAD, FINAL,
    WEIGHT_KINDS, BIAS_KINDS, _SHORT,
    {"layer", "layers", "block", "blocks", "self", "multi", "causal", "mask", "masked", "buffer", "rope",
     "rotary", "freq", "freqs", "inv", "cis", "cos", "sin", "cached", "cache", "tril", "triu", "kv", "pre",
     "post", "first", "second", "c", "h", "lin", "linear", "linears", "conv", "bn", "batch", "running",
     "expert", "experts", "router", "cross", "enc", "model", "transformer", "sublayer", "residual", "lora",
     "ids", "alibi", "slopes", "slope", "fuse", "fused"},
)  # fmt: skip
_SINGLE = frozenset("wbqkvofgue")


@cache
def words(name: str) -> tuple[str, ...]:
    """The words of a name, in small letters, numbers apart: blocks.3.W_qkv -> blocks 3 w qkv."""
    said = (word for part in _PARTS.findall(name) for word in _split(part.lower()))
    return tuple(each for word in said for each in _SHORT.get(word, (word,)))


@cache
def _split(word: str) -> tuple[str, ...]:
    """A word that is several known ones written together, as these; any other as it is."""
    if word in _KNOWN or word.isdigit():
        return (word,)
    best: dict[int, tuple[int, tuple[str, ...]]] = {0: (0, ())}
    for end in range(1, len(word) + 1):
        for start in range(end):
            piece = word[start:end]
            if start in best and (piece in _SINGLE or (len(piece) > 1 and piece in _KNOWN)):
                cost = best[start][0] + (3 if len(piece) == 1 else 1)
                if end not in best or cost < best[end][0]:
                    best[end] = (cost, (*best[start][1], piece))
    pieces = best.get(len(word), (0, (word,)))[1]
    singles = sum(len(piece) == 1 for piece in pieces)
    matrix = pieces[0] in ("w", "b") and len(pieces) == 2
    return pieces if matrix or (len(pieces) <= 3 and singles <= 1 and singles < len(pieces)) else (word,)


def kind(name: str) -> tuple[str, tuple[str, ...]]:
    """("weight" or "bias", the words without the one that says so); a name that says neither is a weight."""
    said = words(name)
    leaf = len(words(name.rpartition(".")[0]))
    if len(said) - leaf > 1 and said[leaf] in ("w", "b"):
        return "bias" if said[leaf] == "b" else "weight", said[:leaf] + said[leaf + 1 :]
    places = [place for place in reversed(range(len(said))) if place >= leaf or len(said) == leaf]
    for place in sorted(places, key=lambda place: len(said[place]) == 1):  # bias_a is a bias, and ln_b as well
        word = said[place]
        if word in ("embedding", "embeddings") and len(said) - leaf > 1:
            continue
        if word in BIAS_KINDS or word in WEIGHT_KINDS:
            rest = said[:place] + said[place + 1 :]
            return "bias" if word in BIAS_KINDS else "weight", rest
    return "weight", said
