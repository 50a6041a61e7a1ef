"""What every test gets: a clean environment, one torch thread a worker, a Hypothesis profile."""

import os

import pytest
import torch
from hypothesis import settings

# `nsa` reads its flags when it is first imported, which is after this: a user's own flags must not
# decide what the tests test, in this process or in those that tests start.
for _name in [name for name in os.environ if name.startswith("NSA_")]:
    del os.environ[_name]

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)

settings.register_profile("default", derandomize=True, max_examples=25, deadline=None)
settings.register_profile("slow", settings.get_profile("default"), max_examples=300)


def pytest_configure(config: pytest.Config) -> None:
    """Many more examples under ``-m slow``; ``--hypothesis-profile`` overrules both."""
    if not config.getoption("--hypothesis-profile"):
        marks = config.getoption("-m")
        slow = "slow" in marks and "not slow" not in marks
        settings.load_profile("slow" if slow else "default")
