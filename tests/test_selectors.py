"""Selectors: what each kind picks, what a glob means, and what is refused."""

import re
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from peftkit.errors import SelectorError
from peftkit.globs import RANGE_LIMIT, Glob
from peftkit.selectors import ROLES, Candidate, candidates, compile_selector, describe


def picks(selector, path, module=None, parameter=None, roles=()):
    return compile_selector(selector)(Candidate(path, module or nn.Identity(), parameter), roles)


GLOBS = [
    # pattern, paths that it matches, paths that it does not
    ("q_proj", ["q_proj", "layers.0.attn.q_proj"], ["q_proj.weight", "layers.0.q_proj.0", "aq_proj", "q_proj2", ""]),
    ("*_proj", ["q_proj", "a.b._proj"], ["a_proj.b", "q_proj1"]),
    ("*", ["a", "a.b", ""], []),
    ("**", ["a", "a.b", ""], []),
    ("q**", ["q_proj", "a.q"], ["q.a"]),
    ("a.b", ["a.b"], ["x.a.b", "a.b.c", "b", "axb"]),
    ("a.*", ["a.b", "a.bc"], ["a", "a.b.c", "aa.b"]),
    ("*.b", ["a.b"], ["b", "a.a.b"]),
    ("a.**", ["a.b", "a.b.c"], ["a", "ab", "ab.c"]),
    ("a.**.b", ["a.b", "a.x.b", "a.x.y.b"], ["ab", "a.xb", "a.x.yb", "a.b.c"]),
    ("**.b", ["b", "a.b", "a.c.b"], ["ab", "a.ab", "b.a"]),
    ("**.**.b", ["b", "a.b", "a.c.b"], ["ab"]),
    ("a.**b", ["a.b", "a.xb", "a.x.b", "a.x.yb"], ["ab", "a.bc"]),
    ("a**.b", ["a.b", "ac.b", "ac.d.b"], ["ab", "b", "ca.b"]),
    ("**.experts.gate_up_proj", ["experts.gate_up_proj", "l.0.mlp.experts.gate_up_proj"], ["my_experts.gate_up_proj"]),
    ("layers.*.attn.{q,v}", ["layers.0.attn.q", "layers.12.attn.v"], ["layers.0.attn.k", "layers.0.1.attn.q"]),
    ("{q,k,v}_proj", ["q_proj", "a.v_proj"], ["o_proj", "qk_proj", "_proj"]),
    ("fc{,1,2}", ["fc", "fc1", "fc2"], ["fc3", "fc12", "fc,"]),
    ("{a,b{c,d{e,f}}}", ["a", "bc", "bde", "bdf"], ["b", "bd", "abc"]),
    ("{a.b,c}", ["a.b", "c"], ["x.c", "x.a.b", "b"]),
    ("x.{a.,}b", ["x.b", "x.a.b"], ["x.ab", "b"]),
    ("x.{a,b}.**.c", ["x.a.c", "x.b.y.c"], ["x.c"]),
    ("x.{**.,}c", ["x.c", "x.a.b.c"], ["x.ac", "xc"]),
    ("{**.a,b}", ["a", "x.a", "b"], ["x.b", "xa"]),
    ("x{b,**.a}", ["xb", "x.a", "xy.z.a"], ["xa", "x"]),
    ("a.*x", ["a.b-x", "a.b/x", "a.\U0010ffffx"], ["a.b.x"]),
    ("{*,**}.c", ["a.c", "a.b.c"], ["c"]),
    ("layers.{8..15}.**", ["layers.8.q", "layers.15.a.b", "layers.10.a"], ["layers.7.q", "layers.16.q", "layers.8"]),
    ("{0..3}", ["0", "layers.3"], ["4", "00", "layers.3.a"]),
    ("b{9..10}", ["b9", "b10", "a.b9"], ["b8", "b11", "b09", "b1", "b"]),
    ("{0..3,20..23,x}", ["0", "20", "22", "x"], ["4", "19", "24", "x0"]),
    ("{5..5}", ["5"], ["4", "6", "55"]),
    ("a,b", ["a,b"], ["a", "b"]),
    ("a+(b)|^$\\d", ["a+(b)|^$\\d"], ["aab"]),
    ("schönes-Ø*", ["schönes-Øl", "x.schönes-Ø"], ["schones"]),
]


@pytest.mark.parametrize("pattern, matched, unmatched", GLOBS, ids=[row[0] for row in GLOBS])
def test_glob(pattern, matched, unmatched):
    """A glob matches these paths and not those."""
    assert [path for path in matched + unmatched if picks(pattern, path)] == matched


def test_glob_picks_parameters_as_it_picks_modules():
    """A path that ends in a parameter's own name selects the parameter."""
    assert picks("**.experts.gate_up_proj", "l.0.experts.gate_up_proj", parameter="gate_up_proj")
    assert picks("weight", "l.0.weight", parameter="weight")


MALFORMED = [
    # pattern, what the message has to say besides the pattern
    ("", "empty"),
    (".", "empty segment"),
    ("a..b", "empty segment"),
    (".a", "empty segment"),
    ("a.", "empty segment"),
    ("**.", "empty segment"),
    ("a.**.", "empty segment"),
    ("{a.,b.}", "empty segment"),
    ("a.{b,.c}", "empty segment"),
    ("{}", "empty segment"),
    ("a.{,}.b", "empty segment"),
    ("a.{b..c}", "empty segment"),
    ("a.8..15", "empty segment"),
    ("a,8..15,b", "{8..15}"),
    ("layer?", "{a,b}"),
    ("layers.[01].q", "compile a regex"),
    ("a]", "compile a regex"),
    ("a b", "whitespace"),
    ("q_proj, v_proj", "whitespace"),
    ("a\n", "whitespace"),
    ("{a,b", "never closed"),
    ("{a,{b}", "never closed"),
    ("a}b", "never opened"),
    ("{a}}", "never opened"),
    ("layers.{15..8}.q", "{8..15}"),
    ("{10..9}", "{9..10}"),
    ("{08..15}", "leading zeros"),
    ("{8..015}", "leading zeros"),
    (f"{{0..{RANGE_LIMIT}}}", "100,000"),
    ("{0..99999999999999999999}", "100,000"),
    pytest.param("{1.." + "9" * 5000 + "}", "100,000", id="5,000 digits"),
]


@pytest.mark.parametrize("pattern, message", MALFORMED)
def test_malformed_glob(pattern, message):
    """A malformed glob is refused when it is compiled, by name and with the remedy."""
    with pytest.raises(SelectorError) as caught:
        compile_selector(pattern)
    assert repr(pattern) in str(caught.value)
    assert message in str(caught.value)


def test_widest_range():
    """A range may span as many numbers as the limit says, and costs no more than its digits."""
    glob = Glob(f"{{0..{RANGE_LIMIT - 1}}}")
    assert all(glob.matches(str(n)) for n in range(RANGE_LIMIT))
    assert not glob.matches(str(RANGE_LIMIT))
    assert len(glob._free) < 50


@settings(deadline=None)
@given(low=st.integers(0, 12_000), span=st.integers(0, 3_000), probe=st.integers(0, 20_000))
@example(low=0, span=0, probe=0)
def test_range_is_its_numbers(low, span, probe):
    """`{n..m}` matches just the numbers from n to m, without padding."""
    high = low + span
    glob = Glob(f"{{{low}..{high}}}")
    for number in {probe, low, high, low - 1, high + 1, low * 10, high // 10} - {-1}:
        assert glob.matches(str(number)) == (low <= number <= high)
        assert not glob.matches(f"0{number}")


# An oracle that shares nothing with the matcher: random pattern trees, written out both as a glob and for `re`.


@dataclass(frozen=True)
class Group:
    alternatives: tuple  # each a dotted pattern: a tuple of segments, which are tuples of items; or () for nothing


@dataclass(frozen=True)
class Range:
    low: int
    high: int


def is_star(item):
    return item in ("*", "**")


def segments(items):
    separate = st.lists(items, min_size=1, max_size=4).map(tuple)
    return separate.filter(lambda s: not any(is_star(a) and is_star(b) for a, b in pairwise(s)))


def groups(dotted):
    alternatives = st.lists(st.one_of(st.just(()), dotted), min_size=1, max_size=3)
    return st.builds(Group, alternatives.map(tuple).filter(any))


simple = st.one_of(
    st.sampled_from(["a", "b", "ab", "1", "*", "**"]),
    st.builds(lambda low, span: Group((((Range(low, low + span),),),)), st.integers(0, 12), st.integers(0, 15)),
)
patterns = st.recursive(
    st.lists(segments(simple), min_size=1, max_size=4).map(tuple),
    lambda inner: st.lists(segments(st.one_of(simple, groups(inner))), min_size=1, max_size=3).map(tuple),
    max_leaves=6,
)


def as_glob(dotted):
    return ".".join("".join(map(item_as_glob, segment)) for segment in dotted)


def item_as_glob(item):
    if isinstance(item, Group):
        return "{" + ",".join(map(as_glob, item.alternatives)) + "}"
    return f"{item.low}..{item.high}" if isinstance(item, Range) else item


def as_regex(dotted, *, opens=True):
    written = ""
    for place, segment in enumerate(dotted):
        last = place == len(dotted) - 1
        if segment == ("**",) and opens and not last:
            written += r"(?:[^.]+\.)*"
            continue
        for item in segment:
            written += item_as_regex(item, opens)
            opens = False
        written += "" if last else r"\."
        opens = True
    return written


def item_as_regex(item, opens):
    if isinstance(item, Group):
        return "(?:" + "|".join(as_regex(alternative, opens=opens) for alternative in item.alternatives) + ")"
    if isinstance(item, Range):
        return "(?:" + "|".join(map(str, range(item.low, item.high + 1))) + ")"
    return {"*": "[^.]*", "**": ".*"}.get(item, item)


def has_dot(dotted):
    inside = (item.alternatives for segment in dotted for item in segment if isinstance(item, Group))
    return len(dotted) > 1 or any(has_dot(alternative) for alternatives in inside for alternative in alternatives)


paths = st.lists(st.text("ab12", min_size=1, max_size=4), min_size=1, max_size=5).map(".".join)


@settings(deadline=None)
@given(patterns, st.lists(paths, min_size=1, max_size=5), st.data())
def test_glob_agrees_with_re(dotted, some_paths, data):
    """A glob matches what its translation to a regex matches, on random paths and on paths made to match."""
    written = re.compile(as_regex(dotted))
    made_to_match = data.draw(
        st.from_regex(written, fullmatch=True, alphabet=st.sampled_from("ab0123456789.")), label="made"
    )
    matches = compile_selector(as_glob(dotted))
    for path in [*some_paths, made_to_match, f"a.{made_to_match}", f"{made_to_match}.b", made_to_match[:-1]]:
        tested = path if has_dot(dotted) else path.rpartition(".")[2]
        assert matches(Candidate(path, nn.Identity()), ()) == bool(written.fullmatch(tested)), path


@given(st.text("ab.*{},18?[ ", max_size=12), paths)
def test_any_text_is_a_glob_or_refused(text, path):
    """Whatever the text, it compiles or is a SelectorError, and what compiles gives an answer."""
    try:
        matches = compile_selector(text)
    except SelectorError:
        return
    assert matches(Candidate(path, nn.Identity()), ()) in (True, False)


ADVERSARIAL = [
    "a*" * 12 + "b",
    "{a,aa}*" * 12 + "b",
    "**a" * 12 + "b",
    "{{a,aa},{a,aa}*}" * 12 + "b",
    "{a,}" * 50 + "b",
]


@pytest.mark.parametrize("pattern", ADVERSARIAL)
def test_matching_is_linear_in_the_path(pattern):
    """Patterns that make backtracking explode need no more automaton for a longer path."""
    glob, sizes = Glob(pattern), []
    for length in (200, 400, 4_000):
        assert not glob.matches("a" * length)
        sizes.append((len(glob._sets), len(glob._steps)))
    assert sizes[0] == sizes[1] == sizes[2]
    assert len(glob._free) <= 2 * len(pattern) + 1


def test_automaton_grows_with_what_it_reads():
    """A pattern whose deterministic automaton is exponential pays only for the states that a path visits."""
    glob = Glob("**a" + "{a,b}" * 40)
    path = "abbabaaababbbab" * 20
    glob.matches(path)
    assert len(glob._sets) <= len(path) + 1
    assert len(glob._steps) <= len(path)


def test_deep_nesting():
    """Braces nest as deep as one likes: no recursion error."""
    assert picks("{" * 5_000 + "a" + "}" * 5_000, "a")


def test_class():
    """A class picks its instances and those of its subclasses, and never a parameter."""
    assert picks(nn.Conv2d, "c", nn.Conv2d(1, 1, 1))
    assert picks(nn.Linear, "c", nn.modules.linear.NonDynamicallyQuantizableLinear(1, 1))
    assert not picks(nn.Conv2d, "c", nn.Conv1d(1, 1, 1))
    assert not picks(nn.Conv2d, "c.weight", nn.Conv2d(1, 1, 1), parameter="weight")


def test_regex():
    """A compiled regex has to match the whole path, of a module or of a parameter."""
    selector = re.compile(r"layers\.\d+\.Q(\.weight)?", re.IGNORECASE)
    assert picks(selector, "layers.10.q")
    assert picks(selector, "layers.10.q.weight", parameter="weight")
    assert not picks(selector, "model.layers.10.q")
    assert not picks(selector, "layers.10.q_proj")


def test_callable():
    """A callable is asked about modules only, with path and module."""
    asked = []
    module = nn.Linear(1, 1)
    selector = compile_selector(lambda path, asked_about: asked.append((path, asked_about)) is None)
    assert selector(Candidate("a.b", module), ())
    assert not selector(Candidate("a.b.weight", module, "weight"), ())
    assert asked == [("a.b", module)]


@pytest.mark.parametrize("result", [None, 1, "yes", re.match("a", "a")])
def test_callable_must_answer_with_a_bool(result):
    """An answer that is no bool is an error that names the callable and the path."""

    def wide(path, module):
        return result

    with pytest.raises(SelectorError, match=r"wide.* returned .*'a\.b'.*bool"):
        picks(wide, "a.b")


def test_what_a_callable_raises_is_left_alone():
    """A fault inside a callable is the caller's own and reaches them as it is."""
    with pytest.raises(ZeroDivisionError):
        picks(lambda path, module: 1 / 0 > 0, "a")


@pytest.mark.parametrize("role", ROLES)
def test_role(role):
    """A role picks the candidates that have it, modules and parameters alike."""
    assert picks(f"@{role}", "a", roles={role, "other"})
    assert picks(f"@{role}", "a.w", parameter="w", roles=frozenset({role}))
    assert not picks(f"@{role}", role, roles={"other"})


@pytest.mark.parametrize("selector, message", [("@atention", "'@attention'"), ("@", "@linear, "), ("@mlp.fc1", "@mlp")])
def test_unknown_role(selector, message):
    """An unknown role is an error with the nearest one and the list."""
    with pytest.raises(SelectorError, match=message) as caught:
        compile_selector(selector)
    assert all(f"@{role}" in str(caught.value) for role in ROLES)


@pytest.mark.parametrize("selector", [b"q_proj", 3, None, ["q_proj"], ("a", "b"), {"a"}, 1.5], ids=repr)
def test_no_selector(selector):
    """Anything else is refused with the list of what is accepted."""
    with pytest.raises(SelectorError, match=r"glob.*role.*class.*regex.*callable") as caught:
        compile_selector(selector)
    assert repr(selector) in str(caught.value)


def test_layer_instance_is_no_selector():
    """A layer itself, though callable, is refused with its class as the remedy."""
    with pytest.raises(SelectorError, match="the class Linear"):
        compile_selector(nn.Linear(1, 1))


def test_bytes_regex_is_no_selector():
    """A regex over bytes is refused when it is compiled, not when it meets the first path."""
    with pytest.raises(SelectorError, match="bytes"):
        compile_selector(re.compile(b"a"))


class Callable:
    def __call__(self, path, module):
        return True

    def __repr__(self):
        return "Callable()"


@pytest.mark.parametrize(
    "selector, text",
    [
        ("**.{q,v}_proj", "**.{q,v}_proj"),
        ("@linear", "@linear"),
        (nn.Conv2d, "Conv2d"),
        (re.compile("a.b"), "re:a.b"),
        (picks, "picks"),
        (Callable(), "Callable()"),
    ],
)
def test_describe(selector, text):
    """Every selector has a short text for tables and errors."""
    assert describe(selector) == text


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(nn.Linear(1, 1).bias.detach())
        self.same = self.scale
        self.up = nn.Linear(2, 2, bias=False)
        self.rows = nn.ParameterList([nn.Linear(1, 1).bias])
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight = self.up.weight
        self.again = self.up


def test_candidates():
    """Candidates come in model order: each module once, a tied weight at both of its owners."""
    model = Tied()
    found = candidates(dict(model.named_modules()))
    assert [(c.path, c.parameter) for c in found] == [
        ("", None),
        ("scale", "scale"),
        ("up", None),
        ("up.weight", "weight"),
        ("rows", None),
        ("rows.0", "0"),
        ("head", None),
        ("head.weight", "weight"),
    ]
    assert [c.module for c in found[2:4]] == [model.up, model.up]
