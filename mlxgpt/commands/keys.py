"""The verb ``keys``: every recipe key with its default and meaning."""

import json
from argparse import Namespace

from mlxgpt.common import keys
from mlxgpt.common.errors import UserError
from mlxgpt.common.train import resume


def keys_command(args: Namespace) -> int:
    """Lists the keys that hold all of WORD.

    Raises:
        UserError: none does.
    """
    found = keys.search(args.words)
    if not found:
        asked = " ".join(args.words)
        raise UserError(f"{asked}: no key with this in its name or meaning{keys.or_list(keys.meant(asked))}")
    if args.json:
        print(json.dumps({"keys": [_described(key) for key in found]}))
        return 0
    section = ""
    for key in found:
        name, _, own = key.name.partition(".")
        if name != section:
            print(f"{chr(10) if section else ''}[{name}]")
            section = name
        flag = keys.FLAGS.get(key.name, "")
        default = str(key.default).lower() if isinstance(key.default, bool) else repr(key.default)
        print(f"{own:<22} {default:<16} {key.help}" + (f" ({flag})" if flag else ""))
    return 0


def _described(key: keys.Key) -> dict[str, object]:
    """A key as --json has it."""
    verbs = [verb for verb, read in (("train", keys.PRETRAINING), ("finetune", keys.FINETUNING))
             if key.name.partition(".")[0] in read]  # fmt: skip
    return {
        "key": key.name,
        "default": list(key.default) if isinstance(key.default, tuple) else key.default,
        "help": key.help,
        "flag": keys.FLAGS.get(key.name),
        "verbs": verbs,
        "on_resume": resume.may_change(key.name),
        "called": keys.PEERS.get(key.name, "").split(),
    }
