"""One training run in memory: the model, its optimizer, and everything a checkpoint holds."""

from __future__ import annotations

import random
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsa.distributed.mesh import ALONE, Mesh
from nsa.errors import CheckpointError, ConfigError, show
from nsa.models import LanguageModel
from nsa.training.checkpoint_format import Checkpoint
from nsa.training.compile import loss_function
from nsa.training.config import RunConfig
from nsa.training.data import Corpus, training_batch, validation_batches

GROUPS = ("model", "optimizer", "rng")
"""The groups of tensors in a checkpoint."""

_NUMPY_WORDS = 624
"""Of the state of numpy's generator."""


class StepResult(NamedTuple):
    """Numbers of one step, still on the device: reading them waits for it."""

    loss: Tensor
    """Mean over the step's bytes, nats per byte, fp32."""
    grad_norm: Tensor
    """Before clipping."""


class Trainer:
    """Runs optimizer steps; what it computes depends on the configuration and the data alone.

    Args:
        config: model and training.
        corpus: the data.
        mesh: of several processes, each of which makes a trainer and calls it at the same time;
            this process alone by default.
    """

    def __init__(self, config: RunConfig, corpus: Corpus, mesh: Mesh | None = None) -> None:
        train = config.train
        self.config = config
        self.corpus = corpus
        self.mesh = mesh or Mesh(torch.device(train.device))
        self.fingerprint = corpus.fingerprint  # once: it reads every byte
        self.device = self.mesh.device
        self.step = 0
        """Optimizer steps done."""
        self.tokens_per_step = train.batch_size * train.accumulate * train.seq_len

        random.seed(train.seed)
        np.random.seed(train.seed % 2**32)
        torch.manual_seed(train.seed)
        # Made on the CPU, so that a seed means the same start on every device.
        self.model = self.mesh.place(
            LanguageModel(
                config.model,
                backend=train.backend,
                activation_checkpointing=train.activation_checkpointing,
                recompute=train.recompute,
            )
        )
        self._model_loss = loss_function(self.model, train.compile)
        self.mesh.shard(self.model)
        self._own = self.mesh.parameters(self.model)
        # Biases and norms are left to grow: decay on them helps nothing.
        decayed = [p for p in self._own.parts.values() if p.ndim >= 2]
        free = [p for p in self._own.parts.values() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": train.weight_decay},
                {"params": free, "weight_decay": 0.0},
            ],
            lr=train.lr,
            betas=(train.beta1, train.beta2),
            fused=True,
        )

    def train_step(self) -> StepResult:
        """Take one optimizer step over ``accumulate`` batches."""
        train = self.config.train
        rate = train.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self._own.zero_grad()
        total = torch.zeros((), device=self.device)
        for micro in range(train.accumulate):
            tokens, targets = training_batch(
                self.corpus,
                seed=train.seed,
                index=self.step * train.accumulate + micro,
                batch_size=train.batch_size,
                seq_len=train.seq_len,
                rows=self.mesh.rows(train.batch_size),
            )
            with self.mesh.sequences(train.seq_len) as own:
                loss = self._loss(own(tokens), own(targets)) / train.accumulate
                loss.backward()
            total += loss.detach()
        norm = self._own.clip(train.grad_clip)
        self.optimizer.step()
        self.step += 1
        return StepResult(self.mesh.mean(total), norm)

    @torch.no_grad()
    def validate(self) -> float:
        """Average the loss over the validation windows (nats per byte); draw no random numbers."""
        train = self.config.train
        self.model.eval()
        total, count = 0.0, 0
        for tokens, targets in validation_batches(
            self.corpus,
            count=train.eval_windows,
            batch_size=train.batch_size,
            seq_len=train.seq_len,
        ):
            count += len(tokens)
            rows = self.mesh.rows(len(tokens))
            mine = rows.stop - rows.start
            if not mine:  # as many passes on every process, or they would wait for each other
                rows = slice(0, 1)
            with self.mesh.sequences(train.seq_len) as own:
                loss = self._loss(own(tokens[rows]), own(targets[rows]))
            total += float(loss) * mine
        return self.mesh.total(total) / count

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        tokens = tokens.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"
        ):
            return self._model_loss(tokens, targets)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Collect every tensor that the next step depends on, in :data:`GROUPS`, whole; on a mesh
        rank 0 alone has them, and every process calls this."""
        gather = self.mesh.gather
        model = {name: gather(value) for name, value in self.model.state_dict().items()}
        optimizer = {
            f"{name}.{key}": gather(self._own.whole(name, value))
            for name, part in self._own.parts.items()
            for key, value in self.optimizer.state[part].items()
        }
        words = np.random.get_state(legacy=False)["state"]["key"]
        rng = {
            "torch_cpu": torch.get_rng_state(),
            "numpy": torch.from_numpy(words.astype(np.int64)),
        }
        if self.device.type == "cuda":
            rng["torch_cuda"] = torch.cuda.get_rng_state(self.device)
        return {"model": model, "optimizer": optimizer, "rng": rng}

    def state(self) -> dict[str, Any]:
        """Collect everything else that a checkpoint holds, for JSON."""
        numpy_state = np.random.get_state(legacy=False)
        version, words, gauss = random.getstate()
        several = self.mesh.sizes != ALONE
        return {
            **({"mesh": self.mesh.sizes} if several else {}),
            "config": self.config.to_dict(),
            "data": {
                "source": self.corpus.source,
                "sha256": self.fingerprint,
                "next_batch": self.step * self.config.train.accumulate,
            },
            "rng": {
                "python": [version, list(words), gauss],
                "numpy": [
                    int(numpy_state["state"]["pos"]),
                    int(numpy_state["has_gauss"]),
                    float(numpy_state["gauss"]),
                ],
            },
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
            "threads": torch.get_num_threads(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put back what :meth:`tensors` and :meth:`state` gave, on whatever mesh.

        Args:
            checkpoint: on a mesh, tensors are read from rank 0's, and the others' has none.

        Raises:
            CheckpointError: other data, tensors that do not fit the model, or a state that does not
                fit the step.
        """
        saved, mine = checkpoint.value("data", "sha256", kind=str), self.fingerprint
        if saved != mine:
            raise CheckpointError(
                f"{checkpoint.path}: expected the bytes it was trained on (SHA-256 "
                f"{show(saved[:12])}…), got others from {self.corpus.source} ({mine[:12]}…); "
                "--data must be the same text"
            )
        next_batch = checkpoint.value("data", "next_batch", kind=int)
        if next_batch != checkpoint.step * self.config.train.accumulate:
            raise CheckpointError(
                f"{checkpoint.path} is damaged: expected the step that ends before batch "
                f"{next_batch}, got {checkpoint.step}"
            )
        load_model(self.model, checkpoint, self.mesh)
        for name, part in self._own.parts.items():
            like = part.detach()
            for key, empty in (
                ("step", torch.empty((), device=self.device)),
                ("exp_avg", torch.empty_like(like)),
                ("exp_avg_sq", torch.empty_like(like)),
            ):
                # A copy: the file's tensor may be aligned otherwise, and then a vectorised kernel
                # may round otherwise.
                whole = self._own.whole(name, empty)
                read = partial(checkpoint.tensor, "optimizer", f"{name}.{key}", like=whole)
                self.mesh.spread(read, whole)
                self.optimizer.state[part][key] = empty
        self.step = checkpoint.step

        if self.mesh.ranks.leads:  # a step draws no number; the next checkpoint has rank 0's
            self._restore_rng(checkpoint)

    def _restore_rng(self, checkpoint: Checkpoint) -> None:
        words = checkpoint.tensor("rng", "numpy", like=torch.empty(_NUMPY_WORDS, dtype=torch.int64))
        try:
            version, state, gauss = checkpoint.value("rng", "python", kind=list)
            random.setstate((version, tuple(state), None if gauss is None else float(gauss)))
            position, has_gauss, cached = checkpoint.value("rng", "numpy", kind=list)
            if not 0 <= position <= _NUMPY_WORDS:  # numpy would read beyond its words
                raise ValueError
            state = ("MT19937", words.numpy().astype(np.uint32), position, has_gauss, cached)
            np.random.set_state(state)
            torch.set_rng_state(checkpoint.tensors["rng"]["torch_cpu"])
            if self.device.type == "cuda" and "torch_cuda" in checkpoint.tensors["rng"]:
                torch.cuda.set_rng_state(checkpoint.tensors["rng"]["torch_cuda"], self.device)
        except (TypeError, ValueError, KeyError, OverflowError, RuntimeError) as error:
            raise CheckpointError(
                f"{checkpoint.path} is damaged: expected states of random generators, got others"
            ) from error


def config_of(checkpoint: Checkpoint) -> RunConfig:
    """Read the configuration of the run that saved a checkpoint.

    Raises:
        CheckpointError: there is none, or a value of it is unknown or out of range.
    """
    try:
        config = RunConfig.from_dict(checkpoint.value("config", kind=dict))
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint.path}: unusable configuration: {error}") from error
    layers, tensors = config.model.num_layers, checkpoint.tensors.get("model")
    if tensors is not None and layers > len(tensors):  # to make them all might never end
        raise CheckpointError(
            f"{checkpoint.path}: expected tensors for {show(layers)} layers, got {len(tensors)}"
        )
    return config


def load_model(model: LanguageModel, checkpoint: Checkpoint, mesh: Mesh | None = None) -> None:
    """Copy a checkpoint's weights into a model, which may be sharded over a mesh.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    expected = model.state_dict()
    mesh = mesh or Mesh(torch.device("cpu"))
    for name in checkpoint.tensors.get("model", ()):
        if name not in expected:
            raise CheckpointError(f"{checkpoint.path}: the model has no tensor named {show(name)}")
    with torch.no_grad():
        for name, parameter in expected.items():
            mesh.spread(partial(checkpoint.tensor, "model", name, like=parameter), parameter)
