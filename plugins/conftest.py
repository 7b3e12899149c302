"""What every plugin's tests stand on."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One thread, as in the tests of peftkit itself: the models are tiny, and threads would wait for each other."""
    torch.set_num_threads(1)
