"""What has to hold before ``bench`` times something: small problems beside the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa import reference
from nsa.settings import use_settings
from nsa.testing.inputs import Inputs
from nsa.testing.parity import ParityRow, attention_parity
from nsa.testing.selection import selection_faults
from nsa.testing.tolerances import expected
from nsa.tools.bench.baselines import Baseline, Unsupported
from nsa.tools.bench.cases import DENSE
from nsa.tools.common.failures import failures, one_line
from nsa.tools.common.problems import Trial

_LENGTH = 203
_PACKED = (131, 0, 72)
"""An empty sequence among others is legal here; not everywhere."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How one backend or kernel compares with the oracle."""

    worst: float
    """The largest error as a share of its bound; at most 1 if all is well."""
    fault: str | None = None
    """What is wrong, if something is."""


def backend_parity(name: str, trial: Trial) -> Parity:
    """Holds a backend to the oracle on small problems of the trial's heads, dtype and device.

    Outputs, gradients, log-sum-exps and the choice of blocks, with the configuration as it is and
    with one whose window and lists are short enough to leave something out.
    """
    rows: list[ParityRow] = []
    # problems this short must not be sent elsewhere: the long ones are not
    with use_settings(fa2_min_len_win=1, fa2_min_len_cmp=1):
        for inputs in _small(trial, empty=True):
            try:
                rows += attention_parity(name, inputs)
                faults = selection_faults(name, inputs)
            except failures() as error:
                return Parity(float("inf"), f"parity check failed: {one_line(error)}")
            if faults:
                return Parity(float("inf"), f"parity failed: selection: {faults[0]}")
    return _verdict(rows)


def baseline_parity(baseline: Baseline, trial: Trial) -> Parity:
    """The same for a kernel that computes one branch or dense causal attention.

    The gates of the oracle let that branch alone through: its outputs and gradients, and their
    bounds, are then the kernel's. Dense causal attention is a window of any length.

    Raises:
        Unsupported: the kernel cannot run this.
    """
    branch = "window" if baseline.branch == DENSE else baseline.branch
    rows: list[ParityRow] = []
    for inputs in _small(trial, empty=False):
        config = inputs.config
        if baseline.branch == DENSE:
            config = replace(config, window=max(config.window, inputs.q.shape[1]))
        one = replace(_one_branch(inputs, branch), config=config)
        try:
            with warnings.catch_warnings():  # a kernel that refuses says so once more than we do
                warnings.simplefilter("ignore")
                timed = baseline.timed(one)
                out = timed.forward()
                grads: tuple[Tensor, ...] = ()
                if not timed.forward_only:
                    grads = torch.autograd.grad(out, timed.leaves, timed.dout)
        except Unsupported:
            raise
        except failures() as error:
            if baseline.branch == DENSE:  # PyTorch's own kernels, which refuse like this
                raise Unsupported(f"{baseline.name}: {one_line(error)}") from error
            return Parity(float("inf"), f"parity check failed: {one_line(error)}")
        names = ("out", "dq", f"d{branch}.k", f"d{branch}.v")
        want = expected(one)
        for tensor, x in zip(names, (out, *grads), strict=not timed.forward_only):
            rows.append(ParityRow(tensor, want[tensor].error(x), want[tensor].bound))
    return _verdict(rows)


def _verdict(rows: list[ParityRow]) -> Parity:
    for row in rows:
        if not row.ok:
            text = f"parity failed: {row.name} is {row.error:.2e} off, above {row.bound:.2e}"
            return Parity(_share(row), text)
    return Parity(max((_share(row) for row in rows), default=0.0))


def _share(row: ParityRow) -> float:
    if row.bound > 0:
        return row.error / row.bound
    return 0.0 if row.ok else float("inf")


def _small(trial: Trial, *, empty: bool) -> Iterator[Inputs]:
    """Small problems of the trial's kind, with block lists; packed ones with an empty sequence."""
    config = trial.config
    forced = config.num_initial + config.num_local
    sparse = replace(
        config,
        num_selected=min(config.num_selected, max(forced, 3)),
        window=min(config.window, 100),
    )
    longer = max(331, 5 * config.select_block + 11)
    for geometry, length in ((config, _LENGTH), (sparse, longer)):
        lengths = (length,) * min(trial.batch, 2)
        if trial.packed:
            lengths = tuple(n for n in (*_PACKED, length - sum(_PACKED)) if n or empty)
        yield replace(trial, config=geometry, lengths=lengths).inputs()


def _one_branch(inputs: Inputs, branch: str) -> Inputs:
    """The same problem with the gates open for one branch and shut for the others.

    The block lists are those that the oracle selects: kernels from elsewhere expect that every
    query sees a key.
    """
    gates = torch.zeros_like(inputs.gates)
    gates[..., ("compressed", "selected", "window").index(branch)] = 1
    blocks = reference.select_blocks(
        inputs.q.detach(), inputs.compressed.k.detach(), inputs.config, inputs.cu_seqlens
    )
    return replace(inputs, gates=gates.requires_grad_(), block_idx=blocks)
