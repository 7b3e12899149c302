"""A benchmark in plain words: what to take away from a workload, and how, where and with what it was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from peftkit.bench.document import Document
from peftkit.bench.report.columns import NOTHING, Value
from peftkit.bench.report.view import Sheet


def sentences(sheet: Sheet) -> list[tuple[str, str]]:
    """What to take away from a workload: a heading and a sentence each."""
    said: list[tuple[str, str]] = []
    choice = [row.label for row in sheet.having("parameters") if row.values["parameters"].number]
    among = "Of all methods that train anything"
    if "quality" in sheet.rankings:
        best = _best(sheet, "quality", [row.label for row in sheet.having("quality")])
        said.append(("Best quality", _quality_sentence(sheet, best)))
        if tied := sheet.rankings["quality"].tied[best]:
            choice, among = [best, *tied], "Of those"
    said += [
        (heading, f"{among}, {_least(sheet, key, having)}")
        for key, heading in (("memory", "Least memory"), ("step", "Fastest step"), ("parameters", "Fewest parameters"))
        if key in sheet.rankings and len(having := [row.label for row in sheet.having(key) if row.label in choice]) > 1
    ]
    if sheet.failed:
        said.append(("Not measured in full", f"{_names([row.label for row in sheet.failed])}; the reasons are below."))
    return said


def _best(sheet: Sheet, key: str, labels: Sequence[str]) -> str:
    """By the middle of the interval; who is tied with it is said beside it."""
    values = {row.label: row.values[key].number for row in sheet.having(key)}
    higher = next(column.better for column in sheet.columns if column.key == key) == "higher"
    return (max if higher else min)(labels, key=values.__getitem__)


def _quality_sentence(sheet: Sheet, best: str) -> str:
    ranking, value = sheet.rankings["quality"], _value(sheet, "quality", best)
    metric, tied, others = sheet.workload["metric"], ranking.tied[best], len(ranking.place) - 1
    unit = f" {metric['unit']}" if metric["unit"] else ""
    first = f"{best} has the best {metric['name']}: {value.text}{unit} ({value.interval})"
    if not others:
        return f"{first}; no other method was measured."
    if len(tied) == others:
        return (
            f"{first}, but the data cannot tell it from any of the {others} others."
            if others > 1
            else (f"{first}, but the data cannot tell it from {tied[0]}.")
        )
    if tied:
        verb = "is" if others - len(tied) == 1 else "are"
        return f"{first}, tied with {_names(tied)}; {others - len(tied)} of {others} others {verb} clearly worse."
    return f"{first}; the others are clearly worse."


def _least(sheet: Sheet, key: str, labels: Sequence[str]) -> str:
    best = _best(sheet, key, labels)
    value, tied = _value(sheet, key, best), [a for a in sheet.rankings[key].tied[best] if a in labels]
    also = f", tied with {_names(tied)}" if tied else ""
    if key == "memory":
        most = max(sheet.having(key), key=lambda row: row.values[key].number)
        rest = f" (the most is {most.values[key].text}, {most.label})" if most.label != best else ""
        return f"{best} needs the least memory: {value.text}{rest}{also}."
    if key == "step" and len(tied) == len(labels) - 1:
        return "the data cannot tell whose step is the fastest."
    if key == "step":
        return f"{best} has the fastest step: {value.text} of full fine-tuning's time ({value.interval}){also}."
    return f"{best} trains the fewest parameters: {value.text}{f' ({value.remark})' if value.remark else ''}{also}."


def _value(sheet: Sheet, key: str, label: str) -> Value:
    return next(row.values[key] for row in sheet.rows if row.label == label)


def _names(labels: Sequence[str], most: int = 6) -> str:
    """`a, b and c`; of many, the first few and how many more there are."""
    shown = list(labels if len(labels) <= most else [*labels[: most - 1], f"{len(labels) - most + 1} more"])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def tied_with(sheet: Sheet, key: str, label: str) -> str:
    """`tied with a and b`, or nothing."""
    tied = sheet.rankings[key].tied[label]
    return f"tied with {_names(tied, most=len(tied))}" if tied else ""


def facts(document: Document) -> list[tuple[str, str]]:
    """The machine, the software and the run, as headings and texts."""
    here: Mapping[str, Any] = document["environment"]
    gpu, git = here["gpu"], here["git"]
    found = [
        ("made", f"{document['created']}, by `{' '.join(document['command'])}`"),
        ("device", document["settings"]["device"]),
        ("machine", f"{here['machine']}: {here['cpu']}, {here['cores']} cores, {here['memory_bytes'] / 1e9:.0f} GB"),
        (
            "GPU",
            f"{gpu['name']}, {gpu['memory_bytes'] / 1e9:.0f} GB, driver {gpu['driver'] or 'unknown'}"
            if gpu
            else "none",
        ),
        ("threads", str(here["threads"])),
        ("system", f"{here['platform']}; Python {here['python']}; torch {here['torch']}"),
        ("load", f"{_loads(here['load_before'])} before, {_loads(here['load_after'])} after (1, 5, 15 minutes)"),
        (
            "settings",
            _pairs({k: v for k, v in document["settings"].items() if k not in ("methods", "workloads", "device")}),
        ),
        ("packages", _pairs(here["packages"])),
        ("plugins", ", ".join(f"{p['method']} from {p['distribution']} {p['version']}" for p in here["plugins"])),
        ("variables", _pairs(here["variables"])),
        ("commit", f"{git['commit']}{', with changes' if git['dirty'] else ''}" if git else "unknown"),
    ]
    return [(heading, text or "none") for heading, text in found]


def _loads(loads: Sequence[float] | None) -> str:
    return ", ".join(f"{load:.2f}" for load in loads) if loads else NOTHING


def _pairs(mapping: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in mapping.items())


MEASURED = (
    "Each figure is of one machine, one model and one batch size. Compare the rows of a table, not two machines.",
    (
        "Memory is counted, not sampled: every tensor that is alive in one real training step, by what it is for. It "
        "is the same in every run. So are parameters, FLOPs and the size of the file."
    ),
    (
        "Times are ratios. The method and full fine-tuning (or, for inference, the bare model) run in turn in one "
        "process, so that a drift of the machine meets both. The figure is the median of the pairs' ratios, with its "
        "bootstrap interval of 95 %."
    ),
    (
        "Quality is the mean over seeds. Its 95 % interval is Student's. Where the metric is a share of test items, it "
        "is widened by the noise of the test set."
    ),
    (
        "Two methods are tied where the 95 % interval of their difference or ratio leaves open which is better, or "
        "where there are too few samples to say. A method's place is one more than the number of methods that are "
        "clearly better; “2=” is a shared second place. Each comparison stands at 95 % by itself: of many, a few err."
    ),
)
"""How it was measured: what a reader must know in order not to be misled."""
