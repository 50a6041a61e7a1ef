"""Where FlashAttention-2 comes from: which source works on a device, and why another does not.

That a package is installed, or imports, says little: one built for another torch fails to load, and
one built for another GPU loads and cannot run. So each source is called once, forward and backward,
and its numbers are compared. :func:`collect_reports` tells what :func:`provider` decides by.

B batch, T tokens, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import attention

from nsa.backends.fa2.calls import Aten, Call, FlashAttn, Provider
from nsa.backends.fa2.math_provider import Math
from nsa.errors import BackendUnavailable

SOURCES = ("flash_attn", "aten")
"""What "auto" tries, in this order."""

ABSENT, BROKEN, WRONG, IDLE, WORKS = "absent", "broken", "wrong numbers", "not run", "works"

_EXPECTED = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError)
"""What importing or calling a package that does not fit this machine may raise."""

_OTHER_TORCH = re.compile(r"undefined symbol|cannot open shared object|DLL load failed", re.I)
_INSTALL = "pip install --no-build-isolation 'flash-attn<3'"
_REBUILD = (
    "pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir 'flash-attn<3'"
)
_OTHER_GPU = "use a CUDA GPU of compute capability 8.0 or newer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one source of FlashAttention-2 is worth on one device."""

    name: str
    """As in ``NSA_FA2_PROVIDER``."""
    version: str | None
    """The package's, or torch's; None if there is none."""
    status: str
    """One of "absent", "broken", "wrong numbers", "not run", "works"."""
    detail: str
    """The exact error, or what was found."""
    fix: str | None = None
    """What would make it work; None if it does."""

    @property
    def title(self) -> str:
        """Name and version."""
        if self.name == "aten":
            return f"aten (torch {self.version})"
        return self.name if self.version is None else f"{self.name} {self.version}"

    @property
    def refusal(self) -> str:
        """Why it is not taken, and the fix."""
        return f"{self.title}: {self.detail}" + (f" (fix: {self.fix})" if self.fix else "")


def provider(name: str, device: torch.device) -> Provider:
    """The provider of that name, or of the first that works for "auto".

    Raises:
        BackendUnavailable: none works, with the reason for each and the fix.
    """
    return _choose(name, device)[0]


def describe(name: str, device: torch.device) -> str:
    """What :func:`provider` takes, with its version; raises as it does."""
    return _choose(name, device)[1].title


def collect_reports(device: torch.device) -> tuple[Report, ...]:
    """A look at every source, whichever is chosen; where FA-2 cannot run, without a call."""
    return tuple(_look(source, device)[1] for source in SOURCES)


def active_impl() -> str | None:
    """What torch runs in place of its own FlashAttention-2 kernels, as "FA3"; None: nothing.

    A program may change that at any time (``torch.nn.attention.activate_flash_attention_impl``), so
    nobody may keep the answer.
    """
    current = getattr(attention, "current_flash_attention_impl", None)
    name = None if current is None else current()
    return None if name == "FA2" else name


def _choose(name: str, device: torch.device) -> tuple[Provider, Report]:
    if name == "math":
        detail = "plain PyTorch, for tests"
        return Math(), Report(name=name, version=None, status=WORKS, detail=detail)
    unfit = _unfit(device)
    if unfit is not None:
        raise BackendUnavailable(f"{unfit} (fix: {_OTHER_GPU})")
    refusals = []
    for source in SOURCES if name == "auto" else (name,):
        found, report = _look(source, device)
        if found is not None:
            return found, report
        refusals.append(report.refusal)
    raise BackendUnavailable("; ".join(refusals))


@lru_cache(maxsize=64)
def _unfit(device: torch.device) -> str | None:
    """Why no source can run on a device."""
    if device.type != "cuda":
        return f"FlashAttention-2 needs a CUDA device, got {device.type}"
    if not torch.cuda.is_available():
        return "FlashAttention-2 needs a CUDA device, and torch sees none"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        return f"FlashAttention-2 needs sm80 or newer, got sm{major}{minor}"
    return None


def _look(source: str, device: torch.device) -> tuple[Provider | None, Report]:
    """One source; a provider only if it works."""
    impl = active_impl() if source == "aten" else None
    if impl is None:
        return _probe(source, device)
    detail = f"{impl} is active in place of torch's FlashAttention-2 kernels"
    fix = "torch.nn.attention.restore_flash_attention_impl()"
    version = torch.__version__
    return None, Report(name=source, version=version, status=IDLE, detail=detail, fix=fix)


@lru_cache(maxsize=64)
def _probe(source: str, device: torch.device) -> tuple[Provider | None, Report]:
    """Finds and calls a source, once for each device and never inside a trace."""
    candidate, found = _find_package() if source == "flash_attn" else _find_aten()
    unfit = _unfit(device)
    if candidate is None:
        idle = found.status == ABSENT and unfit is not None
        return None, replace(found, fix=None) if idle else found
    if unfit is not None:
        why = unfit if torch.cuda.is_available() else "torch sees no CUDA device"
        detail = f"{found.detail}; not called: {why}"
        return None, replace(found, status=IDLE, detail=detail, fix=_OTHER_GPU)
    own = source == "aten"
    fix = "try another build of torch, or the flash-attn package" if own else _rebuild()
    try:
        errors = _errors(candidate, device)
    except _EXPECTED as failure:
        detail = f"a small call failed ({_exact(failure)})"
        return None, replace(found, status=BROKEN, detail=detail, fix=fix)
    for name, error in errors.items():
        if not error <= _ALLOWED:  # NaN too
            detail = f"a small call gave wrong numbers ({name}: relative error {error:.2g})"
            return None, replace(found, status=WRONG, detail=detail, fix=fix)
    detail = (
        f"{found.detail}; small calls, forward and backward, are right: relative error "
        f"{max(errors.values()):.1g}, at most {_ALLOWED:.1g} expected"
    )
    return candidate, replace(found, status=WORKS, detail=detail)


def _find_package() -> tuple[Provider | None, Report]:
    """``flash_attn``, by the distribution's name: flash-attn-4 installs a folder so called, too."""
    version = _version("flash-attn")
    found = Report(name="flash_attn", version=version, status=IDLE, detail="imports")
    if version is None or not version.startswith("2."):
        return None, replace(found, status=ABSENT, detail=_why_absent(version), fix=_INSTALL)
    try:
        return FlashAttn(importlib.import_module("flash_attn.flash_attn_interface")), found
    except _EXPECTED as error:
        exact = _exact(error)
    other = "; it was built for another torch or CUDA" if _OTHER_TORCH.search(exact) else ""
    detail = f"does not import ({exact}){other}"
    return None, replace(found, status=BROKEN, detail=detail, fix=_rebuild())


def _rebuild() -> str:
    return f"build it anew for this machine and torch {torch.__version__}: {_REBUILD}"


def _why_absent(version: str | None) -> str:
    if version is not None:
        return f"expected version 2 of flash-attn, got {version}"
    other = _version("flash-attn-4")
    if other is not None:
        return (
            f"only flash-attn-4 {other} is installed, whose flash_attn folder is not "
            "FlashAttention-2"
        )
    try:
        folder = importlib.util.find_spec("flash_attn") is not None
    except ValueError:  # a module without a spec stands in sys.modules
        folder = True
    if folder:
        return "not installed; a flash_attn folder without a distribution is not used"
    return "not installed"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find_aten() -> tuple[Provider | None, Report]:
    found = Report(name="aten", version=torch.__version__, status=IDLE, detail="built in")
    if torch.backends.cuda.is_flash_attention_available():
        return Aten(), found
    detail = "this build of torch has no FlashAttention kernels"
    fix = "install a CUDA build of torch, see https://pytorch.org/get-started/locally"
    return None, replace(found, status=ABSENT, detail=detail, fix=fix)


_ALLOWED = 4 * torch.finfo(torch.float16).eps
"""Right kernels stay within one spacing of fp16, wrong ones miss it by orders of magnitude."""


def _errors(candidate: Provider, device: torch.device) -> dict[str, float]:
    """The relative error of every result of a regular and a packed call.

    fp16 inputs ``[B, T, H, D]``, against the same contract in fp32 on the CPU.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        x = torch.randn(2, 40, heads, 32, generator=generator, dtype=torch.float32, device="cpu")
        return x.half()

    q, k, v, dout = normal(4), normal(2), normal(2), normal(4)
    regular = Call(scale=0.2, causal=True, window=9, max_q=40, max_k=40)
    cu = torch.tensor([0, 33, 33, 80], dtype=torch.int32, device="cpu")
    packed = replace(regular, cu_q=cu, cu_k=cu, max_q=47, max_k=47)
    errors = {}
    for kind, call in (("", regular), ("packed ", packed)):
        given = [x if call.cu_q is None else x.flatten(0, 1) for x in (q, k, v, dout)]
        want = _both_ways(Math(), [x.float() for x in given], call)
        there = call if call.cu_q is None else replace(call, cu_q=cu.to(device), cu_k=cu.to(device))
        got = _both_ways(candidate, [x.to(device) for x in given], there)
        for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
            errors[f"{kind}{name}"] = ((x.float().cpu() - y).norm() / y.norm()).item()
    return errors


def _both_ways(source: Provider, tensors: list[Tensor], call: Call) -> tuple[Tensor, ...]:
    q, k, v, dout = tensors
    out, lse = source.forward(q, k, v, call)
    return out, lse, *source.backward(dout, q, k, v, out, lse, call)


def _exact(error: BaseException) -> str:
    """A failure on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
