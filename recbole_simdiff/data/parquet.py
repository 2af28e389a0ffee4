"""Parquet files, read in batches by pyarrow, which is an extra."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recbole_simdiff.errors import UserError

MAGIC = b"PAR1"  # how such a file begins


def open_parquet(path: Path) -> Any:
    """The file, as ``pyarrow.parquet.ParquetFile``.

    Raises:
        UserError: if it is damaged, or pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(
            f"{path} is Parquet, which needs pyarrow: pip install 'recbole_simdiff[parquet]'"
        ) from None
    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error


def parquet_rows(path: Path, file: Any, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Some columns row by row, as Python values.

    Args:
        path (Path): of the file, for the message.
        file (ParquetFile): see ``open_parquet``.
        columns (Sequence): their names, in the order of the result.

    Raises:
        UserError: if the file is damaged.
    """
    from pyarrow import ArrowException

    try:
        for batch in file.iter_batches(columns=list(columns)):
            yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
