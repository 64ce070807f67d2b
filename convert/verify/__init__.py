"""``verify A B``: are two models the same? Compares tensors, config and tokenizer, then what the frameworks compute.

from convert import convert
from convert.verify import verify

convert("out/ckpt.pt", "model")                  # there
report = verify("out/ckpt.pt", "model")          # every rung, in every framework that is installed
assert report.agrees, report.findings
convert("model", "back.pt", to="nanogpt")        # and back
assert verify("out/ckpt.pt", "back.pt", weights_only=True).agrees    # files alone

verify("model", "transformers:model").to_json()  # transformers is the judge of what the folder means
convert("model", "model-q4", to="mlx-lm", bits=4)
report = verify("model", "model-q4", rungs=["tensors", "logits"], frameworks=["mlx"])
assert report.agrees, report.findings            # up to what 4 bits round, which report.notes say
"""

from convert.verify.comparison import verify
from convert.verify.report import RUNGS

__all__ = ["RUNGS", "verify"]
