"""Fixtures of all tests."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """For tiny inputs: on a busy machine waking a second thread takes longer than all else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
