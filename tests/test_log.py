"""Where messages go: to the handlers that are there, to a run's file, to the terminal."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff import log
from recbole_simdiff.runs.restore import evaluate
from recbole_simdiff.runs.run import run_one as run
from recbole_simdiff.training.progress import Listener


class Kept(logging.Handler):
    """Keeps what it gets, as a notebook's handler would."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def kept() -> Iterator[Kept]:
    """A handler of the caller, on the root logger."""
    handler = Kept()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


def state() -> list[Any]:
    """Level and handlers of both loggers."""
    return [(one.level, list(one.handlers)) for one in (logging.getLogger(), log.logger)]


def test_a_run_leaves_handlers_and_levels_as_they_were(make_config: Any, kept: Kept) -> None:
    before = state()
    result = run(make_config("SASRec"))
    assert state() == before
    evaluate(result.run_dir)
    assert state() == before
    with pytest.raises(IndexError):
        run(make_config("SASRec"), listeners=[Broken()])
    assert state() == before


class Broken(Listener):
    """A listener that ends the training by a mistake of its own."""

    def on_epoch(self, *_: Any) -> None:
        raise IndexError


def test_the_callers_handlers_and_the_runs_file_get_the_same(make_config: Any, kept: Kept) -> None:
    place = Path(run(make_config("SASRec", epochs=2)).run_dir)
    lines = (place / f"{place.name}.log").read_text().splitlines()
    assert kept.messages == lines
    assert [line.split()[:3] for line in lines[3:]] == [["train", "epoch", n] for n in "01"]
    other = Path(run(make_config("SASRec", epochs=1)).run_dir)  # goes to its own file alone
    assert (place / f"{place.name}.log").read_text().splitlines() == lines
    assert len((other / f"{other.name}.log").read_text().splitlines()) == 4


def test_the_level_is_that_of_the_configuration(make_config: Any, kept: Kept) -> None:
    place = Path(run(make_config("SASRec", state="WARNING")).run_dir)
    assert (place / f"{place.name}.log").read_text() == ""
    assert kept.messages == []


class AsRecBole(Listener):
    """Logs as RecBole does, to the root logger."""

    def on_epoch(self, *_: Any) -> None:
        logging.getLogger().warning("twice regularised")


def test_recboles_messages_reach_the_runs_file(make_config: Any) -> None:
    place = Path(run(make_config("SASRec", epochs=1), listeners=[AsRecBole()]).run_dir)
    assert "twice regularised\n" in (place / f"{place.name}.log").read_text()


def test_the_terminal_gets_both_loggers_while_it_is_attached(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = state()
    with log.terminal():
        log.logger.info("ours")
        logging.getLogger().info("RecBole's")
        with log.at_level("ERROR"):
            log.logger.warning("ours again")
            logging.getLogger().warning("RecBole's again")
    assert state() == before
    log.logger.info("later")
    assert capsys.readouterr().err == "ours\nRecBole's\n"


UNCONFIGURED = """
import sys
from recbole_simdiff import Config
from recbole_simdiff.pipelines.start import start
from recbole_simdiff.log import logger
from recbole_simdiff.training.progress import Listener
class Warns(Listener):
    def on_epoch(self, *_):
        logger.warning("look at this")
start(Config("SASRec", "toy", (), {values!r}), listeners=[Warns()])
"""


def test_without_configured_logging_warnings_are_shown_and_no_more(data_path: Path) -> None:
    values = {"data_path": str(data_path), "epochs": 1, "topk": [1, 5], "valid_metric": "NDCG@5"}
    values |= {"show_progress": False, "use_gpu": False}
    script = UNCONFIGURED.format(values=values)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert [line for line in found.stderr.splitlines() if "arning:" not in line] == ["look at this"]
    assert found.stdout == ""
