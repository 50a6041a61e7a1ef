"""FlashAttention-2's sources: each that does not fit is recognised and named."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from nsa import BackendUnavailable, NSAConfig, Resolution, resolve, use_settings
from nsa.backends.fa2 import providers as fa2_providers
from nsa.backends.fa2.calls import Aten, FlashAttn
from nsa.backends.fa2.math_provider import Math
from nsa.backends.fa2.providers import Report, collect_reports, describe, provider
from tests.support import flash_attn_stubs as stubs
from tests.support.flash_attn_stubs import refusal

CPU = torch.device("cpu")

without_the_package = pytest.mark.skipif(
    fa2_providers._version("flash-attn") is not None, reason="flash-attn is installed here"
)


def of_package() -> Report:
    return collect_reports(CPU)[0]


# The package


def test_a_right_package_is_taken(install: Callable[..., None], fits: None) -> None:
    install(stubs.RIGHT)
    assert isinstance(provider("flash_attn", CPU), FlashAttn)
    assert isinstance(provider("auto", CPU), FlashAttn)
    assert describe("auto", CPU) == "flash_attn 2.8.3"
    found = of_package()
    assert (found.name, found.version, found.status, found.fix) == (
        "flash_attn",
        "2.8.3",
        "works",
        None,
    )
    assert found.detail.startswith("imports; small calls, forward and backward, are right")


BROKEN = {
    "ImportError": (
        stubs.IMPORT_ERROR,
        "does not import (ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E); "
        "it was built for another torch or CUDA",
    ),
    "OSError": (
        stubs.OS_ERROR,
        "does not import (OSError: libcudart.so.12: cannot open shared object file); "
        "it was built for another torch or CUDA",
    ),
    "RuntimeError": (stubs.RUNTIME_ERROR, "does not import (RuntimeError: no good, really)"),
    "half installed": (None, "does not import (ModuleNotFoundError: No module named "),
    "empty": ("", "a small call failed (AttributeError: module 'flash_attn.flash_attn_interface'"),
    "no kernel": (
        stubs.NO_KERNEL,
        "a small call failed (RuntimeError: CUDA error: no kernel image is available)",
    ),
    "no deterministic backward": (
        stubs.NOT_DETERMINISTIC,
        "a small call failed (TypeError: _flash_attn_backward() got an unexpected keyword argument "
        "'deterministic'",
    ),
    "old signature": (stubs.OLD_SIGNATURE, "a small call failed (TypeError: _flash_attn_forward()"),
}
WRONG = {
    "out": (stubs.WRONG_OUT, "(out: relative error 0.05)"),
    "not a number": (stubs.NOT_A_NUMBER, "(out: relative error nan)"),
    "lse": (stubs.WRONG_LSE, "(lse: relative error 0.44)"),
    "packed": (stubs.WRONG_PACKED, "(packed out: relative error "),
    "backward": (stubs.WRONG_BACKWARD, "(dq: relative error 1)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_named(install: Callable[..., None], fits: None, case: str) -> None:
    interface, error = BROKEN[case]
    install(interface)
    message = refusal()
    assert message.startswith(f"flash_attn 2.8.3: {error}")
    assert f"(fix: build it anew for this machine and torch {torch.__version__}: pip " in message
    found = of_package()
    assert found.status == "broken"
    assert found.refusal == message


@pytest.mark.parametrize("case", WRONG)
def test_wrong_numbers_are_named(install: Callable[..., None], fits: None, case: str) -> None:
    interface, error = WRONG[case]
    install(interface)
    message = refusal()
    assert message.startswith(f"flash_attn 2.8.3: a small call gave wrong numbers {error}")
    found = of_package()
    assert found.status == "wrong numbers"
    assert found.refusal == message


@without_the_package
def test_flash_attn_4_alone_is_not_taken_for_2(install: Callable[..., None], fits: None) -> None:
    install(stubs.RIGHT, "flash-attn-4", version="4.0.1")
    assert refusal() == (
        "flash_attn: only flash-attn-4 4.0.1 is installed, whose flash_attn folder is not "
        "FlashAttention-2 (fix: pip install --no-build-isolation 'flash-attn<3')"
    )
    assert (of_package().status, of_package().version) == ("absent", None)
    assert "flash_attn" not in sys.modules


@without_the_package
def test_a_folder_without_a_distribution_is_not_used(
    install: Callable[..., None], fits: None
) -> None:
    install(stubs.RIGHT, None)
    assert "not installed; a flash_attn folder without a distribution is not used" in refusal()
    assert of_package().status == "absent"
    assert "flash_attn" not in sys.modules


def test_another_major_version_is_named(install: Callable[..., None], fits: None) -> None:
    install(stubs.RIGHT, version="3.0.0")
    assert "flash_attn 3.0.0: expected version 2 of flash-attn, got 3.0.0 (fix: pip" in refusal()
    assert of_package().status == "absent"


@without_the_package
def test_no_package_names_the_fix(fits: None) -> None:
    assert refusal() == (
        "flash_attn: not installed (fix: pip install --no-build-isolation 'flash-attn<3')"
    )


# Without a GPU


@pytest.mark.parametrize("name", ["auto", "aten", "flash_attn"])
def test_a_cpu_is_refused(name: str) -> None:
    assert refusal(name) == (
        "FlashAttention-2 needs a CUDA device, got cpu "
        "(fix: use a CUDA GPU of compute capability 8.0 or newer)"
    )
    with pytest.raises(BackendUnavailable, match="needs a CUDA device, got cpu"):
        describe(name, CPU)


def test_a_refusal_of_the_device_imports_nothing(install: Callable[..., None]) -> None:
    install(stubs.RIGHT)
    refusal()
    assert "flash_attn" not in sys.modules


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a device here")
def test_a_device_that_torch_does_not_see_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="needs a CUDA device, and torch sees none"):
        provider("auto", torch.device("cuda"))


@pytest.mark.parametrize(("capability", "text"), [((7, 5), "got sm75"), ((8, 0), None)])
def test_an_old_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], text: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = fa2_providers._unfit.__wrapped__(torch.device("cuda"))
    assert found == (text and f"FlashAttention-2 needs sm80 or newer, {text}")


@pytest.mark.parametrize("case", ["ImportError", "OSError"])
def test_a_survey_sees_a_package_that_cannot_be_imported(
    install: Callable[..., None], case: str
) -> None:
    interface, error = BROKEN[case]
    install(interface)
    assert (of_package().status, of_package().detail) == ("broken", error)


def test_a_survey_calls_nothing_that_cannot_run(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(stubs.NO_KERNEL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert of_package().status == "not run"
    assert of_package().detail == "imports; not called: torch sees no CUDA device"


def test_a_survey_of_another_device_than_the_gpu(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(stubs.RIGHT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert of_package().detail == (
        "imports; not called: FlashAttention-2 needs a CUDA device, got cpu"
    )


# The choice


def test_math_comes_by_request_only() -> None:
    assert isinstance(provider("math", CPU), Math)
    assert describe("math", CPU) == "math"
    assert Aten().name == "aten"


def ask(**changes: object) -> Resolution:
    with use_settings(**changes):
        return resolve(
            NSAConfig.preset("tiny"),
            device="cpu",
            dtype=torch.float32,
            length=100,
            packed=False,
            needs_grad=True,
        )


def test_use_fa2_on_a_cpu_raises_with_the_reason() -> None:
    with pytest.raises(BackendUnavailable, match=r"NSA_USE_FA2=1 .* needs a CUDA device, got cpu"):
        ask(use_fa2=True)


def test_use_fa2_with_math_runs() -> None:
    resolution = ask(use_fa2=True, fa2_provider="math")
    assert resolution.backend == "fa2-dense"
    assert dict(resolution.per_branch) == {
        "compressed": "fa2-dense",
        "select": "sdpa",
        "selected": "fa2-dense",
        "window": "fa2-dense",
    }


@pytest.mark.parametrize(
    ("changes", "branch", "runs", "reason"),
    [
        ({"use_fa2_win": False}, "window", "sdpa", "NSA_USE_FA2_WIN=0"),
        ({"use_fa2_cmp": False}, "compressed", "sdpa", "NSA_USE_FA2_CMP=0"),
        ({"fa2_min_len_win": 101}, "window", "sdpa", "NSA_FA2_MIN_LEN_WIN=101"),
        ({"fa2_min_len_cmp": 101}, "compressed", "sdpa", "NSA_FA2_MIN_LEN_CMP=101"),
        ({"fa2_min_len_win": 100}, "window", "fa2-dense", ""),
        ({"fa2_min_len_win": 101, "use_fa2_win": True}, "window", "fa2-dense", ""),
    ],
)
def test_flags_send_a_branch_to_sdpa(
    changes: dict[str, object], branch: str, runs: str, reason: str
) -> None:
    resolution = ask(use_fa2=True, fa2_provider="math", **changes)
    assert resolution.per_branch[branch] == runs
    assert reason in resolution.reason
    assert sum(name == "sdpa" for name in resolution.per_branch.values()) == 1 + (runs == "sdpa")


def test_auto_never_takes_math() -> None:
    assert ask(fa2_provider="math").backend == "sdpa"
