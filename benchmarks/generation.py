"""Generation with NSA and with dense attention: speed of prefill and decode, memory, in one run.

    python benchmarks/generation.py --batches 1,64 --lengths 2048,32768
    python benchmarks/generation.py --batches 1 --lengths 131072 --new 16 --chunks 2048,8192,32768
    python benchmarks/generation.py --device cpu --preset tiny --dtype float32 --lengths 200

Weights are drawn, prompts are random bytes, and tokens are the likeliest ones. A second generation
is timed: the first makes kernels. Memory is the most that was allocated beside the weights, the
cache among it.
"""

from __future__ import annotations

import argparse
import gc

import torch

from nsa.models import Generation, GenerationConfig, LanguageModel, ModelConfig

WAYS = {
    "cache, graph": {"graph": True},
    "cache": {"graph": False},
    "no cache": {"cache": False},
}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def generated(
    model: LanguageModel, batch: int, length: int, new: int, chunk: int, **way: bool
) -> Generation:
    """One generation to its end."""
    generator = torch.Generator().manual_seed(batch + length)
    prompts = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    config = GenerationConfig(max_new_tokens=new, temperature=0)
    run = model.generate(prompts, config, context=length + new, chunk=chunk, **way)
    for _ in run:
        pass
    return run


def line(model: LanguageModel, *sizes: int, **way: bool) -> str:
    """What one way took, as the end of a row."""
    cuda = model.embedding.weight.is_cuda
    try:
        generated(model, *sizes, **way)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        done = generated(model, *sizes, **way).statistics
    except torch.OutOfMemoryError:
        return "out of memory"
    text = f"{done.prompt_tokens / done.prefill_seconds:>12,.0f}"
    text += f"{done.new_tokens / done.decode_seconds:>12,.1f}"
    text += f"{1e3 * done.decode_seconds * sizes[0] / done.new_tokens:>11.3f}"
    if cuda:
        text += f"{(torch.cuda.max_memory_allocated() - before) / 2**30:>8.2f}"
    if done.read is not None:
        text += f"{done.read / done.new_tokens:>10,.0f}{done.dense / done.new_tokens:>10,.0f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", help="of NSA (default: auto)")
    parser.add_argument("--batches", type=numbers, default=[1, 64])
    parser.add_argument("--lengths", type=numbers, default=[2048, 32768])
    parser.add_argument("--chunks", type=numbers, default=[65536], help="tokens of all prompts")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--new-uncached", type=int, default=8, help="the same without a cache")
    parser.add_argument("--attention", default="nsa,dense")
    parser.add_argument("--ways", default=",".join(WAYS).replace(", ", " "))
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    ways = {name.replace(", ", " "): way for name, way in WAYS.items()}
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device), torch.__version__)
    print(
        f"{'attention':9} {'way':12}{'B':>4}{'T':>8}{'chunk':>8}{'prefill/s':>12}{'decode/s':>12}"
        f"{'ms a step':>11}{'GiB':>8}{'K/V read':>10}{'dense':>10}"
    )
    for attention in args.attention.split(","):
        torch.manual_seed(0)
        config = ModelConfig.preset(args.preset, attention=attention)
        backend = args.backend if attention == "nsa" else None
        model = LanguageModel(config, backend=backend, device=device, dtype=dtype).eval()
        for length in args.lengths:
            for batch in args.batches:
                for chunk in args.chunks:
                    for name in args.ways.split(","):
                        way = ways[name]
                        if device.type == "cpu" and way.get("graph"):
                            continue
                        new = args.new if way.get("cache", True) else args.new_uncached
                        print(f"{attention:9} {name:12}{batch:>4}{length:>8}{chunk:>8}", end="")
                        print(line(model, batch, length, new, chunk, **way), flush=True)
        if model.resolution is not None:
            print(f"backend {model.resolution}")


if __name__ == "__main__":
    main()
