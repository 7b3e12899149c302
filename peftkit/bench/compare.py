"""Two documents of `peftkit bench`, before and after a change: is anything worse?

Three kinds of figures, judged in three ways:

* *Exact* ones (parameters, bytes, FLOPs, the size of the file) are the same in every run, so that any difference is
  real. A cost that grew is a regression and one that fell is an improvement; a count that moved at all is a regression,
  because the method no longer does the same.
* *Times* are judged only if both documents come from one machine, and only if the whole 95 % interval of after ÷ before
  is beyond the threshold. Where there are too few samples for an interval, nothing is said.
* *Quality* is worse where the 95 % interval of the difference of the means lies on the bad side of 0.

What cannot be compared is refused with the reason: another base model, other data, other hyperparameters or another
device.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from peftkit.bench import statistics
from peftkit.bench.document import Document, one_line
from peftkit.errors import FieldError
from peftkit.tables import count, size, table

FEWEST = 6
"""Samples below which no interval of a median covers 95 %: that n lie on one side of it has the chance 2 · 0.5ⁿ."""

COUNTS = ("trainable_parameters", "total_parameters", "adapted_layers")
COSTS = ("adapter_file_bytes", "forward_flops", "backward_flops")
GPU = ("gpu_peak_allocated", "gpu_peak_reserved")
PAIRS = {"step_pairs": "step ratio", "inference_pairs": "inference ratio", "merged_pairs": "merged inference ratio"}
SAMPLES = ("wrap", "save", "load", "merge", "unmerge")

Kind = Literal["refused", "regression", "improvement", "changed", "note"]
Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One thing to say about two documents; `workload` and `label` are empty where it is about the whole."""

    kind: Kind
    text: str
    workload: str = ""
    label: str = ""
    figure: str = ""
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What differs, worst first, and how many figures were judged.

    `exit_code` is 1 if anything is worse; 2 if something, or everything, cannot be compared; else 0.
    """

    findings: tuple[Finding, ...]
    judged: int

    @property
    def exit_code(self) -> int:
        """0: the same or better; 1: a regression; 2: not comparable."""
        kinds = {finding.kind for finding in self.findings}
        return 1 if "regression" in kinds else 2 if "refused" in kinds else 0

    def of(self, kind: Kind) -> list[Finding]:
        """The findings of one kind."""
        return [finding for finding in self.findings if finding.kind == kind]

    def __str__(self) -> str:
        """A table, and the verdict in one line."""
        rows = [[f.kind, f.workload, f.label, f.figure, f.text] for f in self.findings]
        verdict = {0: "the same or better", 1: "worse", 2: "not comparable"}[self.exit_code]
        counted: tuple[tuple[Kind, str], ...] = (
            ("regression", "regression"),
            ("improvement", "improvement"),
            ("refused", "refusal"),
        )
        counts = [count(len(self.of(kind)), noun) for kind, noun in counted if self.of(kind)]
        end = f"{verdict}: {self.judged:,} figures judged, {', '.join(counts) or 'no difference that counts'}"
        return table(["finding", "workload", "method", "figure", "what"], rows) + f"\n\n{end}" if rows else end


def compare(before: Document, after: Document, threshold: float = 1.10) -> Comparison:
    """Judge `after` against `before`, two documents that `peftkit.bench.document.read` has returned.

    `threshold` is the ratio of times, after ÷ before, that its whole interval must exceed to count as a regression.

    Raises `FieldError` if the threshold is below 1.
    """
    if not threshold >= 1:
        raise FieldError(f"threshold={threshold} is below 1; 1.10 lets times grow by 10 %")
    refused = list(_refused_whole(before, after))
    if refused:
        return Comparison(tuple(refused), judged=0)
    judge = _Judge(threshold, same_machine=_same_machine(before, after))
    judge.findings += _notes(before, after)
    olds, news = _cells(before), _cells(after)
    workloads = (
        {each["name"]: each for each in before["workloads"]},
        {each["name"]: each for each in after["workloads"]},
    )
    unlike = {name: reason for name in workloads[0] if (reason := _unlike(name, *workloads))}
    for name, reason in unlike.items():
        judge.say("refused", reason, workload=name)
    for (workload, label), old in olds.items():
        if workload not in unlike:
            judge.cell(old, news.get((workload, label)), workloads[1][workload])
    for workload, label in news.keys() - olds.keys():
        judge.say("note", "only in the second document", workload=workload, label=label)
    if judge.too_few:
        judge.say("note", f"{count(judge.too_few, 'time')} not judged: fewer than {FEWEST} samples")
    order: tuple[Kind, ...] = ("regression", "refused", "improvement", "changed", "note")
    found = sorted(judge.findings, key=lambda f: (order.index(f.kind), f.workload, f.label))
    return Comparison(tuple(found), judge.judged)


# ------------------------------------------------------------------------------------ what can be compared


def _cells(document: Document) -> dict[tuple[str, str], Cell]:
    return {(cell["workload"], cell["label"]): cell for cell in document["cells"]}


def _refused_whole(before: Document, after: Document) -> Iterator[Finding]:
    old, new = before["settings"]["device"], after["settings"]["device"]
    if old != new:
        yield Finding("refused", f"measured on {old!r} before and on {new!r} after; measure both on one device")
    elif not _cells(before).keys() & _cells(after).keys():
        yield Finding("refused", "no method on any workload is in both documents")


def _unlike(name: str, before: Mapping[str, Cell], after: Mapping[str, Cell]) -> str | None:
    """Why the figures of a workload are not of the same thing in both documents."""
    if name not in after:
        return "the second document does not have this workload"
    for key, what in (
        ("fingerprint", "the base model"),
        ("model", "the model's class"),
        ("data", "the data"),
        ("per_step", "the size of a batch"),
        ("unit", "the unit"),
        ("metric", "the metric"),
    ):
        if before[name][key] != after[name][key]:
            return f"{what} is another ({before[name][key]} before, {after[name][key]} after): measure both on the same"
    return None


def _same_machine(before: Document, after: Document) -> bool:
    old, new = before["environment"], after["environment"]
    return all(old[key] == new[key] for key in ("machine", "threads", "gpu", "variables"))


def _notes(before: Document, after: Document) -> Iterator[Finding]:
    old, new = before["environment"], after["environment"]
    for key in ("machine", "threads", "gpu", "variables"):
        if old[key] != new[key]:
            yield Finding("note", f"{key}: {old[key]} before, {new[key]} after, so times are not judged")
    for key in ("python", "torch"):
        if old[key] != new[key]:
            yield Finding("note", f"{key}: {old[key]} before, {new[key]} after; a difference may come from it")


# ------------------------------------------------------------------------------------------------ judging


class _Judge:
    def __init__(self, threshold: float, *, same_machine: bool) -> None:
        self.threshold, self.same_machine = threshold, same_machine
        self.findings: list[Finding] = []
        self.judged = 0
        self.too_few = 0

    def say(self, kind: Kind, text: str, **about: Any) -> None:
        self.findings.append(Finding(kind, text, **about))

    def cell(self, old: Cell, new: Cell | None, workload: Cell) -> None:
        about = {"workload": old["workload"], "label": old["label"]}
        if new is None:
            return self.say("refused", "the second document does not have it; run it again with this method", **about)
        for key in ("method", "hyperparameters"):
            if old[key] != new[key]:
                return self.say("refused", f"another {key}: {old[key]} before, {new[key]} after", **about)
        if old["status"] != new["status"]:
            kind: Kind = (
                "regression" if old["status"] == "ok" else "improvement" if new["status"] == "ok" else "changed"
            )
            fault = new["error"] and f": {one_line(new['error']['message'])}"
            self.say(kind, f"{old['status']} before, {new['status']} after{fault or ''}", figure="status", **about)
        if old["exact"] and new["exact"]:
            self.exact(old["exact"], new["exact"], about)
        if self.same_machine:
            self.times(old["times"] or {}, new["times"] or {}, about)
        if workload["metric"] and old["quality"] and new["quality"]:
            self.quality(old["quality"]["values"], new["quality"]["values"], workload["metric"], about)
        elif old["quality"]:
            self.say("note", "measured before, and not after", figure="quality", **about)
        return None

    def exact(self, old: Cell, new: Cell, about: dict[str, str]) -> None:
        for key in COUNTS:
            self.figure(key, old.get(key), new.get(key), about, lambda a, b: "regression" if a != b else None)
        for key in COSTS:
            self.figure(key, old.get(key), new.get(key), about, _cost)
        for key in GPU if self.same_machine else ():  # the allocator rounds and caches: not exact to the byte
            self.figure(key, old.get(key), new.get(key), about, self.beyond)
        self.figure("merge_error", old.get("merge_error"), new.get("merge_error"), about, _differs)
        for kind in ("memory", "estimated_memory"):
            before, after = old.get(kind) or {}, new.get(kind) or {}
            for part in before or after:  # the peak is the cost; its parts say where a difference comes from
                verdict = _cost if (kind, part) == ("memory", "peak") else _differs
                self.figure(f"{kind}.{part}", before.get(part), after.get(part), about, verdict)

    def figure(
        self,
        name: str,
        old: float | None,
        new: float | None,
        about: dict[str, str],
        verdict: Callable[[float, float], Kind | None],
    ) -> None:
        """A figure that both have is judged; one that was there and is gone cannot be."""
        if old is None or new is None:
            if old is not None:
                self.say("refused", "measured before, and not after", figure=name, before=old, **about)
            return
        self.judged += 1
        kind = verdict(old, new)
        if kind:
            self.say(kind, _change(name, old, new), figure=name, before=old, after=new, **about)

    def beyond(self, old: float, new: float) -> Kind | None:
        """For what is measured, not counted: only a ratio beyond the threshold says anything."""
        return "regression" if new > old * self.threshold else "improvement" if old > new * self.threshold else None

    def times(self, old: Cell, new: Cell, about: dict[str, str]) -> None:
        for key in (*PAIRS, *SAMPLES):
            name = PAIRS.get(key, f"{key} seconds")
            if old.get(key) and new.get(key):
                samples = [statistics.pair_ratios(each[key]) if key in PAIRS else each[key] for each in (old, new)]
                self.time(name, samples[0], samples[1], about)
            elif old.get(key):
                self.say("note", "measured before, and not after", figure=name, **about)

    def time(self, name: str, old: list[float], new: list[float], about: dict[str, str]) -> None:
        if min(len(old), len(new)) < FEWEST:
            self.too_few += 1
            return
        self.judged += 1
        if 1 / self.threshold <= median(new) / median(old) <= self.threshold:
            return  # the interval is around the middle: it cannot be clear of the threshold
        ratio = statistics.ratio_of_medians(new, old)
        text = f"{ratio.middle:.3f} of what it was (95 % interval {ratio.low:.3f} to {ratio.high:.3f})"
        if ratio.low > self.threshold:
            self.say("regression", text, figure=name, after=ratio.middle, before=1.0, **about)
        elif ratio.high < 1 / self.threshold:
            self.say("improvement", text, figure=name, after=ratio.middle, before=1.0, **about)

    def quality(self, old: list[float], new: list[float], metric: Cell, about: dict[str, str]) -> None:
        if min(len(old), len(new)) < 2:
            return self.say("note", "one seed is too few to judge quality", figure=metric["name"], **about)
        self.judged += 1
        gain = statistics.difference_interval(new, old, **share(metric))
        low, high = (gain.low, gain.high) if metric["higher_is_better"] else (-gain.high, -gain.low)
        text = f"{gain.middle:+.4g} {metric['unit']} (95 % interval {gain.low:+.4g} to {gain.high:+.4g})"
        if high < 0 or low > 0:
            kind: Kind = "regression" if high < 0 else "improvement"
            self.say(kind, text, figure=metric["name"], after=gain.middle, before=0.0, **about)
        return None


def share(metric: Cell) -> dict[str, Any]:
    """The arguments with which `statistics` widens an interval where the metric is a share of the test set's items.

    >>> share({"name": "accuracy", "unit": "%", "items": 800})
    {'share_of': 800, 'scale': 100.0}
    """
    return {"share_of": metric["items"], "scale": 100.0} if metric["unit"] == "%" and metric["items"] else {}


def _cost(old: float, new: float) -> Kind | None:
    return "regression" if new > old else "improvement" if new < old else None


def _differs(old: float, new: float) -> Kind | None:
    return "changed" if new != old else None


def _change(name: str, old: float, new: float) -> str:
    ratio = f", × {new / old:.3f}" if old else ""
    if "memory" in name or "bytes" in name or "gpu" in name:
        return f"{old:,} bytes before, {new:,} after ({size(int(old))} → {size(int(new))}{ratio})"
    return f"{old:,} before, {new:,} after{ratio}"
