"""Globs over dotted paths, matched in linear time.

A glob is compiled to a nondeterministic automaton (Thompson, CACM 11(6), 1968) that runs as a lazily built
deterministic one, so a match takes one step for each character whatever the pattern. A glob that somebody mistyped
or was sent can't stall the program, as nested repeats can in `re`.
"""

import re
from dataclasses import dataclass

from peftkit.errors import SelectorError

RANGE_LIMIT = 100_000
"""The most numbers that one `{n..m}` may span: a typing slip, not a model, has more."""

_PART = re.compile(r"\*\*\.|\*\*|(?<=[{,])[0-9]+\.\.[0-9]+(?=[,}])|.", re.DOTALL)


class Glob:
    """A compiled glob: a nondeterministic automaton, and as much of its deterministic twin as texts have needed.

    * `*` is any characters but a dot, `**` any characters at all;
    * `**.`, where a segment begins, is zero or more whole segments;
    * `{a,b}` is any of the alternatives, which nest, and `{8..15}` any number from 8 to 15;
    * everything else is itself.

    >>> Glob("**.mlp.{up,down}_proj").matches("layers.3.mlp.up_proj")
    True
    """

    def __init__(self, pattern: str) -> None:
        automaton = _Automaton(pattern)
        self.whole_path = automaton.has_dot  # without a dot, a pattern means the last segment of a path
        self._final, self._free, self._edges = automaton.state, automaton.free, automaton.edges
        # States of the deterministic twin are sets of the automaton's, numbered as they are met.
        self._sets: list[frozenset[int]] = []
        self._numbers: dict[frozenset[int], int] = {}
        self._steps: dict[tuple[int, str], int] = {}
        self._segment_steps: dict[tuple[int, str], int] = {}
        self._start = self._number({0})

    def matches(self, text: str) -> bool:
        """Whether the pattern describes the whole of `text`."""
        first, *rest = text.split(".")
        state = self._run(self._start, first)
        for segment in rest:  # the paths of a model share most segments, so those are remembered as well
            key = (state, segment)
            found = self._segment_steps.get(key)
            if found is None:
                found = self._segment_steps[key] = self._run(state, "." + segment)
            state = found
        return self._final in self._sets[state]

    def _run(self, state: int, text: str) -> int:
        for character in text:
            key = (state, character)
            found = self._steps.get(key)
            if found is None:
                edges = (edge for member in self._sets[state] for edge in self._edges[member])
                found = self._number({target for first, last, target in edges if first <= character <= last})
                self._steps[key] = found
            state = found
        return state

    def _number(self, states: set[int]) -> int:
        waiting = list(states)
        while waiting:
            reached = set(self._free[waiting.pop()]) - states
            states |= reached
            waiting += reached
        key = frozenset(states)
        if key not in self._numbers:
            self._numbers[key] = len(self._sets)
            self._sets.append(key)
        return self._numbers[key]


@dataclass(slots=True)
class _Group:
    """An open brace: where its alternatives begin and meet, and whether a segment begins there."""

    start: int
    end: int
    start_opens: bool
    end_opens: bool = True


class _Automaton:
    """Reads a pattern from left to right into a nondeterministic automaton, or says what is wrong with it.

    State 0 is the first, `state` the current and at last the final one. `free` has, for each state, the states that
    follow it without a character, `edges` those that follow by one between `first` and `last`. `_opens` is true
    where a segment surely begins: there `**.` stands for whole segments, and a dot is a mistake.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.free: list[list[int]] = []
        self.edges: list[list[tuple[str, str, int]]] = []
        self.state = self._new()
        self.has_dot = False
        self._opens = True
        self._groups: list[_Group] = []
        if not pattern:
            raise self._malformed("it is empty; '**' picks everything")
        for part in _PART.findall(pattern):
            self._read(part)
        if self._groups:
            raise self._malformed("a '{' is never closed")
        self._opens_no_more()

    def _read(self, part: str) -> None:
        if part[0] == "*":
            self._stars(part)
        elif part == "{":
            self._groups.append(_Group(self.state, self._new(), self._opens))
        elif part == "}" or (part == "," and self._groups):
            self._end_alternative(closes=part == "}")
        elif len(part) > 1:
            self._range(*part.split(".."))
        elif part == ".":
            self._dot()
        elif part in "?[]":
            raise self._malformed(f"{part!r} is no wildcard; list choices in braces, {{a,b}}, or compile a regex")
        elif part.isspace():
            raise self._malformed("it has whitespace; give each pattern by itself, or a compiled regex")
        else:
            self._literal(part)

    def _literal(self, character: str) -> None:
        source, self.state = self.state, self._new()
        self.edges[source].append((character, character, self.state))
        self._opens = False

    def _dot(self) -> None:
        self._opens_no_more()
        self._literal(".")
        self._opens = self.has_dot = True

    def _opens_no_more(self) -> None:
        if self._opens:
            raise self._malformed("it has an empty segment: a dot stands first, last or beside another")

    def _stars(self, part: str) -> None:
        hub = self._new()
        self.free[self.state].append(hub)
        self.state = hub
        if part == "**." and self._opens:
            segment = self._new()
            self._no_dot(hub, segment)
            self._no_dot(segment, segment)
            self.edges[segment].append((".", ".", hub))
            self.has_dot = True
            return
        self._no_dot(hub, hub)
        self._opens = False
        if part != "*":
            self.edges[hub].append((".", ".", hub))
        if part == "**.":
            self._dot()

    def _no_dot(self, source: int, target: int) -> None:
        self.edges[source] += [("\0", "-", target), ("/", "\U0010ffff", target)]  # "-", "." and "/" are neighbours

    def _end_alternative(self, *, closes: bool) -> None:
        if not self._groups:
            raise self._malformed("a '}' was never opened")
        group = self._groups[-1]
        self.free[self.state].append(group.end)
        group.end_opens &= self._opens
        self.state, self._opens = group.start, group.start_opens
        if closes:
            self.state, self._opens = group.end, group.end_opens
            self._groups.pop()

    def _range(self, low: str, high: str) -> None:
        if not self._groups:
            raise self._malformed(f"{low}..{high} stands outside of braces; write {{{low}..{high}}}")
        if any(x != "0" and x.startswith("0") for x in (low, high)):
            raise self._malformed(f"{low}..{high} has leading zeros, which no index has")
        if (len(low), low) > (len(high), high):
            raise self._malformed(f"{low}..{high} is reversed; write {{{high}..{low}}}")
        if len(high) > 2 * len(str(RANGE_LIMIT)) or int(high) - int(low) >= RANGE_LIMIT:
            raise self._malformed(f"{low}..{high} is more than {RANGE_LIMIT:,} numbers")
        source, self.state = self.state, self._new()
        for digits in range(len(low), len(high) + 1):
            first = low if digits == len(low) else "1".ljust(digits, "0")
            self._numbers(source, first, high if digits == len(high) else "9" * digits)
        self._opens = False

    def _numbers(self, source: int, first: str, last: str) -> None:
        """Edges to the current state for every number from `first` to `last`, which have equally many digits."""
        if not first:
            self.free[source].append(self.state)
            return
        low, high, least, greatest = int(first[0]), int(last[0]), first[1:], last[1:]
        zeros, nines = "0" * len(least), "9" * len(least)
        blocks = []
        if low < high and least != zeros:
            blocks.append((low, low, least, nines))
            low, least = low + 1, zeros
        if low < high and greatest != nines:
            blocks.append((high, high, zeros, greatest))
            high, greatest = high - 1, nines
        for block_low, block_high, block_least, block_greatest in [*blocks, (low, high, least, greatest)]:
            target = self._new()
            self.edges[source].append((str(block_low), str(block_high), target))
            self._numbers(target, block_least, block_greatest)

    def _new(self) -> int:
        self.free.append([])
        self.edges.append([])
        return len(self.free) - 1

    def _malformed(self, why: str) -> SelectorError:
        return SelectorError(f"malformed selector {self.pattern!r}: {why}")
