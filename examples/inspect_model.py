"""Inspect what a converted model of transformers reads.

    $ python examples/inspect_model.py
    model.layers.0.self_attn: gates: compressed 0.49, selected 0.51, window 0.51
      of the best blocks, lists have 88% (by chance 35%)
      of the blocks of the token before, 69%
    ...
    model.layers.1.self_attn: the last token reads blocks [[0, 7, 8, 12], [0, 5, 11, 12]], by group

    $ python examples/inspect_model.py --model runs/finetuned --text book.txt --length 4096

The default model is tiny and random, so that nothing is downloaded.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from nsa import NSAConfig
from nsa.inspection import complaints, inspect, record
from nsa.integrations.transformers import convert

SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a model to convert, or one that is converted")
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__))
    parser.add_argument("--length", type=int, default=400, help="tokens to read")
    given = parser.parse_args()

    torch.manual_seed(0)
    text = given.text.read_text(encoding="utf-8")
    if given.model:
        model = AutoModelForCausalLM.from_pretrained(given.model)
        tokens = AutoTokenizer.from_pretrained(given.model).encode(text)
        if model.config.model_type != "nsa":
            convert(model)
    else:
        dense = LlamaConfig(vocab_size=256, num_hidden_layers=2, num_key_value_heads=2, **SIZES)
        model, tokens = AutoModelForCausalLM.from_config(dense), list(text.encode())
        convert(model, NSAConfig.preset("tiny"))  # short blocks, for a short text
    tokens = torch.tensor([tokens[: given.length]])

    report = inspect(model, tokens, use_cache=False)  # plain dataclasses
    for layer in report.layers:
        gates = ", ".join(f"{branch} {gate.mean:.2f}" for branch, gate in layer.gates.items())
        print(f"{layer.layer}: gates: {gates}")
        if layer.recall is None:
            print("  every query reads all blocks that it sees: raise --length")
        else:
            best, same = layer.recall.mean, layer.overlap_token.all
            print(f"  of the best blocks, lists have {best:.0%} (by chance {layer.chance:.0%})")
            print(f"  of the blocks of the token before, {same:.0%}")
    for line in complaints([layer.brief() for layer in report.layers]):
        print("warning:", line)

    with torch.no_grad(), record(model) as recording:
        model(tokens, use_cache=False)
    for name, block_idx in recording.lists().items():  # [B, T, Hkv, n]
        print(f"{name}: the last token reads blocks {block_idx[0, -1].tolist()}, by group")


if __name__ == "__main__":
    main()
