"""The processes of one command: this one alone, or those that ``torchrun`` started.

Of all of them one speaks: rank 0 prints, and the first that fails says why. One that is gone,
however it went, ends the others.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime as dt
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from nsa.errors import ConfigError, UsageError, show
from nsa.settings import foreign_variable

TIMEOUT = dt.timedelta(minutes=10)
"""Of a collective: a process that hangs ends the others then. One that is gone does so at once."""
_FOREVER = dt.timedelta(days=365)
_PATIENCE_S = 10.0
"""How long a failed collective waits for the news that another process is gone."""
_EXIT_ERROR = 2
_SPEAKER = "nsa/speaker"


class Ranks:
    """One process."""

    rank = 0
    size = 1
    size_here = 1
    """Processes on this machine."""

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank."""
        return flag

    def share(self, read: Callable[[], Any]) -> Any:
        """What ``read`` returns on rank 0, which alone calls it; values that JSON can hold."""
        return read()

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Refuse values, which JSON can hold, that are others than those of rank 0.

        Raises:
            ConfigError: naming the first that differs; on the rank that has it alone.
        """


def _variable(name: str, *, least: int = 0, most: int | None = None) -> int:
    """A number that torchrun sets."""
    text = foreign_variable(name)
    with contextlib.suppress(ValueError, TypeError):  # a word, or None
        value = int(text)  # type: ignore[arg-type]
        if least <= value and (most is None or value <= most):
            return value
    wanted = f"an integer >= {least}" if most is None else f"{least} … {most}"
    raise UsageError(f"{name}: expected {wanted}, which torchrun sets, got {show(text)}")


class LaunchedRanks(Ranks):
    """The processes that ``torchrun`` started; made by :func:`launched`.

    CPU tensors are sent by gloo, tensors on GPUs by NCCL.
    """

    def __init__(self) -> None:
        if not dist.is_available():
            raise UsageError(
                "expected a torch with torch.distributed to run on several processes, got one "
                "built without; start the command without torchrun"
            )
        from torch.distributed.rendezvous import rendezvous  # which such a torch cannot import

        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        self.size = _variable("WORLD_SIZE", least=1)
        self.rank = _variable("RANK", most=self.size - 1)
        self.local_rank = self.rank
        if foreign_variable("LOCAL_RANK") is not None:
            self.local_rank = _variable("LOCAL_RANK", most=self.size - 1)
        if foreign_variable("LOCAL_WORLD_SIZE") is not None:
            self.size_here = _variable("LOCAL_WORLD_SIZE", least=1, most=self.size)
        try:
            self._store, *_ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=TIMEOUT,
            )
            self.ring = dist.new_group(backend="gloo", timeout=_FOREVER)
        except ValueError as error:
            raise UsageError(f"expected the variables that torchrun sets, got: {error}") from None
        except RuntimeError as error:
            address, port = map(foreign_variable, ("MASTER_ADDR", "MASTER_PORT"))
            reason = str(error).partition("\n")[0]
            raise UsageError(
                f"expected to meet the other processes at {address}:{port}, got: {reason}"
            ) from None

    def any(self, flag: bool) -> bool:
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def share(self, read: Callable[[], Any]) -> Any:
        data = json.dumps(read()).encode() if self.leads else b""
        size = torch.tensor(len(data))
        dist.broadcast(size, 0)
        sent = torch.empty(int(size), dtype=torch.uint8)
        if self.leads:
            sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(sent, 0)
        return json.loads(sent.numpy().tobytes())

    def require_same(self, values: Mapping[str, Any]) -> None:
        mine = json.loads(json.dumps(values))
        theirs = self.share(lambda: mine)
        for name in sorted(mine.keys() | theirs.keys()):
            one, other = theirs.get(name), mine.get(name)
            if one != other:
                raise ConfigError(
                    "expected the same command, configuration and data on every process, got "
                    f"{name} {show(one)} on rank 0 and {show(other)} on rank {self.rank}"
                )

    def device(self, kind: str) -> torch.device:
        """The CPU, or the GPU that is this process's: of its local rank.

        Raises:
            ConfigError: neither "cpu" nor "cuda", or more processes than GPUs.
        """
        if kind == "cpu":
            return torch.device(kind)
        if kind != "cuda":
            raise ConfigError(f"--device: expected cpu or cuda on several processes, got {kind}")
        found = torch.cuda.device_count()
        if self.local_rank >= found:
            raise ConfigError(
                f"--device: expected a GPU for each process of this machine, got {found} for "
                f"{self.local_rank + 1} or more; start fewer, or take --device cpu"
            )
        device = torch.device(kind, self.local_rank)
        torch.cuda.set_device(device)
        return device

    def speaks(self) -> bool:
        """Whether this process is the first that has failed, and so the one to say why."""
        with contextlib.suppress(RuntimeError):  # a store that is gone with its process
            return bool(self._store.add(_SPEAKER, 1) == 1)
        return True

    def leave(self) -> None:
        """Wait for the other processes, and end the group."""
        self._watch.end()
        dist.destroy_process_group()

    def watch(self, say: Callable[[str], object]) -> None:
        """End this process as soon as another one is gone; ``say`` prints the reason."""
        self._watch = _Watch(self, say)
        self._watch.start()

    def fail(self, error: BaseException) -> None:
        """End this process in silence, unless it is the one to say what went wrong."""
        of_torch = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        if of_torch:  # a collective, perhaps, of one that is gone: then the watch ends this process
            self._watch.join(_PATIENCE_S)
        if not self.speaks():
            self._watch.join(_PATIENCE_S)  # until the one that speaks has spoken
            _exit()
        atexit.register(_exit)  # what NCCL still waits for would hold the interpreter up


class _Watch(threading.Thread):
    """Waits for a message of the next rank, which comes when that one has nothing more to do.

    It fails at once when that process is gone, whatever the main thread waits for meanwhile.
    """

    def __init__(self, ranks: LaunchedRanks, say: Callable[[str], object]) -> None:
        super().__init__(daemon=True)
        self._ranks, self._say = ranks, say
        self._next = (ranks.rank + 1) % ranks.size
        self._group = ranks.ring

    def run(self) -> None:
        try:
            dist.recv(torch.empty(1), self._next, group=self._group)
        except RuntimeError:
            ranks = self._ranks
            if ranks.speaks():
                self._say(
                    f"rank {self._next} of {ranks.size} processes is gone (killed, or it lost its "
                    "machine); the others have ended, too"
                )
            _exit()

    def end(self) -> None:
        """Say that this process has nothing more to do, and wait for the next one."""
        dist.send(torch.empty(1), (self._ranks.rank - 1) % self._ranks.size, group=self._group)
        self.join()


def _exit() -> NoReturn:
    """Leave now: what is still waited for, on a device or a network, never comes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(_EXIT_ERROR)


@contextlib.contextmanager
def launched(say: Callable[[str], object]) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, if it did.

    Stdout is rank 0's alone. An exception ends all processes; the first rank that has one raises
    it, the others exit in silence, with code 2.

    Args:
        say: prints the one line of an error, from any thread.

    Raises:
        UsageError: the environment is half torchrun's, the processes cannot meet, or torch has no
            ``torch.distributed``.
    """
    if foreign_variable("WORLD_SIZE") in (None, "1"):
        yield Ranks()
        return
    ranks = LaunchedRanks()
    ranks.watch(say)
    with contextlib.ExitStack() as stack:
        if not ranks.leads:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        ended: SystemExit | None = None
        try:
            try:
                yield ranks
            except SystemExit as error:  # --help
                ended = error
            ranks.leave()
        except BaseException as error:
            ranks.fail(error)
            raise
        if ended is not None:
            raise ended
