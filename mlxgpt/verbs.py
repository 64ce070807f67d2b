"""Every verb: what it is for, the function that runs it, what declares its arguments, and examples of use."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from mlxgpt.arguments import data, inference, looking, models, training


class Verb(NamedTuple):
    """A command: its help, the module:function that runs it, what declares its arguments, examples of use.

    ``resolves``: it chooses the backend and the device itself, since it may not need to import a framework.
    """

    help: str
    function: str
    declare: Callable[[argparse.ArgumentParser], None]
    examples: tuple[str, ...]
    resolves: bool = False


VERBS = {
    "train": Verb(
        "train a GPT on your texts or from a recipe, or resume a run",
        "mlxgpt.commands.train:train",
        training.train,
        (
            "train --data books/",
            "train pydocs --out runs/first",
            "train pydocs --steps 500 --set optim.lr=3e-4 --set model.n_layer=6",
            "train --resume runs/first --backend torch",
        ),
    ),
    "finetune": Verb(
        "fine-tune a model: LoRA, DoRA or all weights",
        "mlxgpt.commands.finetune:finetune",
        training.finetune,
        (
            "finetune --model runs/first --data pydocs-qa --out runs/qa",
            "finetune --model Qwen/Qwen3-0.6B --data rows.jsonl --rank 16 --epochs 2 --lr 1e-4",
            "finetune --config lora_config.yaml",
            "finetune --resume runs/qa --backend torch",
        ),
    ),
    "rl": Verb(
        "reinforcement learning: train a model on rewards of what it writes",
        "mlxgpt.commands.rl:reinforce",
        training.rl,
        (
            "rl --model runs/sums --prompts sums.jsonl --reward exact",
            "rl --model runs/qa --prompts asked.jsonl --reward reward.py:brief --method dr_grpo --set rl.kl=0.04",
            "rl --model runs/qa --prompts asked.jsonl --reward runs/judge --method best-of-n --out best.jsonl",
            "rl --resume runs/sums-grpo --backend torch",
        ),
    ),
    "plan": Verb(
        "predict memory, time and cost before anything runs",
        "mlxgpt.commands.plan:plan_command",
        training.plan,
        (
            "plan llama-10m --calibrate",
            "plan --model runs/first --data rows.jsonl --method lora --set adapter.rank=16",
            "plan llama-10m --budget '100 USD' --chip h100 --price 2.5 --out recipe.toml",
        ),
        resolves=True,
    ),
    "generate": Verb(
        "continue a prompt",
        "mlxgpt.commands.generate:generate_command",
        inference.generate,
        (
            "generate -m runs/first -p 'The list is'",
            "generate -m runs/first -p 'A' -p 'B' -n 50 --temperature 0 --json",
        ),
    ),
    "chat": Verb(
        "chat with a model that has a chat template",
        "mlxgpt.commands.chat:chat_command",
        inference.chat,
        (
            "chat -m runs/qa",
            "chat -m model --adapter runs/qa --system 'Answer briefly.' --temperature 0",
            "chat -m runs/qa --temperature 0 --seed 1",
        ),
    ),
    "serve": Verb(
        "serve OpenAI's API, and a page to chat on",
        "mlxgpt.commands.serve:serve_command",
        inference.serve,
        (
            "serve -m runs/qa",
            "serve -m runs/books --adapter qa=runs/qa --port 8080",
            "serve -m runs/qa --host 0.0.0.0 --api-key-file keys.txt",
        ),
    ),
    "eval": Verb(
        "loss, perplexity and bits per byte on data, scores on tasks",
        "mlxgpt.commands.eval:evaluate_command",
        inference.evaluate,
        (
            "eval -m runs/first -d book.txt",
            "eval -m runs/first -d book.txt --backend torch --json",
            "eval -m runs/first --task quiz.jsonl --shots 2",
            "eval -m model --task hellaswag --data hellaswag/ --limit 1000",
            "eval -m runs/new --task quiz.jsonl --against runs/old",
            "eval -m runs/new --prompts asked.jsonl --reward reward.py --against runs/old",
        ),
    ),
    "classify": Verb(
        "classify texts",
        "mlxgpt.commands.classify:classify_command",
        inference.classify,
        (
            "classify -m runs/spam -t 'You have won a prize'",
            "classify -m models/small --adapter runs/spam -f test.csv --json",
        ),
    ),
    "score": Verb(
        "score texts and answers with a reward model",
        "mlxgpt.commands.score:score_command",
        inference.score,
        (
            "score -m runs/reward -d pairs.jsonl",
            "score -m runs/reward -t 'a text' --json",
        ),
    ),
    "data fetch": Verb(
        "download a known corpus and check its sha256",
        "mlxgpt.commands.data:fetch_command",
        data.data_fetch,
        (
            "data fetch tinyshakespeare",
            "data fetch tinyshakespeare --from input.txt",
        ),
    ),
    "data inspect": Verb(
        "show what a corpus contains",
        "mlxgpt.commands.data:inspect_command",
        data.data_inspect,
        (
            "data inspect pydocs",
            "data inspect corpus/ --tokenizer runs/first --json",
            "data inspect rows.jsonl --model models/small --rows 5",
        ),
    ),
    "data prepare": Verb(
        "tokenize a corpus into shards",
        "mlxgpt.commands.data:prepare_command",
        data.data_prepare,
        ("data prepare corpus.jsonl --out shards --vocab-size 8192",),
    ),
    "data export": Verb(
        "pack a run's shards for another machine",
        "mlxgpt.commands.data:export_command",
        data.data_export,
        ("data export runs/first --out first.tar",),
    ),
    "tokenizer train": Verb(
        "train a tokenizer on a corpus",
        "mlxgpt.commands.tokenizer:train_tokenizer",
        data.tokenizer_train,
        ("tokenizer train corpus/ --out tok --kind sp-unigram --vocab-size 4096",),
    ),
    "tokenizer inspect": Verb(
        "describe a tokenizer, and show how it splits a text",
        "mlxgpt.commands.tokenizer:inspect_tokenizer",
        data.tokenizer_inspect,
        ("tokenizer inspect runs/first --text 'Hello world'",),
    ),
    "keys": Verb(
        "list every recipe key: default, meaning",
        "mlxgpt.commands.keys:keys_command",
        looking.keys,
        (
            "keys",
            "keys learning rate",
            "keys optim --json",
        ),
    ),
    "completion": Verb(
        "print what makes TAB complete commands in a shell",
        "mlxgpt.commands.completion:completion_command",
        looking.completion,
        ("completion zsh",),
    ),
    "runs": Verb(
        "list runs: status, best loss, size, age",
        "mlxgpt.commands.look.runs:list_command",
        looking.runs,
        (
            "runs",
            "runs experiments --json",
        ),
    ),
    "runs check": Verb(
        "check every file of a run against its checksums",
        "mlxgpt.commands.look.runs:check_command",
        looking.runs_check,
        ("runs check runs/first",),
    ),
    "diagnose": Verb(
        "why a run's loss is bad: each reason with its number and what to change",
        "mlxgpt.commands.look.diagnose:diagnose_command",
        looking.diagnose,
        (
            "diagnose runs/first",
            "diagnose runs/first --quick --json",
        ),
    ),
    "report": Verb(
        "write one page about runs: curves, settings, samples",
        "mlxgpt.commands.look.report:report_command",
        looking.report,
        (
            "report runs/first",
            "report runs/mlx runs/torch --out both.html --export figures",
            "report runs/first --watch",
        ),
    ),
    "convert": Verb(
        "convert a model from one format to another",
        "convert.commands:convert_command",
        models.convert,
        (
            "convert out/ckpt.pt model",
            "convert runs/first first-q4 --to mlx-lm --bits 4 --verify",
            "convert model model.gguf --dtype bfloat16",
            "convert adapters peft-adapter --to peft",
        ),
    ),
    "adopt": Verb(
        "take in a GPT of your own: find out what it is, with proof",
        "convert.adoption:adopt_command",
        models.adopt,
        (
            "adopt ckpt.pt",
            "adopt ckpt.pt --like sample.npz --out model",
            "adopt weights.npz --module model.py:GPT --kwargs '{\"n_head\": 4}' --out model",
            "adopt ckpt.pt --set n_head=4 --set activation=relu --unproved --out model",
        ),
        resolves=True,
    ),
    "fuse": Verb(
        "merge adapters into a model",
        "convert.commands:fuse_command",
        models.fuse,
        (
            "fuse -m runs/qa -o tuned",
            "fuse -m model --adapter runs/qa --adapter style:0.5 -o tuned --dtype bfloat16",
        ),
    ),
    "quantize": Verb(
        "store a model in fewer bits, and measure what that costs",
        "convert.commands:quantize_command",
        models.quantize,
        (
            "quantize runs/books books-q4 --bits 4 --data books/",
            "quantize model small --bits mixed:4.5 --data text.txt --eval-data other.txt --json",
            "quantize model model-q8 --bits 8 --method rtn",
            "quantize model tuned-q4 --bits 4 --adapter runs/qa --data text.txt --hessians kept",
        ),
    ),
    "verify": Verb(
        "compare two models",
        "convert.commands:verify_command",
        models.verify,
        (
            "verify out/ckpt.pt model",
            "verify model transformers:model --html report.html",
            "verify model model-q4 --frameworks mlx --json",
        ),
    ),
    "inspect": Verb(
        "show what is inside a model on a text: losses, attention, logit lens",
        "mlxgpt.commands.look.inspect:inspect_command",
        looking.inspect,
        (
            "inspect runs/first --text 'Return a list of the names'",
            "inspect runs/qa --text 'What does os.path.join do?' --chat --out page.html",
            "inspect model --text-file page.txt --limit 128 --layers 0,5-6 --json",
        ),
    ),
    "probe": Verb(
        "write what a framework computes from a model, as .npz",
        "mlxgpt.commands.probe:probe_command",
        looking.probe,
        ("probe model --tokens ids.npy --out .",),
    ),
    "doctor": Verb(
        "check this machine: chip, parity with the CPU, speed",
        "mlxgpt.commands.doctor:doctor_command",
        looking.doctor,
        (
            "doctor",
            "doctor --quick --backend torch --device mps",
            "doctor --json --out doctor.json",
        ),
    ),
    "demo": Verb(
        "train and fine-tune in MLX and in PyTorch, compare", "mlxgpt.commands.demo:demo", looking.demo, ("demo",)
    ),
}

# What people coming from elsewhere call a verb; without mlx_lm. before it and .py behind it.
CALLED = {
    "train": "pretrain pre-train fit run",
    "finetune": "lora sft fine-tune fine_tune tune finetune_lora finetune_full finetune_adapter dora adapt",
    "rl": "grpo rloo dapo ppo reinforce rlhf rlvr",
    "generate": "sample infer inference complete completion text prompt",
    "serve": "server api openai host",
    "eval": "evaluate test perplexity ppl lm_eval lm-eval",
    "classify": "predict",
    "data prepare": "prepare tokenize preprocess shard",
    "data fetch": "fetch download",
    "quantize": "gptq awq dwq compress",
    "convert": "export gguf convert_to_litgpt convert_from_litgpt convert_pretrained_checkpoint",
    "adopt": "import ingest load",
    "fuse": "merge merge_lora",
    "verify": "compare diff check",
    "plan": "estimate memory cost",
    "report": "plot view tensorboard show curves",
    "runs": "list ls",
    "keys": "config options settings params hyperparameters",
    "doctor": "bench benchmark info env system",
}
