"""How a step becomes one operator of ``torch.library``: opaque to a trace, differentiable once.

Chunk loops, workspaces and hand-written kernels stand inside operators, so that ``torch.compile``
sees one call with shapes that follow from its arguments, whatever the length. ``torch.func`` sees
operators too: ``grad``, ``vjp`` and ``vmap`` work, forward mode raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from nsa.config import NSAConfig
from nsa.core import flops
from nsa.core.dtypes import accumulation_dtype

_LIBRARY = torch.library.Library("nsa", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

BUILDING: ContextVar[bool] = ContextVar("nsa_building", default=False)
"""Whether launches of kernels are built, not run (:mod:`nsa.core.kernel`): operators then launch on
meta tensors, too."""

_DEVICES = ("cpu", "cuda")
Forward = Callable[..., "Tensor | tuple[Tensor, ...]"]


def define(
    schema: str,
    forward: Forward,
    fake: Forward,
    *,
    saved: Callable[[tuple[Any, ...], Any], Sequence[Tensor | None]] | None = None,
    kept: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
    gradients: Callable[..., tuple[Tensor | None, ...]] | None = None,
    cuda: Forward | None = None,
    count: flops.Count | None = None,
    differentiable: int = 1,
) -> Any:
    """Registers ``nsa::`` + schema and returns the operator, as a function.

    Args:
        schema: ``name(Tensor q, ...) -> (Tensor, Tensor)``.
        forward: computes it, on any device, outside autograd and autocast.
        fake: empty results with the shapes, dtypes and strides that ``forward`` gives.
        saved: the tensors a backward needs, from (inputs, outputs).
        kept: what else it needs, from the inputs; None keeps every input that is no tensor.
        gradients: ``(kept, saved tensors, dout)`` to a gradient for every input, with one dout
            for each differentiable output, None where there is none.
        cuda: computes it on a GPU in place of ``forward``.
        count: its floating-point operations, if they are worth counting.
        differentiable: so many outputs, the first ones, carry a gradient.

    Without ``gradients`` a backward through the operator raises.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, _outside_autocast(forward), "CompositeExplicitAutograd")
    if cuda is not None:
        _LIBRARY.impl(name, _outside_autocast(cuda), "CUDA")

    def fake_or_built(*args: Any) -> Any:
        return (cuda or forward)(*args) if BUILDING.get() else fake(*args)

    torch.library.register_fake(f"nsa::{name}", fake_or_built, lib=_LIBRARY)
    if gradients is None:

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            results = output if isinstance(output, tuple) else (output,)
            if not any(x.is_floating_point() for x in results):
                ctx.mark_non_differentiable(*results)

        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            raise RuntimeError(f"nsa::{name}: double backward is not implemented")
    else:
        assert saved is not None

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*saved(inputs, output))
            plain = tuple(None if isinstance(x, Tensor) else x for x in inputs)
            ctx.kept = plain if kept is None else kept(inputs)
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[differentiable:])
                ctx.set_materialize_grads(False)  # no zeros for those

        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            douts = grads[:differentiable]
            if all(dout is None for dout in douts):
                return (None,) * (len(ctx.needs_input_grad) - 1)
            return gradients(ctx.kept, ctx.saved_tensors, *douts)

    operator = getattr(torch.ops.nsa, name).default
    _LIBRARY.impl(
        name, _differentiable(operator, setup, backward, count), "Autograd", with_keyset=True
    )
    if count is None:
        return operator
    flops.register(operator, count)

    def counted(*args: Any) -> Any:
        # here, too: without gradients the dispatcher does not pass by what Autograd runs
        if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
            flops.register(operator, count)
        return operator(*args)

    return counted


def _differentiable(
    operator: Any,
    setup: Callable[..., None],
    backward: Callable[..., Any],
    count: flops.Count | None,
) -> Callable[..., Any]:
    """What runs for the dispatch key Autograd.

    ``torch.library.register_autograd`` makes nearly the same. Its node refuses ``torch.func``
    (pytorch/pytorch#170834) and drops the tangents of forward mode in silence; this one stands on
    ``_SingleLevelFunction``, as torch's own node for ``torch.func`` does, and refuses tangents.
    """
    name = operator.name()
    # the dispatcher would leave arguments out that equal their defaults
    assert not any(x.has_default_value() for x in operator._schema.arguments), name

    def below(keys: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

    class Once(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keys: Any, *args: Any) -> Any:
            # a transform around this one differentiates what runs here, which torch has turned off
            nested = torch._C._are_functorch_transforms_active()
            with torch.set_grad_enabled(nested), forward_ad._set_fwd_grad_enabled(nested):
                output = below(keys, *args)
            setup(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (None, *backward(ctx, *grads))

        # compiled autograd asks for it, and _SingleLevelFunction has none
        _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(
                f"{name}: forward mode (torch.func.jvp, jacfwd, hessian) is not implemented; use "
                "reverse mode (torch.func.grad, vjp, jacrev) or backend='reference'"
            )

    def run(keys: Any, *args: Any) -> Any:
        if count is not None and torch._C._len_torch_dispatch_stack():
            flops.register(operator, count)
        reverse = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if reverse or forward_ad._current_level >= 0:
            with enable_single_level_autograd_function():
                return Once.apply(keys, *args)  # type: ignore[attr-defined]
        return below(keys, *args)

    return run


def _outside_autocast(function: Forward) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not any(map(torch.is_autocast_enabled, _DEVICES)):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


def define_attention(
    name: str,
    call: str,
    forward: Forward,
    backward: Forward,
    pairs: flops.Count,
    *,
    fake: Forward | None = None,
) -> Any:
    """Registers attention over q, k and v, and its backward; returns the operator.

    Args:
        name: the operator is ``nsa::name``, its backward ``nsa::name_backward``.
        call: the schema of what follows q, k and v, tensors first; they get no gradient.
        forward: ``(q, k, v, *call) -> (out, lse)``.
        backward: ``(dout, q, k, v, out, lse, *call) -> (dq, dk, dv)``.
        pairs: how many pairs of a query and a key see each other, for torch's flop counter.
        fake: empty results of ``forward``; None: out ``[…, H, V]`` and lse ``[…, H]`` of q
            ``[…, H, D]`` and v ``[…, V]``, contiguous.
    """
    backward_op = define(
        f"{name}_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{call}) -> (Tensor, Tensor, Tensor)",
        backward,
        lambda dout, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)),
        count=flops.of_backward(pairs),
    )
    count = len(call.split(","))
    tensors = 3 + sum(entry.strip().startswith("Tensor") for entry in call.split(","))

    def gradients(kept: tuple[Any, ...], saved: tuple[Any, ...], dout: Tensor) -> tuple[Any, ...]:
        return (*backward_op(dout, *saved, *kept[tensors:]), *(None,) * count)

    return define(
        f"{name}(Tensor q, Tensor k, Tensor v, {call}) -> (Tensor, Tensor)",
        forward,
        fake or _attention_outputs,
        saved=lambda inputs, outputs: (*inputs[:3], *outputs, *inputs[3:tensors]),
        gradients=gradients,
        count=flops.of_forward(pairs),
    )


def _attention_outputs(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return (
        q.new_empty(*q.shape[:-1], v.shape[-1]),
        q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q)),
    )


@lru_cache(maxsize=256)
def config_of(key: str) -> NSAConfig:
    """The configuration that an operator carries as a ``str`` (:attr:`NSAConfig.key`)."""
    return NSAConfig.from_key(key)
