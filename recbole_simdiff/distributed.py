"""Training by several processes: how they are started, and how they exchange tensors.

Every process makes the same batches and takes its part of the rows of each (``local_rows``). Its
loss is one summand: the losses of all processes add up to the loss of one process on the whole
batch, and so do the gradients. A loss becomes such a summand in one of three ways:

    * a sum over rows or tokens, divided by a constant: unchanged
    * a mean over rows or tokens: multiplied by ``local_fraction``
    * a loss that compares the rows of a batch: wrapped in ``over_global_batch``

In a single process every function here returns its input. All processes must call these functions
in the same order.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from recbole_simdiff.errors import ProcessLost, UserError

TIMEOUT = timedelta(minutes=10)  # longest wait for another process

_TEXT_BYTES = 4096

P = ParamSpec("P")

Rows = TypeVar("Rows", Tensor, list[int])


def is_distributed() -> bool:
    """Whether torchrun or ``launch`` started this process as one of several."""
    by_torchrun = dist.is_available() and dist.is_torchelastic_launched()
    return by_torchrun and int(os.environ["WORLD_SIZE"]) > 1


def launch(n: int) -> int:
    """Run the command of this process in n processes on this host, as torchrun would.

    Signals that ask to stop are passed on to the processes. When one fails, the others are ended.

    Args:
        n (int): number of processes. Unless OMP_NUM_THREADS is set, they share the threads.

    Returns:
        int: exit code: 0, that of the first process that failed, or 128 + signal number.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // n)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        run_id=str(uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup; the processes ignore it
        config.signals_to_handle = "SIGTERM,SIGINT,SIGQUIT"
    logging.disable(logging.CRITICAL)  # each process reports its own errors
    try:
        elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        name = signal.Signals(-first.exitcode).name
        print(f"error: process {first.local_rank} was ended by {name}", file=sys.stderr)
        return 128 - first.exitcode
    finally:
        logging.disable(logging.NOTSET)
    return 0


@contextmanager
def group() -> Iterator[None]:
    """Within the block, the process group of torch exists if ``is_distributed``."""
    if not is_distributed():
        yield
        return
    # Runs on GPUs also exchange small tensors of the CPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_gpu() -> torch.device:
    """The GPU of this process: of a single process the default one, else that of its local rank.

    Raises:
        UserError: if there are fewer GPUs than processes.
    """
    if not is_distributed():
        return torch.device("cuda")
    local_rank, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= n_gpus:
        raise UserError(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes on a host with {n_gpus} GPUs: each needs "
            "one of its own. Start fewer processes, or give --use_gpu=false",
            keys=("use_gpu",),
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process. Only process 0 writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rows(rows: Rows) -> Rows:
    """This process's part of a batch's rows: every n-th, so that all have similar lengths."""
    return rows[rank() :: world_size()]


def local_fraction(n_rows: int) -> float:
    """The fraction of all rows or tokens that this process has.

    Args:
        n_rows (int): rows or tokens of this process; may be 0.
    """
    if world_size() == 1:
        return 1.0
    total = torch.tensor(n_rows)
    _call(dist.all_reduce, total)
    return n_rows / max(int(total), 1)


def over_global_batch(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let a loss compare the rows of all processes: its tensors [b, H] become [B, H].

    Every process computes the whole loss from the same numbers, and returns 1/n of it.

    Args:
        loss (Callable): takes tensors of rows; other arguments are passed on unchanged.
    """

    @wraps(loss)
    def shared(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if world_size() == 1:
            return loss(*args, **kwargs)
        arguments = [_AllRows.apply(a) if isinstance(a, Tensor) else a for a in args]
        named = {k: _AllRows.apply(a) if isinstance(a, Tensor) else a for k, a in kwargs.items()}
        return loss(*arguments, **named) / world_size()  # type: ignore[arg-type]

    return shared


class _AllRows(torch.autograd.Function):
    """The rows of all processes, in order of rank: [b, ...] -> [B, ...]; b may differ.

    All processes must compute the same from these rows and each count it as 1/n. Then the gradient
    of the whole is n times the local gradient, and no exchange is needed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        sizes = [torch.tensor(0) for _ in range(world_size())]
        _call(dist.all_gather, sizes, torch.tensor(len(rows)))
        counts = [int(size) for size in sizes]
        before = sum(counts[: rank()])
        ctx.local = slice(before, before + len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        _call(dist.all_gather, parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0][ctx.local] * world_size()


def gather_in_order(rows: Tensor, n_rows: int, batch_size: int) -> Tensor:
    """Collect rows that all processes computed batch by batch, in the order of the data set.

    Args:
        rows (Tensor): rows of this process, ``local_rows`` of each batch, [n, ...].
        n_rows (int): number of rows of all processes.
        batch_size (int): rows of a batch, before it was divided among processes.

    Returns:
        Tensor: [n_rows, ...], on every process.
    """
    n = world_size()
    if n == 1:
        return rows
    batches = torch.arange(n_rows).split(batch_size)
    positions = torch.cat([batch[number::n] for number in range(n) for batch in batches])
    gathered: Tensor = _AllRows.apply(rows)
    return torch.empty_like(gathered).index_copy_(0, positions, gathered)


def sum_gradients(parameters: Sequence[Parameter]) -> None:
    """Replace each gradient by its sum over all processes.

    A parameter without a gradient on every process still has none afterwards, so that optimisers
    skip it.
    """
    if world_size() == 1:
        return
    counts = torch.tensor([float(p.grad is not None) for p in parameters])  # of gradients
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(part.flatten() for part in parts), counts.to(parts[0])])
    _call(dist.all_reduce, flat)
    *sums, counts = flat.split([*(p.numel() for p in parameters), len(parameters)])
    for parameter, total, count in zip(parameters, sums, counts.tolist(), strict=True):
        parameter.grad = total.view_as(parameter) if count else None


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over all processes."""
    if world_size() > 1:
        _call(dist.all_reduce, values)
    return values


def all_reduce_max(value: int) -> int:
    """Largest value of all processes."""
    if world_size() == 1:
        return value
    maximum = torch.tensor(value)
    _call(dist.all_reduce, maximum, dist.ReduceOp.MAX)
    return int(maximum)


def broadcast_text(text: str) -> str:
    """The text of process 0, at most 4096 bytes."""
    if world_size() == 1:
        return text
    content = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
    content[: len(text.encode())] = torch.tensor(list(text.encode()))
    _call(dist.broadcast, content, 0)
    return bytes(content.tolist()).rstrip(b"\0").decode()


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors with those of process 0."""
    for tensor in tensors if world_size() > 1 else ():
        _call(dist.broadcast, tensor, 0)


def all_gather(values: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The values of every process, in order of rank; names and shapes must be the same."""
    if world_size() == 1:
        return [values]
    by_rank: list[dict[str, Tensor]] = [{} for _ in range(world_size())]
    for name, value in values.items():
        parts = [torch.empty_like(value) for _ in by_rank]
        _call(dist.all_gather, parts, value)
        for gathered, part in zip(by_rank, parts, strict=True):
            gathered[name] = part
    return by_rank


def barrier() -> None:
    """Wait until all processes have called this."""
    all_reduce_max(0)


def _call(collective: Callable[..., Any], *arguments: Any) -> None:
    try:
        collective(*arguments)
    except RuntimeError as error:
        raise ProcessLost(
            "another process of this run has ended, or has not answered for "
            f"{TIMEOUT.seconds // 60} minutes; its own output says why ({error})"
        ) from error
