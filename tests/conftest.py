"""Fixtures that several files share."""

import os

import pytest
import torch
from helpers import make_pretrained

from test_ouroboros import fixed_seed as fixed_seed  # every test draws the same numbers

# The models here are so small that a second thread gains nothing. Where other programs keep the cores busy,
# threads that wait for each other would make the tests twenty times slower.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that the tests start


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """The folder of a small random model, with a text beside it in text.txt. Tests only read it."""
    return make_pretrained(tmp_path_factory.mktemp("pretrained"))
