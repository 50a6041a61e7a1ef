"""What torch's `FlopCounterMode` counts of the `compiled` backend as a whole."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from nsa import NSAConfig, nsa_attention
from nsa.core.flops import backward_flops, branch_pairs, forward_flops
from nsa.testing.inputs import make_inputs


def test_forward_and_backward_are_the_analytical_count():
    config, T = NSAConfig.preset("tiny"), 45
    x = make_inputs(config, length=T)
    branches = (x.compressed, x.selected, x.window)
    with FlopCounterMode(display=False) as counter:
        out = nsa_attention(x.q, *branches, x.gates, config, backend="compiled")
        torch.autograd.grad(out, x.leaves(), x.dout)
    H, D, V = config.num_heads, config.head_dim, config.dv
    compressed, selected, window = (
        H * branch_pairs(branch, config, (T,)) for branch in ("compressed", "selected", "window")
    )
    pairs = compressed + selected + window
    selecting = 2 * D * compressed
    assert counter.get_total_flops() == (
        forward_flops(pairs, D, V) + selecting + backward_flops(pairs, D, V)
    )
