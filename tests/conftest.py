"""What every test gets: a clean environment, one torch thread a worker, a Hypothesis profile.

And what the tests of ``diagnose`` and of FlashAttention-2's sources share.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# `nsa` reads its flags when it is first imported, which is after this: a user's own flags must not
# decide what the tests test, in this process or in those that tests start.
for _name in [name for name in os.environ if name.startswith("NSA_")]:
    del os.environ[_name]

# Kernels in Triton's interpreter and everything else cannot share a process.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if _INTERPRETED else ["triton_interpreter"]

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)

settings.register_profile("default", derandomize=True, max_examples=20, deadline=None)
settings.register_profile("slow", settings.get_profile("default"), max_examples=300)


def pytest_configure(config: pytest.Config) -> None:
    """Many more examples under ``-m slow``; ``--hypothesis-profile`` overrules both."""
    if not config.getoption("--hypothesis-profile"):
        marks = config.getoption("-m")
        slow = "slow" in marks and "not slow" not in marks
        settings.load_profile("slow" if slow else "default")


# These import `nsa` when they are used: not before the flags are gone.


@pytest.fixture(autouse=True)
def as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """``compiled`` runs its steps without Inductor: a new shape of heads would cost half a minute.

    The tests of :mod:`nsa.core.compile` ask for a compiler.
    """
    from nsa.core import compile as core_compile

    monkeypatch.setattr(core_compile, "COMPILER", None)


@pytest.fixture
def environment() -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Reads another environment for one test; yields the function that does it."""
    from nsa.settings import read_environment

    yield read_environment
    read_environment()


@pytest.fixture
def no_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the numbers out of ``diagnose``, for tests that are about something else."""
    from nsa.tools.diagnose import report

    monkeypatch.setattr(report, "attention_parity", lambda name, inputs: [])
    monkeypatch.setattr(report, "selection_faults", lambda name, inputs: [])


@pytest.fixture
def fresh_probes() -> Iterator[None]:
    """Forgets what was found out about FlashAttention-2, before and after."""
    from nsa.backends import dispatch
    from nsa.backends.fa2 import providers as fa2_providers

    probe, resolve = fa2_providers._probe, dispatch._resolve
    probe.cache_clear()
    resolve.cache_clear()
    yield
    probe.cache_clear()
    resolve.cache_clear()


@pytest.fixture
def install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_probes: None
) -> Iterator[Callable[..., None]]:
    """Puts a ``flash_attn`` of :mod:`flash_attn_stubs` where Python finds it."""
    from tests.support.flash_attn_stubs import put

    def imported() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "flash_attn"]

    def put_in_front(
        interface: str | None, distribution: str | None = "flash-attn", **options: str
    ) -> None:
        put(tmp_path / "site", interface, distribution, **options)
        for name in imported():
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path / "site")

    yield put_in_front
    for name in imported():
        del sys.modules[name]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch, fresh_probes: None) -> None:
    """Pretends that FlashAttention-2 could run on any device, so that its sources are called."""
    from nsa.backends.fa2 import providers as fa2_providers

    monkeypatch.setattr(fa2_providers, "_unfit", lambda device: None)
