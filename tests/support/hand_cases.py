"""Both oracles under one NumPy signature, and small problems to work by hand."""

import numpy as np
import pytest
import torch

from nsa import reference
from nsa.config import KV, NSAConfig
from tests.support import numpy_oracle as oracle


def run_oracle(step, *args):
    return getattr(oracle, step)(*args)


def run_reference(step, *args):
    """A step of `nsa.reference` with the oracle's NumPy signature."""

    def tensor(arg):
        if isinstance(arg, dict):
            return {name: tensor(value) for name, value in arg.items()}
        if isinstance(arg, tuple):
            return KV(*map(tensor, arg))
        return torch.from_numpy(arg) if isinstance(arg, np.ndarray) else arg

    result = getattr(reference, step)(*map(tensor, args))
    return [x.numpy() for x in result] if isinstance(result, tuple) else result.numpy()


BOTH = pytest.mark.parametrize("run", [run_oracle, run_reference], ids=["oracle", "reference"])

PAPER = {"compress_block": 32, "compress_stride": 16, "select_block": 64}


def config(**changes):
    """One head of size 1, scale 1; blocks of 4 tokens, one every 2; selection blocks of 4."""
    small = {
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 1,
        "compress_block": 4,
        "compress_stride": 2,
        "select_block": 4,
        "num_selected": 2,
        "num_initial": 0,
        "num_local": 0,
        "window": 3,
        "scale": 1.0,
        "rope_theta": None,
    }
    return NSAConfig(**{**small, **changes})


def ones(*shape):
    return np.ones(shape)
