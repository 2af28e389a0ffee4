"""What training, evaluation and analysis ask of a model: the whole contract on one page."""

from collections.abc import Mapping
from typing import Any

from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor, nn

from recbole_simdiff.modules.plan import Phase


class Trainable:
    """What training asks of a module: how it is trained, and what it does between steps."""

    def training_plan(self) -> list[Phase]:
        """The phases of training, in order."""
        raise NotImplementedError

    def begin_epoch(self, phase: str, epoch: int) -> None:
        """Called before each epoch, and before the rest of one that is resumed.

        Args:
            phase (str): name of a phase of ``training_plan``.
            epoch (int): number of the epoch within the phase, from 0.
        """

    def end_step(self) -> None:
        """Called after the updates of each batch, for example to average the weights."""

    def monitored(self) -> dict[str, Tensor]:
        """Scalars of the last loss to be logged beside it, by name."""
        return {}


class SequentialModel(Trainable, SequentialRecommender):
    """Base of all models. Everything below has a default; a model overrides what differs.

    Besides, a model must have RecBole's three methods: ``calculate_loss(interaction)``, a tensor, a
    tuple of tensors or a NamedTuple whose field names appear in the log; ``predict(interaction)``,
    the score of each row's target [B]; and ``full_sort_predict(interaction)``, the scores of all
    items [B, n_items]. Sequences are right-padded with 0.

    Args:
        config (Config): resolved configuration.
        dataset (Dataset): the training dataset.

    Attributes:
        defaults (dict): keys that the model adds to the configuration, or gives other defaults, if
            it is in no yaml: key -> value.
        data_parallel (bool): the loss of part of a batch's rows is a share of the batch's loss, see
            ``distributed``; several processes train only models that say so.
        evaluation_keys (tuple): settings that may be changed when a checkpoint is evaluated.
        run_tensors (frozenset): names of buffers that describe a run rather than what was learned;
            ``init_from`` leaves them as they are.
        n_extra_tokens (int): rows of ``item_embedding`` after the items', such as a mask token; ids
            n_items, n_items + 1, ... They are never scored.
        n_dropped_items (int): oldest items of a row that scoring leaves out.
        epochs (int): at most this many in a phase.
    """

    defaults: Mapping[str, Any] = {}
    data_parallel: bool = False
    evaluation_keys: tuple[str, ...] = ()
    run_tensors: frozenset[str] = frozenset()
    n_extra_tokens: int = 0
    n_dropped_items: int = 0

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.epochs: int = config["epochs"]

    @staticmethod
    def check_config(config: Any) -> None:
        """Refuse impossible settings before any data is read.

        Raises:
            UserError: naming the key, its value and what is allowed.
        """

    # ------------------------------------------------------------------ training

    def training_plan(self) -> list[Phase]:
        """The phases of training, in order; by default one, with one update a batch."""
        return [Phase("train", self.epochs)]

    # ------------------------------------------------------------------ evaluation and analysis

    def reseed_sampling(self, seed: int) -> bool:
        """Make ``seed`` the seed of what is drawn when scoring.

        Returns:
            bool: whether scores depend on it; False for a model that draws nothing.
        """
        return False

    def augmented_views(self, interaction: Interaction) -> dict[str, Tensor]:
        """Sequences that the model makes of a batch by replacing items, for analysis.

        Returns:
            dict: name -> items, [B, L] or padded to more columns; empty for a model without.
        """
        return {}

    @property
    def item_table(self) -> Tensor | None:
        """Embeddings of padding and all items, without extra tokens, [n_items, H].

        They are the first rows of the module ``item_embedding``; None for a model without such a
        module or with fewer rows.
        """
        table = dict(self.named_children()).get("item_embedding")
        if not isinstance(table, nn.Embedding) or len(table.weight) < self.n_items:
            return None
        return table.weight[: self.n_items]
