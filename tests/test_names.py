"""Names: what peers call a flag, a key or a verb is answered with ours; ``keys`` finds keys; TAB completes."""

import json
import subprocess
import sys

import pytest

from mlxgpt import cli
from mlxgpt.common import keys, recipes
from mlxgpt.common.errors import UserError


def cure(verb: str, *words: str) -> str:
    """What is said behind an unknown flag."""
    parser = cli.Parser(prog=verb)
    cli.VERBS[verb].declare(parser)
    with pytest.raises(UserError, match="unknown flag") as said:
        cli._check_flags(parser, list(words), verb)
    return (
        str(said.value).removeprefix(f"unknown flag {words[0].partition('=')[0]}").removesuffix(f" (see {verb} --help)")
    )


def mean(*names: str) -> str:
    return f" (did you mean {' or '.join(map(repr, names))}?)"


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        # nanoGPT
        ("train --learning_rate=6e-4", ["--lr"]),
        ("train --max_iters=2000", ["--steps"]),
        ("train --batch_size=12", ["--batch-size"]),
        ("train --n_layer=4", ["--set model.n_layer=4"]),
        ("train --block_size=64", ["--set model.block_size=64"]),
        ("train --dropout=0.2", ["--set train.dropout=0.2"]),
        ("train --weight_decay=0.1", ["--set optim.weight_decay=0.1"]),
        ("train --beta2=0.99", ["--set optim.beta2=0.99"]),
        ("train --grad_clip=1.0", ["--set optim.clip=1.0"]),
        ("train --warmup_iters=100", ["--set optim.warmup=100"]),
        ("train --eval_interval=250", ["--set train.eval_every=250"]),
        ("train --compile=False", ["--set train.compile=off"]),
        ("train --compile=True", ["--set train.compile=on"]),
        ("train --always_save_checkpoint=False", ["--set train.save_every=VALUE"]),
        ("train --wandb_log=True", ["--set train.wandb=VALUE"]),
        ("train --decay_lr=False", ["--set optim.schedule=constant"]),
        ("train --dtype=float16", ["--set train.compute_dtype=bfloat16"]),
        ("train --vocab-size 4096", ["--set data.vocab_size=4096"]),
        ("finetune --optimizer adam", ["--set optim.name=adamw"]),
        ("train --init_from=gpt2", ["--init-from"]),
        ("train --out_dir=out", ["--out"]),
        ("train --dataset=shakespeare", ["--data"]),
        ("generate --start=x", ["--prompt"]),
        ("generate --max_new_tokens=5", ["--max-tokens"]),
        # mlx-lm
        ("finetune --iters 100", ["--steps"]),
        ("finetune --learning-rate 1e-5", ["--lr"]),
        ("finetune --lora-layers 8", ["--set adapter.layers=8"]),
        ("finetune --num-layers 8", ["--set adapter.layers=8"]),
        ("finetune --steps-per-eval 50", ["--set train.eval_every=50"]),
        ("finetune --adapter-path out", ["--out"]),
        ("generate --adapter-path out", ["--adapter"]),
        ("finetune --fine-tune-type dora", ["--method"]),
        ("finetune --max-seq-length 512", ["--set tune.block_size=512"]),
        ("finetune --grad-checkpoint", ["--set train.checkpoint_activations=true"]),
        ("generate --temp 0.5", ["--temperature"]),
        # Hugging Face
        ("finetune --num_train_epochs 3", ["--epochs"]),
        ("finetune --per_device_train_batch_size 4", ["--batch-size"]),
        ("finetune --lora_r 8", ["--rank"]),
        ("finetune --lora_alpha=16", ["--set adapter.alpha=16"]),
        ("finetune --max_steps 10", ["--steps"]),
        ("finetune --output_dir x", ["--out"]),
        ("finetune --model_name_or_path x", ["--model"]),
        ("train --model_name_or_path x", ["--init-from"]),
        ("train --warmup_ratio 0.1", ["--set optim.warmup=VALUE"]),
        ("train --bf16", ["--set train.compute_dtype=bfloat16"]),
        # litgpt
        ("finetune --train.max_seq_length 512", ["--set tune.block_size=512"]),
        ("finetune --checkpoint_dir x", ["--model"]),
        ("train --train.global_batch_size 4", ["--batch-size"]),
        ("train --eval.interval 4", ["--set train.eval_every=4"]),
        # ours, misspelled or another verb's
        ("train --stop_after 3", ["--stop-after"]),
        ("train --learning_rat 3", ["--lr"]),
        ("train --seed 3", ["--set train.seed=3", "--set sample.seed=3"]),
        ("train --model x", ["--init-from"]),
        ("convert --load_in_4bit", ["--bits"]),
    ],
)  # fmt: skip
def test_a_flag_of_a_peer_is_answered_with_ours(command: str, meant: list[str]) -> None:
    verb, *words = command.split()
    assert cure(verb, *words) == mean(*meant)
    if (ours := meant[0]).startswith("--set "):  # the cure parses, and names a key
        setting = ours.removeprefix("--set ")
        assert recipes.keys_of([setting]) <= {key.name for key in keys.every()}
        if not setting.endswith("=VALUE"):
            recipes.build(recipes.apply_sets({"adapter": {}, "tune": {}}, [setting]))


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("train --rank 8", "of mlxgpt finetune --model DIR --data PATH"),
        ("train --lora_alpha 8", "of mlxgpt finetune --model DIR --data PATH"),
        ("finetune --size 10m", "of mlxgpt train: fine-tuning keeps the sizes of --model DIR"),
        ("finetune --n_layer 4", "of mlxgpt train: fine-tuning keeps the sizes of --model DIR"),
        ("finetune --train", "leave it out"),
        ("finetune --mask-prompt", "leave it out"),
        ("finetune --gradient_accumulation_steps 4", "train.micro_batch_size"),
        ("train --config x.yaml", "mlxgpt train FILE.toml"),
        ("train --init_from=resume", "--resume RUN"),
        ("train --init_from=scratch", "leave it out"),
        ("train --bias=False", "model.qkv_bias=false, and so model.out_bias, model.mlp_bias and model.norm_bias"),
    ],
)
def test_a_flag_that_makes_no_sense_there_is_refused_with_the_cure(command: str, part: str) -> None:
    verb, *words = command.split()
    assert part in cure(verb, *words) and "did you mean" not in cure(verb, *words)


def test_every_name_of_a_peer_leads_to_a_key_or_a_flag_that_exists() -> None:
    flags = set()
    for verb in cli.VERBS.values():
        parser = cli.Parser()
        verb.declare(parser)
        flags |= set(parser._option_string_actions)
    assert set(keys.PEERS) <= flags | {key.name for key in keys.every()}
    assert set(keys.FLAGS.values()) <= flags and set(keys.FLAGS) <= {key.name for key in keys.every()}
    assert set(cli.CALLED) <= set(cli.VERBS)


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ("train.lr=3e-4", "unknown key train.lr (did you mean 'optim.lr'?)"),
        ("lr=3e-4", "(did you mean 'optim.lr=3e-4'?): expected section.key=value"),
        ("learning_rate=3e-4", "(did you mean 'optim.lr=3e-4'?)"),
        ("optim.learning_rate=1", "unknown key optim.learning_rate (did you mean 'lr'?)"),
        ("train.max_iters=5", "(did you mean 'steps'?)"),
        ("train.block_size=5", "(did you mean 'model.block_size' or 'tune.block_size'?)"),
        ("training.lr=5", "unknown section 'training' (did you mean 'optim.lr'?)"),
        ("optim.n_layer=2", "(did you mean 'model.n_layer'?)"),
        ("train.stpes=3", "unknown key train.stpes (did you mean 'steps'?)"),
    ],
)
def test_a_key_of_another_section_or_a_peer_is_answered_with_ours(item: str, part: str) -> None:
    with pytest.raises(UserError) as said:
        recipes.apply_sets({}, [item])
    assert part in str(said.value)


def test_so_is_one_in_a_recipe() -> None:
    for sections, part in [
        ({"train": {"lr": 1}}, "unknown key train.lr (did you mean 'optim.lr'?)"),
        ({"learning_rate": 1}, "learning_rate = 1: expected it in a section (did you mean 'optim.lr'?)"),
        ({"trian": {}}, "unknown section [trian] (did you mean 'train'?)"),
    ]:
        with pytest.raises(UserError) as said:
            recipes.build(sections)
        assert part in str(said.value)


def test_keys_are_listed_and_searched(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["keys", "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)["keys"]
    assert [each["key"] for each in everything] == [key.name for key in keys.every()]
    assert cli.main(["keys", "learning-rate", "--json"]) == 0
    found = {each["key"]: each for each in json.loads(capsys.readouterr().out)["keys"]}
    assert found["optim.lr"] == {
        "key": "optim.lr", "default": 1e-3, "help": "peak learning rate", "flag": "--lr",
        "verbs": ["train", "finetune"], "on_resume": "fixed", "called": ["learning_rate"],
    }  # fmt: skip
    assert "train.steps" not in found and len(found) < len(everything)
    assert cli.main(["keys", "MAX_iters"]) == 0
    assert capsys.readouterr().out.startswith("[train]\nsteps                  1000             optimizer updates")
    assert cli.main(["keys", "lerning_rate"]) == 2
    assert "did you mean 'optim.lr'?" in capsys.readouterr().err


COMPLETED = {
    "tra": {"train"},
    "data ": {"fetch", "inspect", "prepare", "export", "-h", "--help"},
    "train --si": {"--size"},
    "train --size 1": {"1m", "10m", "124m"},
    "train llama-1": {"llama-10m"},
    "train --set optim.cl": {"optim.clip="},
    "train --set adapter.alpha": {""},
    "finetune --set adapter.alpha": {"adapter.alpha=", "adapter.alphas="},
    "runs ch": {"check"},
}
ASK = """
import io, json, os, sys
from mlxgpt.commands import completion

def leave(code):
    raise SystemExit(code)

for line in json.loads(sys.argv[1]):
    os.environ |= {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    out = io.StringIO()
    try:
        completion.complete(output_stream=out, exit_method=leave)
    except SystemExit:
        print(json.dumps([each.strip() for each in out.getvalue().split("\\x0b")]))
"""


def test_tab_completes_verbs_flags_choices_recipes_and_keys() -> None:
    lines = json.dumps([f"mlxgpt {line}" for line in COMPLETED])
    done = subprocess.run([sys.executable, "-c", ASK, lines], capture_output=True, text=True, check=True)
    answers = [set(json.loads(line)) for line in done.stdout.splitlines()]
    assert dict(zip(COMPLETED, answers, strict=True)) == COMPLETED


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "mlxgpt" in script
    if shell == "bash":
        done = subprocess.run(
            ["bash", "-c", f"{script}\ncomplete -p mlxgpt"], capture_output=True, text=True, check=True
        )
        assert "_python_argcomplete" in done.stdout


def test_help_does_not_load_what_completes() -> None:
    code = "import sys\nfrom mlxgpt import cli\ncli.main([])\nassert 'argcomplete' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
