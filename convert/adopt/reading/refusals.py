"""State dicts that are no decoder of this kind, and tensors that nothing explains: one line each."""

from collections.abc import Iterable, Mapping

from convert.adopt.reading import words
from convert.adopt.reading.blocks import Item
from mlxgpt.common.errors import UserError

SCALES = frozenset({"ls", "layerscale", "lambda", "lambdas", "alpha", "resweight", "rezero", "skip", "temperature"})
_EXPECTED = "expected a decoder: an embedding, blocks of attention and an MLP, and a head"
# words that follow each other in a name -> what it is found in
_MARKS: tuple[tuple[str, str], ...] = tuple(
    (f" {marks} ", what)
    for marks, what in (
        ("running mean", "a network with BatchNorm"),
        ("num batches tracked", "a network with BatchNorm"),
        ("weight ih", "a recurrent network"),
        ("weight hh", "a recurrent network"),
        ("receptance", "RWKV: no attention"),
        ("time decay", "RWKV: no attention"),
        ("time mix", "RWKV: no attention"),
        ("a log", "a state-space model (Mamba): no attention"),
        ("dt proj", "a state-space model (Mamba): no attention"),
        ("experts", "a mixture of experts"),
        ("expert", "a mixture of experts"),
        ("router", "a mixture of experts"),
        ("cross attn", "an encoder and decoder with cross-attention"),
        ("cross attention", "an encoder and decoder with cross-attention"),
        ("crossattention", "an encoder and decoder with cross-attention"),
        ("encoder attn", "an encoder and decoder with cross-attention"),
        ("encdecattention", "an encoder and decoder with cross-attention"),
        ("src attn", "an encoder and decoder with cross-attention"),
        ("token type embeddings", "an encoder (BERT)"),
        ("pooler", "an encoder (BERT)"),
        ("patch embed", "a vision transformer"),
        ("patch embedding", "a vision transformer"),
        ("cls token", "a vision transformer"),
        ("lora a", "a LoRA adapter: merge it into its model first"),
        ("lora b", "a LoRA adapter: merge it into its model first"),
        ("qweight", "quantized weights"),
        ("qzeros", "quantized weights"),
    )
)


def check(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses what is certainly another kind of model.

    Raises:
        UserError: what was found, with a tensor as evidence.
    """
    for name, shape in shapes.items():
        parts = name.split(".")
        said = {word for part in parts for word in words.words(part)}
        text = " | ".join(f" {' '.join(words.words(part))} | {part.lower().replace('_', ' ')} " for part in parts)
        for marks, what in _MARKS:
            if marks in text:
                raise UserError(f"{what}: found {name} {list(shape)}: {_EXPECTED}")
        small = len(shape) >= 4 and any(1 < one == two <= 11 for one, two in (shape[-2:], shape[:2]))
        if small and not said & words.ATTENTION and (len(shape) == 4 or "conv" in text):
            raise UserError(f"a convolutional network: found {name} {list(shape)}: {_EXPECTED}")
    blocks = [name for name in shapes if {"self", "attn"} <= set(words.words(name))]
    cross = next((name for name in shapes if {"multihead", "attn"} <= set(words.words(name))), None)
    if blocks and cross:
        raise UserError(
            f"an encoder and decoder with cross-attention: found {cross} {list(shapes[cross])}: {_EXPECTED}"
        )


def unread(mats: Iterable[Item], width: int) -> str:
    """Why no roles fit the matrices of a block."""
    shown = ", ".join(f"{item.theirs} {list(item.shape)}" for item in list(mats)[:8]) or "none"
    return (
        f"the matrices of a block do not make attention and an MLP for n_embd = {width}: found {shown}: {_EXPECTED};"
        " name the tensors with --map"
    )


def unexplained(items: tuple[Item, ...]) -> str:
    """Tensors that no role of this decoder explains."""
    shown = ", ".join(f"{item.theirs} {list(item.shape)}" for item in items[:4])
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return f"found {shown}{more}: no part of a decoder that is computed here; --map may name its rule, or leave it out"
