"""The machine, its collectives and its memory."""

import os
import platform
from collections.abc import Iterator

import torch
import torch.distributed as dist

from recbole_simdiff import distributed
from recbole_simdiff.errors import OutOfMemory, explained_out_of_memory
from recbole_simdiff.version import __version__
from tests.gpu.session import Row, Session


def environment(session: Session) -> Iterator[Row]:
    """Versions, and the device."""
    facts = {
        "recbole_simdiff": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "device": platform.processor() or platform.machine(),
    }
    if session.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts["device"] = card.name
        facts["memory GiB"] = round(card.total_memory / 2**30, 1)
        facts["cuda"] = torch.version.cuda
        facts["tf32"] = torch.backends.cuda.matmul.allow_tf32
    for name, value in facts.items():
        yield {"what": name, "value": value}


def collectives(session: Session) -> Iterator[Row]:
    """A process group of one process, with NCCL where there is a GPU."""
    backend = "cpu:gloo,cuda:nccl" if session.device == "cuda" else "gloo"
    store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        rows = torch.arange(12.0, device=session.device).view(4, 3).requires_grad_()
        gathered = distributed._AllRows.apply(rows)
        gathered.pow(2).sum().backward()
        assert rows.grad is not None
        right = torch.equal(gathered, rows) and torch.equal(rows.grad, 2 * rows)
        yield {"collective": "all_gather of rows, with gradient", "ok": right}
        for there in dict.fromkeys((session.device, "cpu")):
            values = torch.arange(3.0, device=there)
            dist.all_reduce(values)
            dist.broadcast(values, 0)
            right = values.tolist() == [0.0, 1.0, 2.0]
            yield {"collective": f"all_reduce and broadcast on {there}", "ok": right}
    finally:
        dist.destroy_process_group()


def memory(session: Session) -> Iterator[Row]:
    """The message for memory that runs out says how much was asked for, and what helps."""
    config = session.toy("SASRecCE")
    try:
        with explained_out_of_memory(config):
            torch.empty(2**48, dtype=torch.uint8, device=session.device)
    except OutOfMemory as error:
        text = str(error)
        named = "unknown" not in text and "Reduce train_batch_size=" in text
        yield {"message": text, "ok": named}
    else:
        yield {"message": "none", "ok": False}
