"""What /metrics says, in Prometheus' text format 0.0.4."""

import math
import resource
import sys
import time
from collections.abc import Mapping

import mlxgpt
from mlxgpt.common.serve.work import Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
QUANTILES = (0.5, 0.9, 0.99)
_STARTED = time.time()


def text(worker: Worker, backend: str, statuses: Mapping[int, int]) -> str:
    """The metrics of an engine, and answers by HTTP status."""
    counts, out = worker.counts, []

    def say(name: str, kind: str, help: str, *samples: tuple[str, float]) -> None:
        out.append(f"# HELP mlxgpt_{name} {help}\n# TYPE mlxgpt_{name} {kind}\n")
        out.extend(f"mlxgpt_{name}{labels} {_number(value)}\n" for labels, value in samples)

    labels = {"version": mlxgpt.__version__, "backend": backend}
    say("build_info", "gauge", "Version and framework; always 1.", (_labels(labels), 1))
    say("model_info", "gauge", "A model that is served; always 1.", *_models(worker))
    say("up", "gauge", "1, or 0 when the engine died.", ("", worker.death is None))
    say("start_time_seconds", "gauge", "When the server started, in seconds since 1970.", ("", _STARTED))
    say("requests_running", "gauge", "Choices that are being generated.", ("", counts.running))
    say("requests_waiting", "gauge", "Requests in the queue.", ("", counts.waiting))
    say("requests_total", "counter", "Requests that the engine took.", ("", counts.requests))
    say("choices_finished_total", "counter", "Choices that ended by themselves.", ("", counts.finished))
    say("choices_cancelled_total", "counter", "Choices whose client left.", ("", counts.cancelled))
    say("choices_failed_total", "counter", "Choices that ended with an error.", ("", counts.failed))
    say("prompt_tokens_total", "counter", "Tokens of prompts.", ("", counts.prompt_tokens))
    say("generated_tokens_total", "counter", "Tokens that were generated.", ("", counts.generated_tokens))
    say("steps_total", "counter", "Steps of the batch, a token a row each, with drafts more.", ("", counts.steps))
    say("drafted_tokens_total", "counter", "Tokens that were guessed.", ("", counts.drafted_tokens))
    say("accepted_tokens_total", "counter", "Of those, tokens that were drawn.", ("", counts.accepted_tokens))
    say(
        "prefix_cache_tokens_total",
        "counter",
        "Tokens of prompts that were not read again.",
        ("", counts.cached_tokens),
    )
    say("prefix_cache_hits_total", "counter", "Prompts that began as an earlier one.", ("", counts.cache_hits))
    say("prefix_cache_misses_total", "counter", "Prompts that did not.", ("", counts.cache_misses))
    say("prefix_cache_bytes", "gauge", "Memory of the prefix cache, in bytes.", ("", counts.cache_bytes))
    latest = sorted(counts.first_token_seconds)
    say(
        "time_to_first_token_seconds",
        "summary",
        "From a request's arrival to its first token; the quantiles are of the latest 1,024.",
        *((_labels({"quantile": str(q)}), _quantile(latest, q)) for q in QUANTILES),
        ("_sum", counts.first_token_total),
        ("_count", counts.first_token_count),
    )
    say("resident_memory_peak_bytes", "gauge", "Peak memory of the process, in bytes.", ("", _peak()))
    answers = [(_labels({"status": str(status)}), count) for status, count in sorted(statuses.items())]
    say("http_responses_total", "counter", "Answers by HTTP status; 499: the client left before.", *answers)
    return "".join(out)


def _models(worker: Worker) -> list[tuple[str, float]]:
    return [(_labels({"model": name, "digest": served.digest}), 1) for name, served in worker.served.items()]


def _labels(labels: Mapping[str, str]) -> str:
    escaped = {k: v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for k, v in labels.items()}
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped.items()) + "}"


def _number(value: float) -> str:
    """A whole number, or a float; NaN, as Prometheus spells it."""
    return "NaN" if math.isnan(value) else repr(value) if isinstance(value, float) else str(int(value))


def _quantile(ordered: list[float], q: float) -> float:
    """The smallest value that at least this share does not exceed; NaN of none, as Prometheus has it."""
    return ordered[max(0, math.ceil(len(ordered) * q) - 1)] if ordered else math.nan


def _peak() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
