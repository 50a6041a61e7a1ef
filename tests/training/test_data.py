"""Training data: which files, which split, which batches, and the entropies of counting."""

import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from nsa import DataError
from nsa.training.data import (
    Corpus,
    baselines,
    load_corpus,
    require_length,
    training_batch,
    validation_batches,
    validation_starts,
)
from tests.support.training_runs import write_texts


def corpus_of(train: bytes, validation: bytes) -> Corpus:
    return Corpus(
        source="test",
        train=np.frombuffer(train, np.uint8),
        validation=np.frombuffer(validation, np.uint8),
        train_files=1,
        validation_files=1,
        cut=None,
        skipped=0,
    )


def test_a_folder_is_split_by_file(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number:02};")
    corpus = load_corpus(str(tmp_path))
    assert (corpus.train_files, corpus.validation_files, corpus.skipped) == (38, 2, 0)
    assert corpus.cut is None
    train, validation = corpus.train.tobytes(), corpus.validation.tobytes()
    documents = train.split(b"\0")[1:] + validation.split(b"\0")[1:]
    assert sorted(documents) == [b"text %02d;" % number for number in range(40)]
    assert load_corpus(str(tmp_path)).fingerprint == corpus.fingerprint


def test_the_split_hangs_on_the_names_inside_the_folder_alone(tmp_path):
    first, second = write_texts(tmp_path / "a"), write_texts(tmp_path / "b" / "c")
    assert load_corpus(str(first)).fingerprint == load_corpus(str(second)).fingerprint
    (second / "0.txt").write_text("another")
    assert load_corpus(str(first)).fingerprint != load_corpus(str(second)).fingerprint


def test_the_fingerprint_knows_where_the_split_is():
    assert corpus_of(b"ab", b"c").fingerprint != corpus_of(b"a", b"bc").fingerprint


@pytest.mark.parametrize(
    "sizes",
    [
        {"big": 1_600_000, "small": 800},  # first and last by hash, and the other way round
        {"small1": 800, "big": 1_600_000},
        {"a": 1000, "b": 1000},
        {"a": 9000, "b": 500, "c": 500},
        {"huge": 10**6, **{f"{number}": 900 for number in range(300)}},
        {"huge": 10**6, **{f"{number}": 10 for number in range(1000)}},
        {f"{number}": 4**number for number in range(10)},
        {f"{number}": 1 for number in range(3)},
        {f"{number}": 100 for number in range(5)},
    ],
)
def test_the_split_is_by_size(tmp_path, sizes):
    for name, size in sizes.items():
        (tmp_path / name).write_text("x" * size)
    corpus = load_corpus(str(tmp_path))
    train, validation = (len(x) for x in (corpus.train, corpus.validation))
    train, validation = train - corpus.train_files, validation - corpus.validation_files
    assert train + validation == sum(sizes.values())
    assert 1 / 20 <= validation / (train + validation) <= max(1 / 5, 1 / train)
    files = corpus.train_files + corpus.validation_files
    assert files == len(sizes) + (corpus.cut is not None)
    assert corpus.cut is None or corpus.cut in sizes


def test_the_end_of_a_file_that_is_cut(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 101)))
    (tmp_path / "b.txt").write_bytes(b"b" * 10)
    corpus = load_corpus(str(tmp_path))
    assert corpus.cut == "a.txt"
    train, validation = corpus.train.tobytes(), corpus.validation.tobytes()
    (end,) = validation.replace(b"\0" + b"b" * 10, b"").split(b"\0")[1:]
    assert train.startswith(b"\0" + bytes(range(1, 101 - len(end))))
    assert end == bytes(range(101 - len(end), 101))


def test_the_split_of_old_runs(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("x" * (number + 1))
    corpus = load_corpus(str(tmp_path), "files")
    assert (corpus.train_files, corpus.validation_files, corpus.cut) == (28, 2, None)
    # As it was when this was the only one: checkpoints hold this.
    assert corpus.fingerprint.startswith("dcadc57055f79036")


@pytest.mark.parametrize(("files", "expected"), [(2, 1), (29, 1), (31, 2), (50, 2), (51, 3)])
def test_the_split_of_old_runs_is_a_20th_of_the_files(tmp_path, files, expected):
    for number in range(files):
        (tmp_path / f"{number}.txt").write_text("x")
    corpus = load_corpus(str(tmp_path), "files")
    assert (corpus.train_files, corpus.validation_files) == (files - expected, expected)


def test_what_is_not_text_is_skipped_and_counted(tmp_path):
    write_texts(tmp_path)
    clean = load_corpus(str(tmp_path))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path)
    corpus = load_corpus(str(tmp_path))
    assert corpus.skipped == 4
    assert corpus.fingerprint == clean.fingerprint


def test_every_text_below_a_folder_is_read_once_in_order(tmp_path):
    names = ["b.txt", "a/z", "a/b/c.md", "z/y/x/w", "B", "node", "test/t", "tests/u"]
    left_out = [
        "node_modules/x", "a/__pycache__/x", ".git/config", "a/.hidden", "__pycache__/deep/x",
    ]  # fmt: skip
    for name in names + left_out:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    for split in ("bytes", "files"):
        corpus = load_corpus(str(tmp_path), split)
        assert (corpus.source, corpus.skipped) == (str(tmp_path), 0)
        parts = [x.tobytes().split(b"\0")[1:] for x in (corpus.train, corpus.validation)]
        assert sorted(parts[0] + parts[1]) == sorted(f"text of {x}".encode() for x in names)
        for part in parts:
            assert part == sorted(part)
        assert corpus.train.dtype == corpus.validation.dtype == np.uint8


def test_a_split_by_hand(tmp_path):
    """SHA-256 of the names gives the order d, c, b, a; of 1,000 bytes the split takes at least 50,
    and at most 200 uncut."""
    order = ["d", "c", "b", "a"]
    for sizes, validation, cut in (
        ({"d": 50, "a": 950}, 50, None),
        ({"d": 49, "c": 1, "a": 950}, 50, None),
        ({"d": 49, "c": 151, "a": 800}, 200, None),
        ({"d": 49, "c": 152, "a": 799}, 100, "c"),
        ({"d": 200, "a": 800}, 200, None),
        ({"d": 201, "a": 799}, 100, "d"),
        ({"d": 20, "c": 20, "b": 300, "a": 660}, 100, "b"),
    ):
        folder = tmp_path / "-".join(map(str, sizes.values()))
        folder.mkdir()
        for name, size in sizes.items():
            (folder / name).write_text(name * size)
        assert sorted(sizes, key=order.index) == list(sizes)
        corpus = load_corpus(str(folder))
        assert len(corpus.validation) - corpus.validation_files == validation
        assert corpus.cut == cut


def test_the_smallest_texts(tmp_path):
    path = tmp_path / "x"
    for text, end in ((b"ab", b"b"), (b"abcdefghi", b"i"), (b"abcdefghijklmnopqrst", b"st")):
        path.write_bytes(text)
        assert load_corpus(str(path)).validation.tobytes() == b"\0" + end


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda path: None,
            "expected a file or folder of text, got {path!r}, which is not there (or 'stdlib' for "
            "Python's own source)",
        ),
        (lambda path: path.write_text(" \n"), "expected text in {path}, got an empty file"),
        (
            lambda path: path.write_bytes(b"a\0b"),
            "expected text in {path}, got a binary file (it has NUL bytes)",
        ),
        (
            lambda path: (path.mkdir(), (path / "x").touch(), (path / "y").touch()),
            "expected text files in {path}, got 2 files, none of them readable, non-empty text",
        ),
    ],
)
def test_what_is_said_of_bad_paths(tmp_path, make, text):
    make(tmp_path / "data")
    with pytest.raises(DataError) as error:
        load_corpus(str(tmp_path / "data"))
    assert str(error.value) == "--data: " + text.format(path=str(tmp_path / "data"))


def test_what_is_said_of_too_little_text():
    with pytest.raises(DataError) as error:
        require_length(corpus_of(b"x" * 11, b"y" * 10), 10)
    assert str(error.value) == (
        "--data: expected at least 11 bytes in the validation split (--seq-len 10 and one more), "
        "got 10; give more text or a shorter --seq-len"
    )


def test_a_fingerprint_by_hand():
    expected = hashlib.sha256(b"\3\0\0\0\0\0\0\0abc\2\0\0\0\0\0\0\0de").hexdigest()
    assert corpus_of(b"abc", b"de").fingerprint == expected


def test_batches_by_hand():
    """Runs that were begun with an earlier version go on with the same ones."""
    corpus = corpus_of(bytes(range(256)), b"")
    tokens, targets = training_batch(corpus, seed=5, index=7, batch_size=3, seq_len=100)
    starts = np.random.default_rng([5, 7]).integers(0, 156, size=3)
    assert tokens.tolist() == [list(range(start, start + 100)) for start in starts]
    assert targets.tolist() == [list(range(start + 1, start + 101)) for start in starts]
    assert tokens.is_contiguous()
    assert targets.is_contiguous()


def test_a_single_file_is_cut_at_its_last_tenth(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(1, 101)))
    corpus = load_corpus(str(path))
    assert corpus.train.tobytes() == b"\0" + bytes(range(1, 91))
    assert corpus.validation.tobytes() == b"\0" + bytes(range(91, 101))
    assert (corpus.train_files, corpus.validation_files, corpus.skipped) == (1, 1, 0)
    for split in ("bytes", "files"):
        assert load_corpus(str(tmp_path), split).fingerprint == corpus.fingerprint


def test_a_file_name_that_is_not_utf8(tmp_path):
    write_texts(tmp_path)
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w") as file:
        file.write("x")
    assert load_corpus(str(tmp_path)).train_files + load_corpus(str(tmp_path)).validation_files == 9


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, "expected a file or folder of text, got '.*', which is not there"),
        (lambda path: path.write_text(""), "expected text in .*, got an empty file"),
        (lambda path: path.write_bytes(b"a\0b"), "expected text in .*, got a binary file"),
        (lambda path: path.mkdir(), "expected text files in .*, got 0 files"),
        (lambda path: (path.mkdir(), (path / "x").touch()), "got 1 files, none of them readable"),
    ],
)
def test_bad_paths(tmp_path, make, text):
    path = tmp_path / "data"
    make(path)
    with pytest.raises(DataError, match=text):
        load_corpus(str(path))


def test_the_empty_path_is_not_this_folder():
    with pytest.raises(DataError, match="got '', which is not there"):
        load_corpus("")


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text("x")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # chmod would not stop root
    with pytest.raises(DataError, match=r"cannot read .*secret\.txt: Permission denied"):
        load_corpus(str(path))
    with pytest.raises(DataError, match="got 1 files, none of them readable"):
        load_corpus(str(tmp_path))


def test_the_standard_library():
    corpus = load_corpus("stdlib")
    assert len(corpus.train) > 5_000_000
    assert 0.02 < corpus.validation_files / corpus.train_files < 0.1
    assert b"class ThreadPoolExecutor" in corpus.train.tobytes() + corpus.validation.tobytes()


def test_of_pythons_own_source_tests_and_packages_are_left_out(tmp_path, monkeypatch):
    names = ("a.py", "b/c.py", "b/test/d.py", "tests/e.py", "site-packages/f.py", "g.txt")
    for name in (*names, "__pycache__/h.py", "b/node_modules/i.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    monkeypatch.setattr("sysconfig.get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    corpus = load_corpus("stdlib", "files")  # which cuts none
    both = corpus.train.tobytes() + corpus.validation.tobytes()
    assert sorted(both.split(b"\0")[1:]) == [b"text of a.py", b"text of b/c.py"]


def test_too_little_for_one_sequence():
    corpus = corpus_of(b"x" * 100, b"y" * 10)
    require_length(corpus, 9)
    with pytest.raises(DataError, match=r"at least 11 bytes in the validation split .* got 10"):
        require_length(corpus, 10)
    with pytest.raises(DataError, match=r"at least 101 bytes in the training split .* got 100"):
        require_length(corpus, 100)


def test_batches_hang_on_seed_and_index_alone():
    corpus = corpus_of(bytes(range(256)) * 20, b"")
    arguments = {"seed": 5, "batch_size": 4, "seq_len": 32}
    tokens, targets = training_batch(corpus, index=7, **arguments)
    np.random.seed(3)
    torch.manual_seed(9)
    again, _ = training_batch(corpus, index=7, **arguments)
    assert torch.equal(tokens, again)
    assert tokens.shape == targets.shape == (4, 32)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal((tokens + 1) % 256, targets)
    assert not torch.equal(tokens, training_batch(corpus, index=8, **arguments)[0])
    assert not torch.equal(tokens, training_batch(corpus, index=7, **{**arguments, "seed": 6})[0])


def test_batches_reach_both_ends():
    corpus = corpus_of(b"abcd", b"")
    drawn = {
        bytes(training_batch(corpus, seed=0, index=index, batch_size=1, seq_len=2)[1][0].tolist())
        for index in range(40)
    }
    assert drawn == {b"bc", b"cd"}


def test_validation_windows_do_not_overlap_and_spread():
    corpus = corpus_of(b"", bytes(range(101)))
    assert validation_starts(corpus, count=4, seq_len=10).tolist() == [0, 20, 50, 70]
    assert len(validation_starts(corpus, count=99, seq_len=10)) == 10
    exact = corpus_of(b"", bytes(100))  # the last window has no byte after it
    assert len(validation_starts(exact, count=99, seq_len=10)) == 9
    batches = list(validation_batches(corpus, count=3, batch_size=2, seq_len=10))
    assert [len(tokens) for tokens, _ in batches] == [2, 1]
    assert batches[1][1][0].tolist() == list(range(61, 71))


def test_entropies_by_hand():
    # 4 a and 2 b; pairs aa 2, ab 1, bb 1, ba 1.
    corpus = corpus_of(b"aaabba", b"ab")
    counted = baselines(corpus, count=1, seq_len=1)
    b = (2 + 1) / (6 + 256)
    assert counted.unigram == pytest.approx(-math.log(b))
    assert counted.bigram == pytest.approx(-math.log((1 + b) / (3 + 1)))


def test_entropies_of_what_was_never_seen_are_finite():
    counted = baselines(corpus_of(b"aaaa", b"xyz"), count=1, seq_len=2)
    assert counted.unigram == pytest.approx(math.log(260))
    assert counted.bigram == pytest.approx(math.log(260))


def test_entropies_do_not_hang_on_the_chunk(monkeypatch):
    drawn = np.random.default_rng(0).integers(97, 105, 1000)
    corpus = corpus_of(bytes(drawn.tolist()), b"abcdefgh" * 2)
    whole = baselines(corpus, count=99, seq_len=1)
    for size in (7, 499, 1000):  # at 499 one pair is left for the last
        monkeypatch.setattr("nsa.training.data._COUNTED_AT_ONCE", size)
        assert baselines(corpus, count=99, seq_len=1) == whole


def test_the_split_is_the_same_in_another_process(tmp_path):
    corpus = load_corpus(str(write_texts(tmp_path)))
    code = (
        "import sys; from nsa.training.data import load_corpus; "
        "print(load_corpus(sys.argv[1]).fingerprint)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert printed.stdout.strip() == corpus.fingerprint
