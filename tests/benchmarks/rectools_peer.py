"""RecTools' models, epoch by epoch; run by ``peers.py`` in an environment of their own.

The first request names the peer and the file of interactions; each further one trains an epoch.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

# As in ``peers.py``.
SIZES = {"n_blocks": 2, "n_heads": 2, "n_factors": 64, "batch_size": 256, "session_max_len": 50}


def settings(peer: str) -> dict[str, Any]:
    """What RecTools calls the losses and layers of a peer."""
    if peer == "SASRec, full softmax":
        return {"loss": "softmax"}
    if peer == "gSASRec":
        return {"loss": "gBCE", "n_negatives": 256, "gbce_t": 0.75}
    from rectools.models.nn.transformers.ligr import LiGRLayers

    return {
        "loss": "sampled_softmax",
        "n_negatives": 256,
        "transformer_layers_type": LiGRLayers,
    }


class Peer:
    """A model of RecTools and its data."""

    def __init__(self, peer: str, interactions: str) -> None:
        import pandas as pd
        from pytorch_lightning import Callback, Trainer
        from rectools import Columns
        from rectools.dataset import Dataset
        from rectools.models import SASRecModel

        table = pd.read_csv(interactions)
        table.columns = [Columns.User, Columns.Item, Columns.Datetime]
        table[Columns.Datetime] = pd.to_datetime(table[Columns.Datetime], unit="s")
        table[Columns.Weight] = 1.0
        self.data = Dataset.construct(table)

        times = self.times = {"begin": 0.0, "end": 0.0}

        class Clock(Callback):  # type: ignore[misc]
            """Notes when an epoch begins and ends; data are prepared before."""

            def __deepcopy__(self, memo: Any) -> "Clock":
                return self

            def on_train_epoch_start(self, *_: Any) -> None:
                times["begin"] = time.perf_counter()

            def on_train_epoch_end(self, *_: Any) -> None:
                times["end"] = time.perf_counter()

        def trainer() -> Any:
            return Trainer(
                max_epochs=1,
                min_epochs=1,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[Clock()],
            )

        self.model = SASRecModel(
            **SIZES, **settings(peer), lr=1e-3, epochs=1, get_trainer_func=trainer
        )

    def epoch(self) -> float:
        """Train one more; its seconds without the preparation of the data."""
        self.model.fit_partial(self.data, min_epochs=1, max_epochs=1)
        return self.times["end"] - self.times["begin"]


def main() -> None:
    """Answer the requests of ``peers.py``."""
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        from importlib.metadata import version

        import rectools
        import torch

        answer: dict[str, Any] = {"version": version(rectools.__name__), "torch": torch.__version__}
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=out, flush=True)
        return
    peer = Peer(**json.loads(sys.stdin.readline()))
    peer.epoch()
    print(json.dumps(answer), file=out, flush=True)
    for _ in sys.stdin:
        seconds = peer.epoch()
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) / 2**20
        print(json.dumps({"seconds": seconds, "peak": peak}), file=out, flush=True)


if __name__ == "__main__":
    main()
