"""Recommendations from a checkpoint alone, in the user's own item ids."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST, load_model_state
from recbole_simdiff.errors import UserError, telling_memory
from recbole_simdiff.evaluation.evaluator import require_numbers
from recbole_simdiff.models.registry import accept
from recbole_simdiff.runs.restore import check_own_model, stored_config
from recbole_simdiff.runs.stored import load_run


class Recommendation(NamedTuple):
    """Recommendations for one history.

    Attributes:
        items (list): raw item ids, best first.
        scores (list): the model's scores of them.
        unknown (list): ids of the history that the model has never seen; they were left out.
    """

    items: list[str]
    scores: list[float]
    unknown: list[str]


class _CheckpointDataset:
    """What a model's constructor asks of a data set: how many users and items there are."""

    def __init__(self, config: Any, content: dict[str, Any]) -> None:
        self._counts = {
            config["USER_ID_FIELD"]: len(content["users"]),
            config["ITEM_ID_FIELD"]: len(content["items"]),
        }

    def num(self, field: str) -> int:
        """Number of ids of a field, padding included."""
        return self._counts[field]


class Recommender:
    """A trained model with its id maps; make one with ``load``.

    Attributes:
        config (Config): configuration of the run.
        model (SequentialRecommender): in evaluation mode. Row i of its table of items, which is
            ``model.item_embedding.weight`` in this package and in most of RecBole's models, is the
            item ``item_ids[i]``. A table may go on with rows that are no items, such as a mask.
        item_ids (list): raw item ids by number; number 0 is padding.
        titles (dict): raw item id -> title, where the checkpoint has one.
    """

    def __init__(
        self, config: Any, model: Any, content: dict[str, Any], data: dict[str, Tensor]
    ) -> None:
        self.config, self.model = config, model.eval()
        self.item_ids: list[str] = content["items"]
        self.titles: dict[str, str] = content["titles"]
        self._number = {item: i for i, item in enumerate(self.item_ids) if i}
        self._user_number = {user: i for i, user in enumerate(content["users"]) if i}
        self._data = data

    @property
    def users(self) -> list[str]:
        """Raw ids of the users of the training data set."""
        return list(self._user_number)

    def title(self, item: str) -> str:
        """``title (id)`` where the checkpoint has a title, else the id."""
        return f"{self.titles[item]} ({item})" if item in self.titles else item

    def history(self, user: str) -> list[str]:
        """Raw item ids of a user of the training data set, oldest first, test item included.

        Raises:
            UserError: if the user is not in the data set.
        """
        number = self._user_number.get(str(user))
        if number is None or not self._data:
            raise UserError(
                f"user {user!r} is not in the data set {self.config['dataset']!r} of this "
                f"checkpoint ({len(self._user_number)} users); give a history of items instead"
            )
        ends = self._data["history_ends"]
        items = self._data["history_items"][int(ends[number - 1]) : int(ends[number])]
        return [self.item_ids[i] for i in items.tolist()]

    @torch.no_grad()
    def recommend(
        self, histories: Sequence[Sequence[str]], k: int = 10, exclude_seen: bool = True
    ) -> list[Recommendation]:
        """The k best next items of each history.

        Args:
            histories (Sequence): raw item ids of each history, oldest first. Only the newest
                MAX_ITEM_LIST_LENGTH of them shape the scores.
            k (int): how many; fewer come back when fewer items can be ranked.
            exclude_seen (bool): leave out the items of the history.

        Returns:
            list: one ``Recommendation`` per history; empty where no item of it is known.

        Raises:
            UserError: if k is less than 1, or a history is no list of ids.
            TrainingDiverged: if a score is NaN.
            OutOfMemory: if memory runs out.
        """
        if k < 1:
            raise UserError(f"k={k} must be at least 1")
        for history in histories:
            if isinstance(history, str) or not isinstance(history, Iterable):
                raise UserError(
                    f"{history!r} is not a history but an id; recommend takes a list of "
                    f"histories, each a list of ids, such as [[{history!r}]]"
                )
        known = [[self._number[i] for i in map(str, h) if i in self._number] for h in histories]
        results = [
            Recommendation([], [], [i for i in map(str, h) if i not in self._number])
            for h in histories
        ]
        unknown = sum(len(result.unknown) for result in results)
        if unknown:
            warnings.warn(f"{unknown} items are not in the training data; left out", stacklevel=2)
        rows = [row for row, items in enumerate(known) if items]
        for start in range(0, len(rows), self.config["eval_batch_size"]):
            part = rows[start : start + self.config["eval_batch_size"]]
            with telling_memory(self.config):
                scores = self._scores([known[row] for row in part])
            for row, score in zip(part, scores, strict=True):
                if exclude_seen:
                    score[known[row]] = -torch.inf
                top = score.topk(min(k, int((score > -torch.inf).sum())))
                results[row].items.extend(self.item_ids[i] for i in top.indices.tolist())
                results[row].scores.extend(top.values.tolist())
        return results

    def _scores(self, known: list[list[int]]) -> Tensor:
        """Scores of all items, padding ruled out, [B, n_items], on the CPU."""
        length = self.config["MAX_ITEM_LIST_LENGTH"]
        seq = torch.zeros(len(known), length, dtype=torch.long)
        for row, items in enumerate(known):
            recent = torch.tensor(items[-length:])
            seq[row, : len(recent)] = recent
        field = self.config["ITEM_ID_FIELD"]
        batch = Interaction(
            {
                field + self.config["LIST_SUFFIX"]: seq,
                self.config["ITEM_LIST_LENGTH_FIELD"]: (seq != 0).sum(1),
            }
        )
        try:
            scores = self.model.full_sort_predict(batch.to(self.config["device"])).float().cpu()
        except KeyError as error:
            raise UserError(
                f"model={self.config.name} reads {error} besides the history, so it cannot "
                "recommend from a checkpoint alone. Use the evaluate command"
            ) from error
        scores = scores.view(len(known), -1)[:, : len(self.item_ids)].clone()
        scores[:, 0] = -torch.inf
        require_numbers(scores)
        return scores


def load(place: str | Path, use_gpu: bool = True, model: str | type | None = None) -> Recommender:
    """The recommender of a run.

    Args:
        place (str | Path): a run folder (its best epoch) or a checkpoint file.
        use_gpu (bool): use a GPU where there is one.
        model (str | Path | type | None): of a checkpoint of your own model, its class or its
            ``FILE.py``.

    Raises:
        UserError: if there is no usable checkpoint, or its model needs the data set to be built.
    """
    accept(model)
    path = checkpoint.resolve(place, BEST)
    tensors, content = load_run(path)
    check_own_model(content)
    config = stored_config(content, {"use_gpu": use_gpu}, ("use_gpu",))
    if config.wraps and config["pseudo_at_evaluation"]:
        raise UserError(
            f"{path} was trained with pseudo_at_evaluation=True: it expects invented items in "
            "front of a history, and a history given here has none. Use the evaluate command"
        )
    try:
        with telling_memory(config):
            trained = config.model_class(config, _CheckpointDataset(config, content))
    except AttributeError as error:
        raise UserError(
            f"model={config.name} cannot be built from a checkpoint alone: it reads more of the "
            f"data set than its size ({error}). Use the evaluate command"
        ) from error
    load_model_state(trained, checkpoint.subset(tensors, "model"), path)
    trained = trained.to(config["device"])
    return Recommender(config, trained, content, checkpoint.subset(tensors, "data"))
