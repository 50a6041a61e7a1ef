"""Generate with the library's cache: in a loop of your own, in one call, and in a batch.

    $ python examples/generate.py
    loop:   reads three short lists of keys, and a gate weights the res
    call:   reads three short lists of keys, and a gate weights the res
    batch:  reads three short lists of keys [stop]
    batch:  reads three short lists of keys [stop]

B sequences, T tokens, C vocabulary. A model of this size learns a sentence in seconds.
"""

import torch
from torch.nn.functional import cross_entropy

from nsa import NSACache
from nsa.models import GenerationConfig, LanguageModel, ModelConfig

SENTENCE = b"Each query reads three short lists of keys, and a gate weights the results. "


def trained_model():
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig.preset("tiny", num_layers=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(list(SENTENCE * 2))[None]
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(text[:, :-1])[0], text[0, 1:]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def continue_greedily(model, prompt, count):
    """The likeliest ``count`` tokens after a prompt: bytes in, bytes out."""
    cache = NSACache.for_model(model, batch_size=1, max_length=len(prompt) + count)
    logits = model(torch.tensor([list(prompt)]), cache=cache)  # prefill: [B, T, C]
    made = [logits[0, -1].argmax()]
    while len(made) < count:  # a step reads what selection lists; nothing is computed twice
        logits = model(made[-1].view(1, 1), cache=cache)
        made.append(logits[0, -1].argmax())
    return bytes(torch.stack(made).tolist())


def main():
    model, prompt = trained_model(), b"Each query"
    print("loop: ", continue_greedily(model, prompt, 60).decode("latin-1"))

    config = GenerationConfig(max_new_tokens=60, temperature=0)
    tokens = model.generate(prompt, config, context=152)  # an iterator, token by token
    print("call: ", bytes(tokens).decode("latin-1"))

    run = model.generate([prompt, SENTENCE + prompt], config, context=152, stop=b",")
    for _ in run:  # (sequence, token), as they come
        pass
    for tokens, reason in zip(run.new, run.ended, strict=True):
        print("batch:", bytes(tokens).decode("latin-1"), f"[{reason}]")


if __name__ == "__main__":
    main()
