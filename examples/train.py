"""Train a language model in plain PyTorch whose attention is ``nsa.NSAttention``.

    $ python examples/train.py
    step  0: 5.88 nats per byte
    step 10: 3.13 nats per byte
    step 20: 2.06 nats per byte
    sdpa (auto on cpu)

B sequences, T tokens, C vocabulary. Texts of different lengths are packed, without padding.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from nsa import NSAConfig, NSAttention

TEXT = torch.tensor(list(Path(argparse.__file__).read_bytes()))  # any bytes
LENGTHS = (300, 150, 62)  # of the texts of one step


class Block(nn.Module):
    def __init__(self, dim, config):
        super().__init__()
        self.norm, self.attention = nn.RMSNorm(dim), NSAttention(dim, config)
        layers = nn.RMSNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(*layers)

    def forward(self, x, **packing):  # [B, T, dim]
        x = x + self.attention(self.norm(x), **packing)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, dim, config):
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList([Block(dim, config), Block(dim, config)])
        self.head = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, 256, bias=False))

    def forward(self, tokens, **packing):  # [B, T] -> [B, T, C]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, **packing)
        return self.head(x)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Model(64, NSAConfig.preset("tiny")).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    packing = {"cu_seqlens": ends.int().to(device), "max_seqlen": max(LENGTHS)}
    for step in range(21):
        starts = torch.randint(len(TEXT) - max(LENGTHS), (len(LENGTHS),)).tolist()
        texts = [TEXT[a : a + n + 1] for a, n in zip(starts, LENGTHS, strict=True)]
        tokens = torch.cat([text[:-1] for text in texts])[None].to(device)
        targets = torch.cat([text[1:] for text in texts]).to(device)
        loss = nn.functional.cross_entropy(model(tokens, **packing)[0], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2}: {loss.item():.2f} nats per byte")
    print(model.blocks[0].attention.resolution)  # what ran


if __name__ == "__main__":
    main()
