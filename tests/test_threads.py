"""Several threads and one model: each gets the answer that it asked for, or an error that says why it cannot."""

import copy
import threading

import pytest
import torch
from torch import nn

import peftkit
from peftkit import errors


def wrapped(*names):
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Tanh()))).eval()
    for name in names:
        peftkit.wrap(model, "lora", name=name, rank=2, targets="**", init="gaussian")
        with torch.no_grad():
            for tensor in peftkit.state_dict(model, name).values():
                tensor.normal_(0, 0.3)
    return model


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def in_a_thread(work):
    """Run it in a thread of its own, to its end; what it raised is raised here."""
    raised = []

    def run():
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - for the thread that asked
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if raised:
        raise raised[0]


def answers(model, name):
    with torch.no_grad(), peftkit.using(model, name):
        return model(X)


ACTIONS = {
    "using": lambda model: answers(model, "b"),
    "disabled": lambda model: peftkit.disabled(model).__enter__(),
    "routed": lambda model: peftkit.routed(model, ["a"] * 5).__enter__(),
    "activate": lambda model: peftkit.activate(model, "b"),
    "wrap": lambda model: peftkit.wrap(model, "lora", name="c", targets="**"),
    "unwrap": lambda model: peftkit.unwrap(model, "a"),
    "merge": lambda model: peftkit.merge(model, "a"),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("block", ["using", "disabled", "routed"])
def test_what_runs_is_not_changed_under_another_thread(action, block):
    """While one thread is inside a block, another cannot change what runs; afterwards it can."""
    model = wrapped("a", "b")
    peftkit.activate(model, "a")
    blocks = {
        "using": lambda: peftkit.using(model, "a"),
        "disabled": lambda: peftkit.disabled(model),
        "routed": lambda: peftkit.routed(model, ["a", "b", "a", None, "b"]),
    }
    with torch.no_grad(), blocks[block]():
        if block == "disabled" and action == "unwrap":
            expected = model(X)
            in_a_thread(lambda: ACTIONS[action](model))  # what does not run may go
            assert torch.equal(model(X), expected)
            return
        expected = model(X)
        with pytest.raises(errors.StateError, match="another thread is inside"):
            in_a_thread(lambda: ACTIONS[action](model))
        assert torch.equal(model(X), expected)
    in_a_thread(lambda: ACTIONS[action](model))


def test_a_thread_may_nest_its_own_blocks():
    """And is alone inside until it has left the outermost one."""
    model = wrapped("a", "b")
    with peftkit.using(model, "a"):
        with peftkit.using(model, "b"), peftkit.disabled(model):
            pass
        with pytest.raises(errors.StateError, match="another thread"):
            in_a_thread(lambda: answers(model, "b"))
    in_a_thread(lambda: answers(model, "b"))
    with pytest.raises(KeyError), peftkit.using(model, "a"):
        {}["what is raised inside"]
    in_a_thread(lambda: answers(model, "b"))


def test_threads_with_copies_each_get_their_own_answer():
    """A copy for each thread, at the same time: every answer is that of the thread's own adapter."""
    model = wrapped("a", "b", "c", "d")
    expected = {name: answers(model, name) for name in "abcd"}
    wrong, start = [], threading.Barrier(4)

    def serve(name, own):
        start.wait()
        wrong.extend(name for _ in range(60) if not torch.equal(answers(own, name), expected[name]))

    threads = [threading.Thread(target=serve, args=(name, copy.deepcopy(model))) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_threads_that_take_turns_each_get_their_own_answer():
    """With a lock around the block; and every answer that is given without one is right, or an error."""
    model = wrapped("a", "b")
    expected = {name: answers(model, name) for name in "ab"}
    lock, wrong, refused, start = threading.Lock(), [], [], threading.Barrier(2)

    def serve(name, *, locked):
        start.wait()
        for _ in range(200):
            try:
                if locked:
                    with lock:
                        found = answers(model, name)
                else:
                    found = answers(model, name)
            except errors.StateError:
                refused.append(name)
                continue
            if not torch.equal(found, expected[name]):
                wrong.append(name)

    for locked in (True, False):
        threads = [threading.Thread(target=serve, args=(name,), kwargs={"locked": locked}) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert wrong == []
        assert not (locked and refused)


@pytest.mark.parametrize("inside", ["using", "disabled"])
def test_loading_is_not_seen_by_a_thread_that_infers(tmp_path, inside):
    """A thread that infers inside a block, while another loads and unwraps adapters a hundred times: always its own answer."""
    source = wrapped("new")
    path = tmp_path / "new.safetensors"
    peftkit.save(source, path)
    model = wrapped("a")
    names = ("a",) if inside == "using" else ()
    wrong, count, stop, ready = [], [0], threading.Event(), threading.Event()

    def infer():
        with torch.no_grad(), peftkit.using(model, *names):
            expected = model(X)
            ready.set()
            while not stop.is_set():
                count[0] += 1
                if not torch.equal(model(X), expected):
                    wrong.append(count[0])

    thread = threading.Thread(target=infer)
    thread.start()
    assert ready.wait(60)
    try:
        for number in range(100):
            peftkit.load(model, path, name=f"new{number}")
            assert f"new{number}" not in [a.name for a in peftkit.summary(model).adapters if a.active]
            peftkit.unwrap(model, f"new{number}")
    finally:
        stop.set()
        thread.join(60)
    assert wrong == []
    assert count[0] > 20


def test_wrapping_another_model_is_nobodys_business():
    """Blocks are those of one model."""
    one, other = wrapped("a"), wrapped("a")
    with peftkit.using(one, "a"):
        in_a_thread(lambda: answers(other, "a"))
