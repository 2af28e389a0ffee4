"""How a model says it is trained."""

from typing import NamedTuple


class Phase(NamedTuple):
    """One stage of training.

    Attributes:
        name (str): shown in the log and stored in checkpoints; a model that has an attribute
            ``train_stage`` finds it there.
        epochs (int): at most this many.
        evaluate (bool): validate, keep the best epoch and stop early; otherwise run all epochs.
    """

    name: str
    epochs: int
    evaluate: bool = True
