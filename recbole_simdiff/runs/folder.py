"""The folder of a run: its name, its lock, its log."""

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from recbole_simdiff import distributed, files, log
from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import UserError


def new_folder(config: Config, run_dir: Path | None) -> Path:
    """The folder of a run, made: the one given, or a fresh one under ``checkpoint_dir``."""
    while distributed.rank() == 0:
        name = f"{config.name}-{config['dataset']}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = run_dir or Path(config["checkpoint_dir"]) / f"{name}-{secrets.token_hex(2)}"
        try:
            folder.mkdir(parents=True, exist_ok=run_dir is not None)
        except FileExistsError as error:
            if run_dir or not folder.is_dir():
                raise _unwritable(folder, error) from error
        except OSError as error:
            raise _unwritable(folder, error) from error
        else:
            return folder
    return Path()


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Within the block no other process trains in the folder; what killed ones left is swept.

    Raises:
        UserError: if another process does, or the folder cannot be written.
    """
    with ExitStack() as lock:
        taken = False
        try:
            if distributed.rank() == 0:  # the log is there in any case
                lock.enter_context(files.locked(_log(run_dir), wait=False))
                files.sweep(run_dir)
        except BlockingIOError:
            taken = True
        except OSError as error:
            raise _unwritable(run_dir, error) from error
        if distributed.all_reduce_max(taken):
            raise UserError(f"another process trains in {run_dir}; wait for it, or stop it")
        yield


def _log(run_dir: Path) -> Path:
    """The log of a run, by whatever path its folder is called."""
    return run_dir / f"{run_dir.resolve().name}.log"


def _unwritable(run_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"the run folder {run_dir} cannot be written ({error.strerror}); checkpoint_dir says where "
        "runs go"
    )


class _LogFile(logging.FileHandler):
    """What a full disk does not take is lost; that checkpoints cannot be written is told."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """No traceback."""


@contextmanager
def logged(config: Config, run_dir: Path | None = None) -> Iterator[None]:
    """Within the block, log from the level ``state``; with a run folder to its log, too.

    Of several processes the first one alone logs.

    Args:
        config (Config): resolved configuration.
        run_dir (Path | None): folder of a run.

    Raises:
        UserError: if the folder cannot be written.
    """
    level = config["state"].upper() if distributed.rank() == 0 else "CRITICAL"
    with ExitStack() as logging_here:
        logging_here.enter_context(log.at_level(level))
        if run_dir is not None:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                logging_here.enter_context(log.also_to(_LogFile(_log(run_dir))))
            except OSError as error:
                raise _unwritable(run_dir, error) from error
        yield
