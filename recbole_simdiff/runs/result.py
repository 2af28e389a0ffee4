"""What a run leaves: result.json and the table it prints."""

import json
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from recbole_simdiff import distributed
from recbole_simdiff.config.config import Config
from recbole_simdiff.data.dataset import FlatDataset
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import KEPT, Metrics, protocol_name
from recbole_simdiff.runs.build import SplitMetrics
from recbole_simdiff.training.progress import Progress
from recbole_simdiff.version import __version__

RESULT = "result.json"

# Of a result, what is sent to trackers.
TRACKED = ("valid", "test", "best_epoch", "seconds", "peak_memory_mb", "peak_gpu_memory_mb")


@dataclass
class RunResult:
    """What one run found.

    Attributes:
        valid, test (dict): protocol -> metric -> unrounded value, of the best epoch. The name of a
            protocol says which candidates are drawn, see ``protocol_name``.
        best_epoch (int | None): counted from 0.
        epochs (int): epochs trained.
        seconds (float): of training and validation.
        peak_memory_mb (float): largest resident set of the process, MiB; of the first one, if the
            run had several.
        statistics (dict): users, items, actions.
        config (dict): model, dataset and every value.
        versions (dict): of the libraries.
        run_dir (str): folder of the checkpoints.
        tested (bool): whether the test part was read; in a search it is not.
        by_length (dict): input length, such as "6-20", -> test metrics with the history kept, and
            ``rows``, how many there are.
        sampling (dict): for models that draw when they score: metric -> mean and standard deviation
            of the test metric, history kept, over ``seeds`` sampling seeds.
        augmentation (dict): for DiffuASR, what its earlier stages found.
        processes (int): how many trained together.
        peak_gpu_memory_mb (float): most memory that tensors of this process took on a GPU, MiB; 0
            without one.
        record (dict): command, code, data, seed and host, see ``record.describe_run``; empty for an
            evaluation and for runs of earlier versions.
    """

    valid: dict[str, Metrics]
    test: dict[str, Metrics]
    best_epoch: int | None
    epochs: int
    seconds: float
    peak_memory_mb: float
    statistics: dict[str, int]
    config: dict[str, Any]
    versions: dict[str, str]
    run_dir: str
    tested: bool = True
    by_length: dict[str, Metrics] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    peak_gpu_memory_mb: float = 0.0
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def digits(self) -> int:
        """Decimals in tables."""
        return int(self.config["values"]["metric_decimal_place"])

    def table(self) -> str:
        """Validation and test metrics of both protocols, rounded for reading."""
        if not self.valid and not self.test:
            return "nothing was validated or tested"
        return format_table({"valid": self.valid, "test": self.test}, self.digits)

    def to_frame(self) -> pd.DataFrame:
        """The metrics, unrounded: a row for each split and protocol, a column for each metric."""
        return pd.DataFrame(
            {"split": split, "protocol": protocol} | metrics
            for split, protocols in (("valid", self.valid), ("test", self.test))
            for protocol, metrics in protocols.items()
        )


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Rows of cells as text, the first ``left`` columns aligned to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def format_table(
    results: Mapping[str, Mapping[str, Metrics]],
    digits: int = 4,
    names: tuple[str, str] = ("split", "protocol"),
) -> str:
    """Rows split x protocol, columns metrics.

    Args:
        results (Mapping): split -> protocol -> metric -> value.
        digits (int): decimals.
        names (tuple): headings of the first two columns.

    Returns:
        str: an aligned table.
    """
    first = next(metrics for protocols in results.values() for metrics in protocols.values())
    rows = [[*names, *first]]
    for split, protocols in results.items():
        for protocol, metrics in protocols.items():
            rows.append([split, protocol, *(f"{value:.{digits}f}" for value in metrics.values())])
    return aligned(rows, 2)


def read_result(run_dir: Path) -> RunResult:
    """The result of a finished run.

    Raises:
        UserError: if there is none.
    """
    path = run_dir / RESULT
    try:
        # Where it is now, not where it was written.
        values = {**json.loads(path.read_text()), "run_dir": str(run_dir)}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not the result of a finished run: {error}") from None
    return result_of(values, str(path))


def result_of(values: Mapping[str, Any], place: str) -> RunResult:
    """The result that stored fields describe; other fields are passed over.

    Args:
        values (Mapping): content of ``result.json``, or the record of an experiment's run.
        place (str): where it was read, for the message.

    Raises:
        UserError: if fields are missing or no result's.
    """
    known = {f.name for f in fields(RunResult)}
    try:
        result = RunResult(**{k: v for k, v in values.items() if k in known})
        modes = result.config["values"].get("eval_args", {}).get("mode", {})
        for split, results in (("valid", result.valid), ("test", result.test)):
            if KEPT in results:  # which earlier versions called drawn candidates, too
                setattr(result, split, _named(results, modes.get(split, "full")))
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{place} is not the result of a finished run: {error}") from None
    return result


def build_result(
    config: Config,
    dataset: FlatDataset,
    metrics: SplitMetrics,
    progress: Progress,
    run_dir: Path,
    augmentation: dict[str, Any],
    tested: bool,
) -> RunResult:
    """What is written of a run.

    Args:
        config (Config): resolved configuration.
        dataset (FlatDataset): all interactions, for their statistics.
        metrics (SplitMetrics): of the best epoch.
        progress (Progress): where training stands.
        run_dir (Path): folder of the run.
        augmentation (dict): for DiffuASR, what is known of the pseudo-items.
        tested (bool): whether the test part was read.
    """
    modes = config["eval_args"]["mode"]
    return RunResult(
        valid=_named(metrics.splits.get("valid", {}), modes["valid"]),
        test=_named(metrics.splits.get("test", {}), modes["test"]),
        best_epoch=progress.best_epoch,
        epochs=len(progress.log),
        seconds=progress.seconds,
        peak_memory_mb=peak_memory_mb(),
        statistics=asdict(dataset.statistics),
        config=config.plain(),
        versions=versions(),
        run_dir=str(run_dir),
        tested=tested,
        by_length=metrics.by_length,
        sampling=metrics.sampling,
        augmentation=augmentation,
        processes=distributed.world_size(),
        peak_gpu_memory_mb=torch.cuda.max_memory_allocated() / 2**20,
    )


def _named(results: Mapping[str, Metrics], mode: str) -> dict[str, Metrics]:
    return {protocol_name(name, mode): metrics for name, metrics in results.items()}


def peak_memory_mb() -> float:
    """Largest resident set of this process so far, MiB.

    What ``getrusage`` says begins with the set of the process that started this one, so on Linux
    the kernel's own mark of this program is read.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> dict[str, str]:
    """Versions that shape the numbers."""
    libraries = {name: version(name) for name in ("recbole", "torch", "numpy", "pandas")}
    return {"recbole_simdiff": __version__, "python": platform.python_version(), **libraries}
