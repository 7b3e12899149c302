"""A wrapped model in other processes: a loader's workers, a spawned child, and memory that both see."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from in_processes import TOKENS, Extractor, child, wrapped
from torch.utils.data import DataLoader

import peftkit

# A fork of a process with threads may deadlock, says Python; torch's workers hold none of their locks.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_loader_extracts_features_in_its_workers(start):
    """As collate function, the wrapped model computes in a worker what it computes here, with the adapter that is active."""
    if start not in mp.get_all_start_methods():
        pytest.skip(f"this system cannot {start}")
    model = wrapped()
    with torch.no_grad():
        expected = model(TOKENS)
    loader = DataLoader(
        list(TOKENS),
        batch_size=4,
        collate_fn=Extractor(model),
        num_workers=1,
        multiprocessing_context=start,
        timeout=120,
    )
    batches = list(loader)
    assert [worker for worker, _ in batches] == [0, 0]
    torch.testing.assert_close(torch.cat([features for _, features in batches]), expected)


def test_a_spawned_child_runs_and_trains_the_model():
    """It has the same adapters, active and trainable as here, and the same outputs. In shared memory, what it trains is
    trained here, and nothing else has moved.
    """
    model = wrapped()
    assert model.share_memory() is model
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with torch.no_grad():
        outputs = model(TOKENS)
        with peftkit.using(model, "a"):
            others = model(TOKENS)
        with peftkit.disabled(model):
            bare = model(TOKENS)
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=child, args=(model, answers))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
        pytest.fail("the child did not end")
    assert process.exitcode == 0
    *found, facts = answers.get()
    for there, here in zip(found, (outputs, others, bare), strict=False):
        torch.testing.assert_close(torch.tensor(there), here)
    assert facts == str(peftkit.summary(model))

    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), torch.tensor(found[3]))
    moved = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
    assert moved == {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(".adapters.b." in key for key in moved)


def test_share_memory_is_undone_by_a_copy():
    """A deep copy of a shared model is one's own: training it leaves the shared one alone."""
    model = wrapped().share_memory()
    own = copy.deepcopy(model)
    assert all(p.is_shared() for p in model.parameters())
    with torch.no_grad():
        before = model(TOKENS)
        for p in own.parameters():
            p.add_(1)
        assert torch.equal(model(TOKENS), before)
