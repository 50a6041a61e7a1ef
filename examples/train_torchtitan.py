"""Train a Llama of torchtitan whose attention an override has replaced.

    $ pip install torchtitan
    $ python examples/train_torchtitan.py
    layers.0.attention GQAttention.Config -> SparseAttention.Config ...
    step  0   8.34 nats a byte
    step 20   2.72 nats a byte
    step 40   2.17 nats a byte

torchtitan's own trainer takes the override by a flag, without code:

    torchrun --nproc_per_node 8 -m torchtitan.train --module llama3 --config llama3_8b \\
        --override.imports 'nsa.integrations.torchtitan.sparse_attention={"window": 512}'
"""

import argparse

import torch
import torch.nn.functional as F
from torchtitan.config import OverrideConfig, apply_overrides
from torchtitan.models.llama3 import llama3_configs

LENGTH, DOCUMENTS, STEPS = 128, (50, 78), 40
SPARSE = {
    "window": 32,
    "compress_block": 16,
    "compress_stride": 8,
    "select_block": 16,
    "num_selected": 4,
}


def main():
    torch.manual_seed(0)
    config = llama3_configs["debugmodel"](attn_backend="varlen")
    config.layers = config.layers[:1]
    wanted = OverrideConfig(imports=[("nsa.integrations.torchtitan.sparse_attention", SPARSE)])
    for line in apply_overrides(wanted, config):
        print(line.partition(": ")[2])
    model = config.build()
    model.init_states()

    text = torch.tensor(list(argparse.__doc__.encode() * 8))
    # a row is two documents, and neither sees the other
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS]).expand(2, -1)
    masks = model.get_attention_masks(positions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS + 1):
        starts = torch.randint(len(text) - LENGTH - 1, (2, 1))
        rows = text[starts + torch.arange(LENGTH + 1)]
        logits = model(rows[:, :-1], positions, masks)
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        if step % 20 == 0:
            print(f"step {step:2}   {loss.item():.2f} nats a byte")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
