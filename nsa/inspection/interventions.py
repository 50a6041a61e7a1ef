"""Step into the layers of a model: shut a branch, replace the block lists, replay recorded ones.

B batch, T tokens, K key/value heads, n listed blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from nsa.config import NSAConfig
from nsa.core.inputs import BRANCHES, AttentionInputs
from nsa.core.validate import check_block_idx
from nsa.errors import require_known
from nsa.inspection.dense import oracle_lists, random_lists
from nsa.inspection.recording import Watcher, nsa_layers, probed

MakeLists = Callable[[Tensor, Tensor, NSAConfig], Tensor]
"""From the q ``[T, H, D]`` and the selected branch's k ``[T, K, D]`` of one sequence, int32 lists
``[T, K, n]``."""


class _Shut(Watcher):
    def __init__(self, branch: str) -> None:
        self._open = torch.tensor([name != branch for name in BRANCHES])

    def given(self, inputs: AttentionInputs) -> AttentionInputs:
        gates = inputs.gates
        return inputs._replace(gates=gates * self._open.to(gates.device, gates.dtype))


class _Replay(Watcher):
    def __init__(self, block_idx: Tensor, config: NSAConfig) -> None:
        self._block_idx, self._config = block_idx, config

    def given(self, inputs: AttentionInputs) -> AttentionInputs:
        lists, q = self._block_idx.to(inputs.q.device), inputs.q
        check_block_idx(lists, q, self._config, inputs.cu_seqlens, check=False)
        return inputs._replace(block_idx=lists)


class _Replace(Watcher):
    def __init__(self, make: MakeLists, config: NSAConfig) -> None:
        self._make, self._config = make, config

    @torch.no_grad()
    def given(self, inputs: AttentionInputs) -> AttentionInputs:
        q, k = inputs.q, inputs.selected.k
        if inputs.cu_seqlens is None:
            lists = [self._make(q[b], k[b], self._config) for b in range(len(q))]
            return inputs._replace(block_idx=torch.stack(lists))
        ends = inputs.cu_seqlens.tolist()
        parts = [slice(*ends[i : i + 2]) for i in range(len(ends) - 1) if ends[i] < ends[i + 1]]
        lists = [self._make(q[0, part], k[0, part], self._config) for part in parts]
        return inputs._replace(block_idx=torch.cat(lists)[None])


@contextlib.contextmanager
def shut_branch(model: nn.Module, branch: str) -> Iterator[None]:
    """Multiply the gates of a branch, in every layer, by zero; the other gates stay as they are.

    Args:
        branch: "compressed", "selected" or "window". The compressed branch goes on scoring.

    Raises:
        ConfigError: there is no such branch.
        ShapeError: the model has no NSA layer.
    """
    require_known("branch", branch, BRANCHES)
    with probed(model, dict.fromkeys(nsa_layers(model), _Shut(branch))):
        yield


@contextlib.contextmanager
def replay(model: nn.Module, lists: Mapping[str, Tensor]) -> Iterator[None]:
    """Let layers read the blocks on recorded lists; nothing is selected in them.

    Rollouts and training then agree on what was read, whatever computes either: a near-tie that
    falls another way in another kernel, dtype or batch changes nothing.

    Args:
        lists: by the layer's name, int32 ``[B, T, K, n]``, as :meth:`Recording.lists` gives them. A
            layer that is not named selects as usual.

    Raises:
        ConfigError: a name that is no NSA layer of the model.
        ShapeError: the model has no NSA layer; at the forward, lists that do not fit its input.
    """
    layers = nsa_layers(model)
    for name in lists:
        require_known("layer", name, tuple(layers))
    probes = {name: _Replay(idx, layers[name].config) for name, idx in lists.items()}
    with probed(model, probes):
        yield


@contextlib.contextmanager
def replace_lists(model: nn.Module, make: MakeLists) -> Iterator[None]:
    """Let every layer read the blocks that ``make`` chooses, sequence by sequence.

    Code that is not compiled runs ``make``; :func:`knock_outs` says how to keep compiled code out.

    Args:
        make: for example :func:`oracle_lists`.
    """
    layers = nsa_layers(model)
    probes = {name: _Replace(make, layer.config) for name, layer in layers.items()}
    with probed(model, probes):
        yield


KNOCK_OUTS = ("none", *(f"{branch} shut" for branch in BRANCHES), "random lists", "oracle's lists")
"""What :func:`knock_outs` measures, in order."""


@torch.no_grad()
def knock_outs(
    model: nn.Module, loss: Callable[[], float], *, seed: int = 0
) -> Iterator[tuple[str, float]]:
    """Yield the loss as it is, with each branch shut in every layer, with random lists, and with
    the lists of dense attention's best blocks (:func:`oracle_lists`), by :data:`KNOCK_OUTS`.

    Everything that ``torch.compile`` made runs as it is written meanwhile, so that nothing is
    compiled for one use.

    Args:
        loss: runs the model and returns its loss.
        seed: of the random lists.
    """
    with torch.compiler.set_stance("force_eager"):
        for name in KNOCK_OUTS:
            with _knock_out(model, name, seed):
                value = loss()
            yield name, value


def _knock_out(model: nn.Module, name: str, seed: int) -> contextlib.AbstractContextManager[None]:
    if name == "none":
        return contextlib.nullcontext()
    if name == "random lists":
        generator = torch.Generator().manual_seed(seed)

        def draw(q: Tensor, k: Tensor, config: NSAConfig) -> Tensor:
            return random_lists(len(q), k.shape[1], config, generator).to(q.device)

        return replace_lists(model, draw)
    if name == "oracle's lists":
        return replace_lists(model, oracle_lists)
    return shut_branch(model, name.removesuffix(" shut"))
