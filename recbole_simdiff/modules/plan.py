"""How a model says it is trained."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch.nn import Parameter


class Update(NamedTuple):
    """One optimiser step on a batch, over some of the model's parameters.

    Attributes:
        name (str): shown in front of its loss parts. Updates of one name share an optimiser, and
            so its moments; they must have the same parameters.
        parameters (Sequence): those that move; all others are constants to its loss.
        loss (Callable): batch -> loss, as ``calculate_loss``.
        by_rows (Sequence): those of the parameters whose gradients are sparse. Adam moves only the
            rows that a batch has used, each by its own moments.
    """

    name: str
    parameters: Sequence[Parameter]
    loss: Callable[[Any], Any]
    by_rows: Sequence[Parameter] = ()


class Phase(NamedTuple):
    """One stage of training.

    Attributes:
        name (str): shown in the log and stored in checkpoints; ``begin_epoch`` is given it.
        epochs (int): at most this many.
        evaluate (bool): validate, keep the best epoch and stop early; otherwise run all epochs.
        updates (tuple): what is done with each batch, in this order; empty for one step on
            ``calculate_loss`` over all parameters.
        refine (bool): begin with the best weights of the phase before, whose score stays the one to
            beat, and with its optimisers, where the updates have the same names; otherwise with the
            last weights, a best epoch and optimisers of its own.
        fit (Callable | None): called with the training data set in place of an epoch of updates,
            for a model that is computed and not trained step by step.
    """

    name: str
    epochs: int
    evaluate: bool = True
    updates: tuple[Update, ...] = ()
    refine: bool = False
    fit: Callable[[Any], None] | None = None


def with_epochs(phases: Sequence[Phase], epochs: Mapping[str, int]) -> list[Phase]:
    """The phases with other numbers of epochs.

    Args:
        phases (Sequence): of a model.
        epochs (Mapping): name of a phase -> its epochs; other phases keep theirs.
    """
    return [phase._replace(epochs=epochs.get(phase.name, phase.epochs)) for phase in phases]
