"""What counting alone achieves: cross-entropies of a unigram and a bigram model of bytes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nsa.training.data import Corpus, validation_starts

_BYTES = 256
_CHUNK = 1 << 24


class Baselines(NamedTuple):
    """Cross-entropies on the validation windows, in nats per byte."""

    unigram: float
    bigram: float


def baselines(corpus: Corpus, *, count: int, seq_len: int) -> Baselines:
    """Fits byte frequencies on the training split and scores the bytes that the model is scored on.

    Unigram: add-one smoothing. Bigram: the pair counts, with one imaginary observation of every
    first byte spread over the unigram, so that an unseen pair costs a finite amount.

    Args:
        corpus: the data.
        count: validation windows, as for :func:`nsa.training.data.validation_batches`.
        seq_len: their length in bytes.
    """
    train = corpus.train
    counts = np.zeros(_BYTES**2, dtype=np.int64)
    for first in range(0, len(train) - 1, _CHUNK):  # int32 codes of all of it would take 4x
        chunk = train[first : first + _CHUNK + 1].astype(np.int32)
        counts += np.bincount(chunk[:-1] * _BYTES + chunk[1:], minlength=_BYTES**2)
    pairs = counts.reshape(_BYTES, _BYTES)
    unigram = (np.bincount(train, minlength=_BYTES) + 1) / (len(train) + _BYTES)
    bigram = (pairs + unigram) / (pairs.sum(1, keepdims=True) + 1)

    starts = validation_starts(corpus, count=count, seq_len=seq_len)
    window = corpus.validation[starts[:, None] + np.arange(seq_len + 1)]
    before, after = window[:, :-1].ravel(), window[:, 1:].ravel()
    return Baselines(
        unigram=float(-np.log(unigram[after]).mean()),
        bigram=float(-np.log(bigram[before, after]).mean()),
    )
