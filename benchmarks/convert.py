"""A dense Llama of transformers, trained here, converted by both starts and trained on.

    python benchmarks/convert.py
    python benchmarks/convert.py --steps 4000 --length 4096
    python benchmarks/convert.py --device cpu --tiny

12 layers, width 768, Hq 12, Hkv 2, D 64, bytes of ``--data``, bf16 autocast, AdamW. The dense model
is trained for ``--steps`` steps of ``--tokens`` tokens. Then it, and a copy converted by each
start, go on for a tenth of these, with the same batches and a tenth of the rate; everything is
trained. One row each: the validation loss in nats per byte before, at the start and after, and
tokens/s of training steps at ``--speed-length``, a median. Conversion stands on
``tests/integrations/transformers/test_convert.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nsa import NSAConfig
from nsa.integrations.transformers import convert
from nsa.training.data import Corpus, load_corpus, training_batch, validation_batches

VALIDATION_WINDOWS = 64
TIMED, WARM_UP = 10, 3
TINY = {"steps": 40, "length": 96, "tokens": 384, "speed_length": 192, "layers": 2, "width": 64}
"""For a look at whether it runs at all."""


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    heads = args.width // 64 if args.width >= 768 else 4
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=args.width // heads,
        max_position_embeddings=65536,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(args.device)


def precision(args: argparse.Namespace) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")


def loss_of(model: Any, tokens: Tensor, targets: Tensor, args: argparse.Namespace) -> Tensor:
    with precision(args):
        logits = model(tokens.to(args.device)).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.to(args.device).flatten()
    )


def make_optimizer(model: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)


def train(model: Any, corpus: Corpus, args: argparse.Namespace, first: int, steps: int) -> None:
    """Batches from ``first`` on; the rate warms up, and is a tenth after the dense run."""
    rate = args.rate if first == 0 else args.rate / 10
    optimizer = make_optimizer(model.train(), rate)
    warm_up = max(1, steps // 20)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm_up)
        batch = training_batch(
            corpus,
            seed=args.seed,
            index=first + step,
            batch_size=max(1, args.tokens // args.length),
            seq_len=args.length,
        )
        optimizer.zero_grad()
        loss_of(model, *batch, args).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def validate(model: Any, corpus: Corpus, args: argparse.Namespace) -> float:
    model.eval()
    windows = {"count": VALIDATION_WINDOWS, "batch_size": 4, "seq_len": args.length}
    losses = [
        loss_of(model, *batch, args).item() for batch in validation_batches(corpus, **windows)
    ]
    return statistics.mean(losses)


def speed(model: Any, args: argparse.Namespace) -> float:
    """Tokens a second of training steps."""
    optimizer, seconds = make_optimizer(model.train(), 0.0), []
    rows = max(1, args.tokens // args.speed_length)
    tokens = torch.randint(256, (rows, args.speed_length), device=args.device)
    for _ in range(WARM_UP + TIMED):
        began = time.perf_counter()
        optimizer.zero_grad()
        loss_of(model, tokens, tokens, args).backward()
        optimizer.step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return tokens.numel() / statistics.median(seconds[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--speed-length", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    corpus, model = load_corpus(args.data), make_model(args)
    train(model, corpus, args, 0, args.steps)
    before = validate(model, corpus, args)
    print(f"{'':12}{'before':>9}{'start':>9}{'after':>9}{'tokens/s':>12}")
    for start in ("dense", "paper", "dense-equal"):
        one = copy.deepcopy(model)
        if start != "dense":
            blocks = {"select_block": 32, "num_selected": 4, "window": 64} if args.tiny else {}
            heads = one.config
            config = NSAConfig(
                num_heads=heads.num_attention_heads,
                num_kv_heads=heads.num_key_value_heads,
                head_dim=heads.head_dim,
                independent_kv=start == "paper",
                **blocks,
            )
            convert(one, config, start=start, trainable="all")
        began = validate(one, corpus, args)
        train(one, corpus, args, args.steps, args.steps // 10)
        after = validate(one, corpus, args)
        rate = speed(one, args)
        print(f"{start:12}{before:9.4f}{began:9.4f}{after:9.4f}{rate:12,.0f}", flush=True)


if __name__ == "__main__":
    main()
