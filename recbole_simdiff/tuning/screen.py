"""Terminal output of a search."""

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence

from tqdm.auto import tqdm

from recbole_simdiff.log import logger
from recbole_simdiff.tuning.trials import Search, Trial, shortened


class Screen(io.TextIOBase):
    """Terminal output of a search: one bar with the run's last line, and a line for each trial.

    It is a text stream, so that the output of a run can be redirected to it.

    Args:
        search (Search): the search.
        trials (Sequence): trials of an earlier start, which are not shown again.
    """

    def __init__(self, search: Search, trials: Sequence[Trial]) -> None:
        self.search, self.shown = search, {trial.number for trial in trials}
        self.terminal = sys.stderr
        self.bar = tqdm(
            total=search.trials,
            initial=len(trials),
            desc=f"tune {search}",
            unit="trial",
            disable=None if search.settings.get("show_progress", True) else True,
        )

    def write(self, text: str) -> int:
        """Show the last line of the text beside the bar."""
        for line in filter(None, text.split("\n")):
            self.bar.set_postfix_str(line)
        return len(text)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Within the block, text written to standard error is shown beside the bar."""
        try:
            with contextlib.redirect_stderr(self):
                yield
        finally:
            self.bar.set_postfix_str("")

    def show(self, trials: Sequence[Trial]) -> None:
        """Print a line for each trial that was not shown yet, and move the bar.

        Args:
            trials (Sequence): all trials that have ended.
        """
        for trial in trials:
            if trial.number not in self.shown:
                self.shown.add(trial.number)
                setting = ", ".join(f"{k}={shortened(v)}" for k, v in trial.values.items())
                score = "" if trial.score is None else f" {self.search.metric} {trial.score:.5f}"
                # Hyperopt replaces standard error by a stream of its own.
                with contextlib.redirect_stderr(self.terminal), tqdm.external_write_mode():
                    logger.info(
                        f"trial {trial.number} {trial.state}{score}, {trial.epochs} epochs: "
                        f"{setting}" + (f" ({trial.error})" if trial.error else "")
                    )
        self.bar.n = len(trials)
        self.bar.refresh()
