"""Names of tensors as files have them: what wrappers put before them, and what they are without.

torch.compile, DataParallel, FSDP, Lightning and PEFT save the modules of a model under the attribute in which they
hold it, and models of several parts under ``language_model.``. None of these words begins a name of a model's own.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

# what a wrapper may put before a model's names, once or several times, and what models call their own trunk
OUTER = {"model", "language_model", "base_model", "transformer", "gpt_neox"}
# what may also stand in the middle, where single blocks are wrapped
ANYWHERE = {"_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def peel(name: str, keep: Collection[str] = ()) -> str:
    """``name`` without the words that wrappers and trunks put before it; those in ``keep`` stay."""
    words = [word for word in name.split(".") if word not in ANYWHERE]
    start = 0
    while start < len(words) - 2 and words[start] in OUTER and words[start] not in keep:
        start += 1
    return ".".join(words[start:])


def trunks(modules: Iterable[str]) -> dict[str, str]:
    """First word of a peeled module's name -> what stands before it in ``modules``."""
    made = {}
    for module in modules:
        peeled = peel(f"{module}.weight").removesuffix(".weight")
        made[peeled.split(".")[0]] = module.removesuffix(peeled)
    return made


def full_name(name: str, trunks: Mapping[str, str]) -> str:
    """A file's name for a tensor as the architecture has it; one that is not of it stays as it is."""
    peeled = peel(name)
    first = peeled.split(".")[0]
    return trunks[first] + peeled if first in trunks else name


def strangers(names: Collection[str], expected: Collection[str]) -> str:
    """In words, what unknown prefix most of ``names`` have before what is expected; '' if none has."""
    known = {peel(name) for name in expected}
    found: Counter[str] = Counter()
    for name in names:
        starts = [0] + [i + 1 for i, letter in enumerate(name) if letter == "."]
        found[name[: next((at for at in starts if peel(name[at:]) in known), 0)]] += 1
    del found[""]
    if not found:
        return ""
    prefix, count = found.most_common(1)[0]
    share = f"all {count}" if count == len(names) else f"{count} of {len(names)}"
    return f"{share} tensors begin with {prefix!r}, which is not known"
