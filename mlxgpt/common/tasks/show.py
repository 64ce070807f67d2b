"""The outcome of tasks, as lines and as values for --json."""

from collections.abc import Mapping

from mlxgpt.common.tasks.task import Metric, Outcome


def lines(outcome: Outcome) -> list[str]:
    """A table of the metrics, one line each, and of the groups; then what was cut and noted."""
    shots = f", {outcome.shots} example{'s' * (outcome.shots != 1)} before each" if outcome.shots else ""
    made = [f"{outcome.task}: {outcome.questions} question{'s' * (outcome.questions != 1)}{shots}"]
    width = max(15, *(len(name) + 2 for name in outcome.metrics))
    made += [f"  {name:<{width}}{_number(metric)}" for name, metric in outcome.metrics.items()]
    if outcome.groups:
        made += _groups(outcome.groups, outcome.sizes)
    if outcome.cut:
        made.append(f"  {outcome.cut} rows longer than the context: their first tokens were left out")
    return [*made, *(f"  note: {note}" for note in outcome.notes)]


def _groups(groups: Mapping[str, Mapping[str, Metric]], sizes: Mapping[str, int]) -> list[str]:
    names = list(next(iter(groups.values())))
    first = max(len("group"), *map(len, groups)) + 2
    rows = [["questions", *names]]
    rows += [[str(sizes[group]), *map(_number, found.values())] for group, found in groups.items()]
    widths = [max(len(row[at]) for row in rows) + 2 for at in range(len(rows[0]))]
    cells = ["".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [f"  {name:<{first}}{row}".rstrip() for name, row in zip(["group", *groups], cells, strict=True)]


def _number(metric: Metric) -> str:
    value = f"{metric.value:.4f}" if abs(metric.value) < 1e6 else f"{metric.value:.4g}"
    return value if metric.stderr is None else f"{value} +- {metric.stderr:.4f}"


def described(outcome: Outcome) -> dict[str, object]:
    """The same for --json."""
    return {
        "task": outcome.task,
        "kind": outcome.kind,
        "questions": outcome.questions,
        "shots": outcome.shots,
        "metrics": _values(outcome.metrics),
        "groups": {
            group: {"questions": outcome.sizes[group], "metrics": _values(found)}
            for group, found in outcome.groups.items()
        },
        "cut": outcome.cut,
        "notes": list(outcome.notes),
    }


def _values(metrics: Mapping[str, Metric]) -> dict[str, dict[str, float | None]]:
    return {name: {"value": metric.value, "stderr": metric.stderr} for name, metric in metrics.items()}
