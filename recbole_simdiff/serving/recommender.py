"""Recommendations from a checkpoint alone, in the user's own item ids."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST, load_model_state
from recbole_simdiff.errors import UserError, explained_out_of_memory
from recbole_simdiff.evaluation.evaluator import require_numbers
from recbole_simdiff.models.registry import accept
from recbole_simdiff.modules.catalogue import rows_at_once
from recbole_simdiff.runs.histories import history_batch, history_scores
from recbole_simdiff.runs.restore import check_own_model, stored_config
from recbole_simdiff.runs.stored import load_run
from recbole_simdiff.serving.ranking import SEARCHES, ApproximateIndex, best
from recbole_simdiff.serving.vectors import Vectors, item_matrix, user_matrix

FALLBACKS = ("popular",)  # what a history without a known item may get


class UnknownItems(UserWarning):
    """Ids were given that the model has never seen; they were left out."""


class Request(NamedTuple):
    """A history with filters of its own.

    Attributes:
        items (Sequence): raw item ids, oldest first.
        exclude (Iterable): raw item ids that must not be recommended.
        allowed (Iterable | None): raw item ids of which alone recommendations are chosen; None for
            all items.
    """

    items: Sequence[str]
    exclude: Iterable[str] = ()
    allowed: Iterable[str] | None = None


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
            config["USER_ID_FIELD"]: content.get("n_users", len(content["users"])),
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
        self._counts = _interaction_counts(data, len(self.item_ids))
        self._product_checked = False
        self._index: ApproximateIndex | None = None

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

    def numbers(self, ids: Iterable[str]) -> list[int]:
        """Rows of the table of items of those raw ids that the model knows."""
        return [self._number[i] for i in map(str, ids) if i in self._number]

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[Sequence[str] | Request],
        k: int = 10,
        exclude_seen: bool = True,
        exclude: Iterable[str] = (),
        allowed: Iterable[str] | None = None,
        fallback: str | None = None,
    ) -> list[Recommendation]:
        """The k best next items of each history.

        Args:
            histories (Sequence): raw item ids of each history, oldest first, or a ``Request``,
                which adds filters for this history. Only the newest MAX_ITEM_LIST_LENGTH ids shape
                the scores.
            k (int): how many; fewer come back when fewer items can be ranked.
            exclude_seen (bool): leave out the items of the history.
            exclude (Iterable): raw item ids that are recommended to nobody.
            allowed (Iterable | None): raw item ids of which alone recommendations are chosen, for
                every history; None for all items. Ids that the model does not know have no effect,
                here and in ``exclude``.
            fallback (str | None): ``popular`` gives a history without a known item those with most
                interactions in the data set of the checkpoint, its validation and test parts
                included; their numbers of interactions are the scores. None gives it nothing.

        Returns:
            list: one ``Recommendation`` per history; empty where no item of it is known and there
                is no fallback.

        Raises:
            UserError: if k is less than 1, a history or a filter is no list of ids, or there is no
                such fallback.
            TrainingDiverged: if a score is NaN.
            OutOfMemory: if memory runs out.
        """
        if k < 1:
            raise UserError(f"k={k} must be at least 1")
        if fallback is not None:
            self._require_fallback(fallback)
        requests = [_as_request(history) for history in histories]
        unknown = [[i for i in map(str, r.items) if i not in self._number] for r in requests]
        if n_unknown := sum(map(len, unknown)):
            text = f"{n_unknown} items are not in the training data; left out"
            warnings.warn(text, UnknownItems, stacklevel=2)
        known = [self.numbers(request.items) for request in requests]
        shared = self._ruled_out(exclude, allowed)

        def ruled_out(row: int) -> Tensor:
            request = requests[row]
            found = shared | self._ruled_out(request.exclude, request.allowed)
            found[known[row] if exclude_seen else []] = True
            return found

        ranked = self._ranked(known, ruled_out, k, fallback is not None)
        return [
            Recommendation([self.item_ids[i] for i in items.tolist()], scores.tolist(), left_out)
            for (items, scores), left_out in zip(ranked, unknown, strict=True)
        ]

    def _ranked(
        self,
        known: list[list[int]],
        ruled_out: Callable[[int], Tensor],
        k: int,
        fallback: bool,
    ) -> list[tuple[Tensor, Tensor]]:
        """The best items of each history and their scores.

        Args:
            known (list): numbers of the items of each history.
            ruled_out (Callable): row -> items that it must not get, [n_items] of bool.
            k (int): how many, if there are as many.
            fallback (bool): a history without items gets the popular ones, else nothing.
        """
        nothing = torch.empty(0)
        results = [
            self._popular(ruled_out(row), k) if fallback and not items else (nothing, nothing)
            for row, items in enumerate(known)
        ]
        rows = [row for row, items in enumerate(known) if items]
        size = rows_at_once(self.config["eval_batch_size"], len(self.item_ids))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            with explained_out_of_memory(self.config):
                rank = self._ranking([known[row] for row in part])
            for number, row in enumerate(part):
                results[row] = rank(number, ruled_out(row), k)
        return results

    def _ranking(
        self, known: list[list[int]]
    ) -> Callable[[int, Tensor, int], tuple[Tensor, Tensor]]:
        """What ranks items: (row, items ruled out, k) -> the best items and their scores."""
        if self._index is not None:
            index, vectors = self._index, self._user_matrix(known)
            return lambda row, ruled_out, k: index.best(vectors[row], ruled_out, k)
        scores = self._scores(known)
        return lambda row, ruled_out, k: best(scores[row], ruled_out, k)

    def item_vectors(self) -> Vectors:
        """A vector of each item.

        A score is the product of a row of ``user_vectors`` and a row of these, for the models that
        have ``user_vectors``; for others they are the table of item embeddings.

        Raises:
            UserError: if the model has no table of items.
        """
        return Vectors(self.item_ids[1:], item_matrix(self.config.name, self.model)[1:].numpy())

    @torch.no_grad()
    def user_vectors(self, histories: Mapping[str, Sequence[str]]) -> Vectors:
        """A vector of each history, whose product with an item's vector is the item's score.

        Args:
            histories (Mapping): id of a user -> raw item ids of the history, oldest first. One
                without a known item has no vector and is left out, with a warning.

        Raises:
            UserError: if the model's scores are no such products, or a history is no list of ids.
            OutOfMemory: if memory runs out.
        """
        known = {u: self.numbers(_as_request(items).items) for u, items in histories.items()}
        ids = [str(user) for user, items in known.items() if items]
        if len(ids) < len(known):
            text = f"{len(known) - len(ids)} histories have no known item; left out"
            warnings.warn(text, UnknownItems, stacklevel=2)
        rows = [items for items in known.values() if items]
        width = self.item_vectors().values.shape[1]
        parts = [np.empty((0, width), dtype=np.float32)]
        for start in range(0, len(rows), self.config["eval_batch_size"]):
            with explained_out_of_memory(self.config):
                part = rows[start : start + self.config["eval_batch_size"]]
                parts.append(self._user_matrix(part).numpy())
        return Vectors(ids, np.concatenate(parts))

    def _user_matrix(self, known: list[list[int]]) -> Tensor:
        """Vectors of histories, [B, H], on the CPU; their products with the items' are scores.

        Raises:
            UserError: if they are not.
        """
        name, batch = self.config.name, history_batch(self.config, known)
        vectors = user_matrix(name, self.model, batch)
        if not self._product_checked:
            few = rows_at_once(len(known), len(self.item_ids))
            scores = vectors[:few] @ item_matrix(name, self.model).t()
            wanted = self._scores(known[:few])
            error = (scores - wanted)[:, 1:].abs().max()
            if not error <= 1e-3 * max(1.0, float(wanted[:, 1:].abs().max())):
                raise UserError(
                    f"model={name} does not score by the product of a user's and an item's vector "
                    f"(scores differ by up to {error:.3g}); recommend works without such vectors"
                )
            self._product_checked = True
        return vectors

    def search_approximately(self) -> None:
        """Let ``recommend`` search the best items by an index in place of scoring all of them.

        Raises:
            UserError: if the model's scores are no products of vectors, or faiss is missing.
        """
        with torch.no_grad():
            self._user_matrix([[1]])
        self._index = ApproximateIndex(item_matrix(self.config.name, self.model))

    def _require_fallback(self, fallback: str) -> None:
        if fallback not in FALLBACKS:
            raise UserError(f"fallback={fallback!r} must be one of {', '.join(FALLBACKS)}")
        if self._counts is None:
            raise UserError(
                f"fallback={fallback!r}: this checkpoint does not say how often items occur, "
                "because it was trained on ready-made prefixes"
            )

    def _ruled_out(self, exclude: Iterable[str], allowed: Iterable[str] | None) -> Tensor:
        """Items that filters leave out, and padding, [n_items] of bool."""
        for name, ids in (("exclude", exclude), ("allowed", allowed)):
            if isinstance(ids, str):
                raise UserError(f"{name}={ids!r} must be a list of ids, such as [{ids!r}]")
        out = torch.full((len(self.item_ids),), allowed is not None)
        if allowed is not None:
            out[self.numbers(allowed)] = False
        out[self.numbers(exclude)] = True
        out[0] = True
        return out

    def _popular(self, ruled_out: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k items with most interactions, and these; among equals the first of the table."""
        assert self._counts is not None
        order = self._counts.argsort(descending=True, stable=True)
        order = order[~ruled_out[order]][:k]
        return order, self._counts[order].float()

    def _scores(self, known: list[list[int]]) -> Tensor:
        """Scores of all items, padding ruled out, [B, n_items], on the CPU."""
        scores = history_scores(self.config, self.model, known).float().cpu()
        scores = scores[:, : len(self.item_ids)].clone()
        scores[:, 0] = -torch.inf
        require_numbers(scores)
        return scores


def _as_request(history: Sequence[str] | Request) -> Request:
    """A history with its filters.

    Raises:
        UserError: if it is no list of ids.
    """
    if isinstance(history, Request):
        return history
    if isinstance(history, str) or not isinstance(history, Iterable):
        raise UserError(
            f"{history!r} is not a history but an id; recommend takes a list of "
            f"histories, each a list of ids, such as [[{history!r}]]"
        )
    return Request(history)


def _interaction_counts(data: Mapping[str, Tensor], n_items: int) -> Tensor | None:
    """Interactions of each item in the data set, [n_items]; None if the checkpoint has none."""
    if "item_counts" in data:
        return data["item_counts"]
    if "history_items" not in data:
        return None
    return torch.bincount(data["history_items"].long(), minlength=n_items)


def load(
    place: str | Path,
    use_gpu: bool = True,
    model: str | Path | type | None = None,
    search: str = "exact",
) -> Recommender:
    """The recommender of a run.

    Args:
        place (str | Path): a run folder (its best epoch) or a checkpoint file.
        use_gpu (bool): use a GPU where there is one.
        model (str | Path | type | None): of a checkpoint of your own model, its class or its
            ``FILE.py``.
        search (str): ``exact`` scores all items; ``approximate`` searches an index of them (faiss,
            the extra ann), which is faster from some 100,000 items on and misses a few.

    Raises:
        UserError: if there is no usable checkpoint, or its model needs the data set to be built; if
            the search is approximate and the model's scores are no products of vectors, or faiss
            is missing.
    """
    if search not in SEARCHES:
        raise UserError(f"search={search!r} must be one of {', '.join(SEARCHES)}")
    accept(model)
    path = checkpoint.resolve(place, BEST)
    tensors, content = load_run(path)
    check_own_model(content)
    config = stored_config(content, {"use_gpu": use_gpu}, ("use_gpu",))
    if config.wraps and config["pseudo_at_evaluation"]:
        raise UserError(
            f"{path} was trained with pseudo_at_evaluation=True: it expects pseudo-items in "
            "front of a history, and a history given here has none. Use the evaluate command"
        )
    try:
        with explained_out_of_memory(config):
            trained = config.model_class(config, _CheckpointDataset(config, content))
    except AttributeError as error:
        raise UserError(
            f"model={config.name} cannot be built from a checkpoint alone: it reads more of the "
            f"data set than its size ({error}). Use the evaluate command"
        ) from error
    load_model_state(trained, checkpoint.subset(tensors, "model"), path)
    trained = trained.to(config["device"])
    recommender = Recommender(config, trained, content, checkpoint.subset(tensors, "data"))
    if search == "approximate":
        recommender.search_approximately()
    return recommender
