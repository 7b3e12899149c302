"""What every test stands on."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """One thread: the models are tiny, and threads that wait for each other on a busy machine cost a hundredfold."""
    torch.set_num_threads(1)
