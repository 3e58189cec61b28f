"""The same random numbers for every test, and no warnings of libraries about themselves."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
