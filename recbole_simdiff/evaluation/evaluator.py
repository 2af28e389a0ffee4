"""Metrics of a model on a part of the data, under both protocols in one pass."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.evaluator import Evaluator as Measures
from recbole.utils import init_seed
from torch import Tensor
from tqdm.auto import tqdm

from recbole_simdiff import distributed
from recbole_simdiff.errors import TrainingDiverged
from recbole_simdiff.evaluation.collector import TargetCollector
from recbole_simdiff.evaluation.coverage import COVERAGE
from recbole_simdiff.evaluation.protocols import KEPT, PROTOCOLS, REMOVED, Metrics
from recbole_simdiff.modules.batch import PSEUDO_LENGTH
from recbole_simdiff.modules.random_state import preserved_rng


class Evaluation(NamedTuple):
    """Metrics of a split, and what they were made of.

    Attributes:
        metrics (dict): protocol -> metric -> unrounded value.
        by_length (dict): input length, such as "6-20", -> metrics with the history kept, and
            ``rows``, how many there are. Empty groups are left out.
        rows (dict): with ``save_rankings``, by row: ``user``, ``item`` (the target), ``length``
            (real items of the input), and by protocol ``rank`` of the target, from 1, [rows], and
            ``list``, the items ranked first, 0 after the last one, [rows, K]:
            ``rows["rank", protocol]``.
    """

    metrics: dict[str, Metrics]
    by_length: dict[str, Metrics]
    rows: dict[Any, Tensor]


class Evaluator:
    """Ranks the items for each row of a loader with a model and measures the rankings.

    Each row is scored once for all protocols and processes. The random states are left as they
    were.

    Args:
        config (Config): resolved configuration.
        model (SequentialRecommender): the model, on its device.
        device (torch.device): of the model.
        check (Callable): called before each batch; what it raises ends the evaluation.
    """

    def __init__(
        self,
        config: Any,
        model: Any,
        device: torch.device,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.model, self.device, self.check = config, model, device, check
        self._training = TargetCollector(config)
        self._measures = Measures(config)
        measures = self._measures.metric_class
        measures |= {name: one(config) for name, one in COVERAGE.items() if name in measures}
        for metric in measures.values():
            # RecBole rounds before epochs are compared, so plateaus look like ties.
            metric.decimal_place = 15

    def data_collect(self, train_data: Any) -> None:
        """Note what metrics of coverage and popularity need of the training data.

        Args:
            train_data (DataLoader): training batches.
        """
        self._training.data_collect(train_data)

    def evaluate(
        self, eval_data: Any, protocols: Sequence[str] = PROTOCOLS, show_progress: bool = False
    ) -> dict[str, Metrics]:
        """Metrics of the model as it is.

        Args:
            eval_data (DataLoader): validation or test.
            protocols (Sequence): of ``KEPT`` (RecBole's) and ``REMOVED`` (a row's earlier items are
                taken out of its ranking, its target excepted).
            show_progress (bool): a progress bar, on a terminal.

        Returns:
            dict: protocol -> metric -> unrounded value. Sampled rankings know ``KEPT`` only; their
            candidates are drawn by ``seed``, the same in every evaluation.

        Raises:
            TrainingDiverged: if a score is NaN.
        """
        structs, _ = self._collect(eval_data, protocols, show_progress)
        return {name: self._metrics(struct) for name, struct in structs.items()}

    def evaluate_in_detail(
        self, eval_data: Any, bounds: Sequence[int], show_progress: bool = False
    ) -> Evaluation:
        """Metrics of both protocols, those of rows of similar length, and the rankings.

        Args:
            eval_data (DataLoader): validation or test.
            bounds (Sequence): greatest input length of each group but the last, rising.
            show_progress (bool): a progress bar, on a terminal.

        Returns:
            Evaluation: without rankings where ``save_rankings`` is false or rankings are sampled.

        Raises:
            TrainingDiverged: if a score is NaN.
        """
        structs, rows = self._collect(eval_data, PROTOCOLS, show_progress)
        results = {name: self._metrics(struct) for name, struct in structs.items()}
        if not isinstance(eval_data, FullSortEvalDataLoader):
            return Evaluation(results, {}, {})
        groups = self._by_length(structs[KEPT], rows["length"], bounds)
        if len(_collected(structs[KEPT]).get("rec.rank", ())) != len(rows["length"]):
            return Evaluation(results, groups, {})
        for name, struct in structs.items():
            rows["rank", name] = struct.get("rec.rank")
            rows["list", name] = struct.get("rec.items")
        return Evaluation(results, groups, rows)

    def _by_length(self, struct: Any, lengths: Tensor, bounds: Sequence[int]) -> dict[str, Metrics]:
        """Metrics of the rows of each group; none where what was collected is not one entry a row.

        Args:
            struct (DataStruct): what was collected of all rows.
            lengths (Tensor): input length of each row, [rows].
            bounds (Sequence): see ``evaluate_in_detail``.
        """
        collected = _collected(struct)
        if collected.keys() - {"rec.topk", "rec.items", "rec.rank"}:
            return {}
        if any(len(values) != len(lengths) for values in collected.values()):
            return {}
        groups: dict[str, Metrics] = {}
        number = torch.bucketize(lengths, torch.tensor([*bounds]))
        for g, (low, high) in enumerate(zip([0, *bounds], [*bounds, None], strict=True)):
            inside = number == g
            if inside.any():
                part = copy.copy(struct)
                part._data_dict = part._data_dict | {k: v[inside] for k, v in collected.items()}
                name = f"{low + 1}+" if high is None else f"{low + 1}-{high}"
                groups[name] = {"rows": int(inside.sum()), **self._metrics(part)}
        return groups

    @torch.no_grad()
    def _collect(
        self, eval_data: Any, protocols: Sequence[str], show_progress: bool
    ) -> tuple[dict[str, Any], dict[Any, Tensor]]:
        """What RecBole's metrics need, by protocol; and user, target and length of each row."""
        self.model.eval()
        full = isinstance(eval_data, FullSortEvalDataLoader)
        collectors = {name: self._collector() for name in protocols}
        seen: dict[str, list[Tensor]] = {"user": [], "item": [], "length": []}
        with preserved_rng():
            if not full:  # the same candidates whatever was drawn before, by training or not at all
                init_seed(self.config["seed"], self.config["reproducibility"])
            for batch, scores in self._scored(eval_data, full, show_progress):
                require_numbers(scores)
                rows, history, *positive = batch
                self._note_rows(seen, rows, positive[1])
                if KEPT in collectors:
                    collectors[KEPT].eval_batch_collect(scores, rows, *positive)
                if REMOVED in collectors and full and history is not None:
                    scores[history[0].to(self.device), history[1].to(self.device)] = -torch.inf
                    collectors[REMOVED].eval_batch_collect(scores, rows, *positive)

        def whole(rows: Tensor) -> Tensor:
            return distributed.gather_in_order(rows, eval_data.sample_size, eval_data.step)

        structs = {}
        for name, collector in collectors.items():
            if _collected(collector.data_struct):
                collector.model_collect(self.model)
                structs[name] = struct = collector.get_data_struct()
                for key, rows in _collected(struct).items():
                    struct.set(key, whole(rows))
        return structs, {name: whole(torch.cat(parts)) for name, parts in seen.items()}

    def _note_rows(self, seen: dict[str, list[Tensor]], rows: Interaction, target: Tensor) -> None:
        length = rows[self.config["ITEM_LIST_LENGTH_FIELD"]].cpu()
        pseudo = rows[PSEUDO_LENGTH].cpu() if PSEUDO_LENGTH in rows else 0
        seen["user"].append(rows[self.config["USER_ID_FIELD"]].cpu())
        seen["item"].append(target.cpu())
        seen["length"].append(length - pseudo)

    # ------------------------------------------------------------------ scores

    def _scored(
        self, eval_data: Any, full: bool, show_progress: bool
    ) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
        """Each batch with its scores [rows or users, n_items], -inf for what is not ranked."""
        n_items, one_pass = eval_data._dataset.item_num, None
        hidden = None if show_progress else True
        for batch in tqdm(eval_data, desc="evaluate", leave=False, disable=hidden):
            self.check()
            if batch is None:  # the rows of this batch are those of other processes
                continue
            if full:
                yield batch, self._scores_of_all(batch[0], eval_data)
            else:
                if one_pass is None:
                    one_pass = self._one_pass(eval_data, *batch[:2])
                yield batch, self._scores_of_drawn(eval_data, batch, one_pass, n_items)

    def _scores_of_all(self, rows: Interaction, eval_data: Any) -> Tensor:
        """Scores of all items, [B, n_items]; padding cannot be ranked."""
        n_items, batch = eval_data._dataset.item_num, rows.to(self.device)
        try:
            scores = self.model.full_sort_predict(batch)
        except NotImplementedError:  # the model scores a row and an item
            pairs = batch.repeat_interleave(n_items)
            items = eval_data._dataset.get_item_feature().to(self.device)
            pairs.update(items.repeat(len(rows)))
            size = self.config["eval_batch_size"]
            parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
            scores = torch.cat([self.model.predict(part).reshape(-1) for part in parts])
        scores = scores.view(-1, n_items)
        scores[:, 0] = -torch.inf
        return scores

    def _scores_of_drawn(
        self, eval_data: Any, batch: tuple[Any, ...], one_pass: bool, n_items: int
    ) -> Tensor:
        """Scores of drawn candidates, [users, n_items], -inf where not drawn."""
        rows, candidates, positive_u, _ = batch
        if one_pass:
            drawn = self._picked_scores(rows, candidates)
        else:
            drawn = self._predicted_scores(eval_data, rows, candidates)
        scores = drawn.new_full((int(positive_u[-1]) + 1, n_items), -torch.inf)
        # In RecBole's order, in which the last row wins an item that two rows of a user share.
        user = positive_u.repeat(candidates.shape[1]).to(self.device)
        scores[user, candidates.t().flatten().to(self.device)] = drawn.t().flatten()
        return scores

    def _one_pass(self, eval_data: Any, rows: Interaction, candidates: Tensor) -> bool:
        """Whether an item's score is the same alone and among all, tried on a few.

        Of RecBole's models CORE ranks by another score than it predicts, DIN only predicts, and
        SASRecCPR only ranks.
        """
        rows, candidates = rows[:8], candidates[:8, :8]
        with preserved_rng():
            try:
                among_all = self._picked_scores(rows, candidates)
            except NotImplementedError:
                return False
            try:
                alone = self._predicted_scores(eval_data, rows, candidates)
            except (AssertionError, NotImplementedError):
                return True
        return bool((among_all - alone).abs().max() <= 1e-4 * alone.abs().max())

    def _picked_scores(self, rows: Interaction, candidates: Tensor) -> Tensor:
        """Scores of each row's candidates out of those of all items, [B, 1 + n]."""
        scores = self.model.full_sort_predict(rows.to(self.device))
        return scores.view(len(rows), -1).gather(1, candidates.to(self.device))

    def _predicted_scores(self, eval_data: Any, rows: Interaction, candidates: Tensor) -> Tensor:
        """Scores of each row's candidates, each by a pass of its own, [B, 1 + n]."""
        n = candidates.numel()
        scores = []
        for part in torch.arange(n).tensor_split(-(-n // self.config["eval_batch_size"])):
            row, items = part // candidates.shape[1], candidates.reshape(-1)[part]
            batch = eval_data.with_items(rows[row], items)
            scores.append(self.model.predict(batch.to(self.device)).reshape(-1))
        return torch.cat(scores).view(candidates.shape)

    # ------------------------------------------------------------------ metrics

    def _metrics(self, struct: Any) -> Metrics:
        return {name: float(value) for name, value in self._measures.evaluate(struct).items()}

    def _collector(self) -> TargetCollector:
        """A fresh collector that knows what ``data_collect`` gathered from the training data."""
        collector = TargetCollector(self.config)
        for key, value in self._training.data_struct._data_dict.items():
            if key.startswith("data."):
                collector.data_struct.set(key, value)
        return collector


def _collected(struct: Any) -> dict[str, Tensor]:
    """What was collected of rankings, by RecBole's names."""
    return {key: value for key, value in struct._data_dict.items() if key.startswith("rec.")}


def require_numbers(scores: Tensor) -> None:
    """Refuse scores that cannot be ranked.

    Raises:
        TrainingDiverged: if a score is NaN.
    """
    if torch.isnan(scores).any():
        raise TrainingDiverged(
            "the model's scores contain NaN; nothing can be ranked. Training anew with a smaller "
            "learning_rate or clip_grad_norm={max_norm: 1.0} may help"
        )
