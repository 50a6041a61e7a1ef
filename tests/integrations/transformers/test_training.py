"""Training a converted model: padded and flattened batches, Trainer, checkpointing, LoRA."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from nsa.integrations.transformers import attention as attention_module
from nsa.integrations.transformers import convert
from tests.support.tiny_models import CONFIG, KINDS, dense, new_parts, tokens

LENGTHS = (40, 7, 23)


def converted(kind="Llama", **options):
    model = dense(kind)
    convert(model, CONFIG, **options)
    new_parts(model)
    return model


def texts():
    return [tokens(1, T, seed=T)[0] for T in LENGTHS]


def features():
    return [{"input_ids": text.tolist(), "labels": text.tolist()} for text in texts()]


def flattened(**options):
    return DataCollatorWithFlattening(return_tensors="pt", **options)(features())


def padded(side):
    T = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), T, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, text in enumerate(texts()):
        n = len(text)
        there = slice(T - n, T) if side == "left" else slice(0, n)
        ids[row, there], mask[row, there], labels[row, there] = text, 1, text
        labels[row, there.start] = -100  # padding predicts nothing
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def each_alone(model):
    """Logits of every text by itself, and the gradients of their mean loss."""
    model.zero_grad()
    outputs = [model(text[None], labels=text[None]) for text in texts()]
    counts = [len(text) - 1 for text in texts()]
    loss = sum(out.loss * n for out, n in zip(outputs, counts, strict=True)) / sum(counts)
    loss.backward()
    logits = torch.cat([out.logits[0] for out in outputs])
    return loss.detach(), logits, {name: x.grad.clone() for name, x in model.named_parameters()}


BATCHES = {
    "flattened": flattened,
    "flattened with cu_seqlens": lambda: flattened(return_flash_attn_kwargs=True),
    "cu_seqlens alone": lambda: flattened(return_flash_attn_kwargs=True, return_position_ids=False),
    "padded left": lambda: padded("left"),
    "padded right": lambda: padded("right"),
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.filterwarnings("ignore:Using `DataCollatorWithFlattening`")
def test_a_batch_is_its_texts_alone(kind):
    model, batch = converted(trainable="all").double(), BATCHES[kind]()
    loss, logits, grads = each_alone(model)
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    there = batch["input_ids"] != 0
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.logits[there], logits, atol=1e-5, rtol=1e-5)
    for name, x in model.named_parameters():
        torch.testing.assert_close(x.grad, grads[name], atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # as an evaluation calls it, where a model keeps a cache by default
        torch.testing.assert_close(model(**batch).loss, loss)


def test_rows_of_packed_texts():
    """Positions that restart within the rows of a batch of two."""
    model = converted()
    ids = tokens(2, 30)
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(30 - n)]) for n in (12, 25)])
    found = model(ids, position_ids=positions).logits
    for row, n in enumerate((12, 25)):
        for part in (slice(0, n), slice(n, 30)):
            alone = model(ids[row : row + 1, part]).logits[0]
            torch.testing.assert_close(found[row, part], alone, atol=1e-4, rtol=1e-4)


def test_cu_seqlens_reach_the_layers_as_they_are(monkeypatch):
    model, batch, seen = converted(), flattened(return_flash_attn_kwargs=True), []
    forward = attention_module.NSAttention.forward

    def watched(self, x, **options):
        seen.append((options["cu_seqlens"].tolist(), options["max_seqlen"]))
        return forward(self, x, **options)

    monkeypatch.setattr(attention_module.NSAttention, "forward", watched)
    model(**batch)
    assert seen == [([0, 40, 47, 70], 40)] * 2


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_learn_and_are_saved(kind, flat, tmp_path):
    model = converted(kind, trainable="all").train()
    batch = flattened() if flat else {"input_ids": tokens(2, 40), "labels": tokens(2, 40)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(later < losses[0] for later in losses[1:])
    model.eval().save_pretrained(tmp_path)
    loaded, prompt = AutoModelForCausalLM.from_pretrained(tmp_path), tokens(2, 30, seed=3)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert loaded.generate(prompt, **options).tolist() == model.generate(prompt, **options).tolist()


def test_accelerate():
    """A loop of one's own: what it prepares takes the steps that it takes without."""
    accelerate = pytest.importorskip("accelerate")
    batch, models = flattened(return_flash_attn_kwargs=True), []
    for prepared in (False, True):
        model = converted(trainable="all").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accelerator = accelerate.Accelerator(cpu=True)
        called, stepped = accelerator.prepare(model, optimizer) if prepared else (model, optimizer)
        backward = accelerator.backward if prepared else torch.Tensor.backward
        for _ in range(2):
            stepped.zero_grad()
            backward(called(**batch).loss)
            stepped.step()
        models.append(accelerator.unwrap_model(called).state_dict())
    torch.testing.assert_close(*models)


@pytest.mark.slow
def test_one_graph():
    """torch.compile of the whole model, as a training step calls it."""
    model, ids = dense("Qwen3", num_hidden_layers=1), tokens(2, 30)
    convert(model, CONFIG, trainable="all")
    expected = model(ids, labels=ids).loss
    model.compile(backend="eager", fullgraph=True)
    loss = model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert model.model.layers[0].self_attn.gate_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, batch = converted(trainable="all").train(), flattened()
    model(**batch).loss.backward()
    expected = {name: x.grad.clone() for name, x in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model(**batch).loss.backward()
    for name, x in model.named_parameters():
        torch.testing.assert_close(x.grad, expected[name])


def test_autocast():
    model, ids = converted(trainable="all"), tokens(2, 30)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    torch.testing.assert_close(out.loss, model(ids, labels=ids).loss, atol=0.05, rtol=0.02)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():  # with a cache
        torch.testing.assert_close(model(ids).logits, out.logits, atol=0.3, rtol=0.05)


def test_trainer(tmp_path):
    """Flattened batches, gradient checkpointing, evaluation, a checkpoint, and training goes on."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    def trainer(model, **options):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=3,
            max_steps=4,
            save_steps=2,
            logging_steps=1,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            activation_checkpointing=True,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
            **options,
        )
        collator = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)
        data = features() * 2
        return Trainer(model, arguments, collator, data, eval_dataset=data[:3])

    model = converted(trainable="all")
    first = trainer(model)
    before = first.evaluate()["eval_loss"]
    first.train()
    assert first.evaluate()["eval_loss"] < before
    again = converted(trainable="all")
    trainer(again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, x in again.named_parameters():
        torch.testing.assert_close(x, model.get_parameter(name))


LORA = ("q_proj", "k_proj.compressed", "k_proj.selected", "k_proj.window", "o_proj")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora(tmp_path):
    """Adapters on projections: they alone learn, merge, and load again."""
    peft = pytest.importorskip("peft")
    model, ids = converted(), tokens(2, 40)
    before = model(ids).logits
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=list(LORA), r=4, init_lora_weights=True)
    )
    torch.testing.assert_close(adapted(ids).logits, before)
    names = {name for name, x in adapted.named_parameters() if x.requires_grad}
    assert len(names) == 2 * 2 * len(LORA)
    assert all("lora_" in name for name in names)
    optimizer = torch.optim.AdamW([x for x in adapted.parameters() if x.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    found = adapted(ids).logits
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, found, atol=1e-4, rtol=1e-4)
    loaded = peft.PeftModel.from_pretrained(converted(), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, found, atol=1e-4, rtol=1e-4)
