"""Convert a model of transformers and fine-tune it with ``Trainer`` on packed texts.

    $ python examples/finetune_transformers.py
    24 new parameters; as the dense model up to 512 tokens
    {'loss': '4.98', ...
    loss of held-out texts: 5.56, then 3.64
    it writes: b'def                     '

    $ python examples/finetune_transformers.py --model my/llama --text book.txt --steps 1000

The default model is tiny and random, and reads bytes, so that nothing is downloaded.
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

from nsa.integrations.transformers import convert

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="name or folder of the model to convert")
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", default="runs/finetuned", help="folder to save to")
    given = parser.parse_args()

    torch.manual_seed(0)
    if given.model:
        model = AutoModelForCausalLM.from_pretrained(given.model)
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        encode, decode = tokenizer.encode, tokenizer.decode
    else:
        dense = LlamaConfig(vocab_size=256, num_hidden_layers=2, **SIZES)
        model, tokenizer = AutoModelForCausalLM.from_config(dense), None
        encode, decode = (lambda text: list(text.encode())), bytes
    made = convert(model, start="dense-equal", trainable="all")
    print(f"{len(made.new)} new parameters; as the dense model up to {made.dense_length} tokens")

    paragraphs = given.text.read_text(encoding="utf-8").split("\n\n")
    texts = [{"input_ids": encode(text)} for text in paragraphs if text.strip()]
    arguments = TrainingArguments(
        given.out,
        max_steps=given.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-5 if given.model else 5e-3,
        logging_steps=4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    trainer = Trainer(
        model, arguments, collator, texts[8:], eval_dataset=texts[:8], processing_class=tokenizer
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss of held-out texts: {before:.2f}, then {trainer.evaluate()['eval_loss']:.2f}")

    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(given.out)  # knows "model_type": "nsa"
    prompt = torch.tensor([encode("def ")])
    made = model.generate(prompt, max_new_tokens=20, do_sample=False)
    print("it writes:", decode(made[0].tolist()))


if __name__ == "__main__":
    main()
