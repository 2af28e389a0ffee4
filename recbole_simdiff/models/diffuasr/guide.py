"""A trained sequential recommender as DiffuASR's frozen item table and classifier."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.base import SequentialModel

KINDS = ("softmax", "bce")


class Guide:
    """p(next item | sequence) for sequences given as embeddings, from a frozen recommender.

    Embeddings enter through a temporary hook on the recommender's ``item_embedding``: it is called
    with dummy ids and its output is replaced, so masks, positions and lengths stay its own.

    Args:
        model (SequentialModel): a trained recommender; it is moved to ``device`` and frozen.
        device (torch.device): where to compute.

    Raises:
        UserError: if the recommender has no table of items.
    """

    def __init__(self, model: SequentialModel, device: torch.device | str) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.n_items = len(self.table())
        self.dropped = model.n_dropped_items  # as many more go in front

    def __deepcopy__(self, memo: Any) -> "Guide":
        return self  # frozen; an average of a model's weights may share it

    def table(self) -> Tensor:
        """A copy of the item embeddings, padding in row 0, [n_items, d]."""
        table = self.model.item_table
        if table is None:
            raise UserError(
                f"backbone={type(self.model).__name__} has no item_embedding with a row per item; "
                "SASRec, GRU4Rec, BERT4Rec, S3Rec and this package's models have one",
                keys=("backbone",),
            )
        return table.detach().clone()

    def log_prob(self, x: Tensor, label: Tensor, kind: str) -> Tensor:
        """log p(label | x), differentiable in x.

        Args:
            x (Tensor): embeddings of M items at the recommender's own scale, [B, M, d].
            label (LongTensor): next items, [B], or several a row, right-padded with 0, whose log
                probabilities are averaged, [B, n].
            kind (str): ``softmax`` over all items, or ``bce``: of each item by itself.

        Returns:
            Tensor: [B].
        """
        # cuDNN refuses the backward pass of a recurrent layer in eval mode.
        with self._injected(x), torch.backends.cudnn.flags(enabled=False):
            score = self._score(torch.ones(x.shape[:2], dtype=torch.long, device=x.device))
        label = label.view(len(x), -1)
        if kind == "softmax":
            log_p = score[:, 1:].log_softmax(1).gather(1, (label - 1).clamp(min=0))
        else:
            log_p = F.logsigmoid(score.gather(1, label))
        real = label > 0
        return (log_p * real).sum(1) / real.sum(1).clamp(min=1)

    def check(self, length: int) -> None:
        """Refuse a recommender whose scores are no function of the embeddings of ``length`` items.

        Its scores for a few items must be the same by id, by embedding and with more padding.

        Args:
            length (int): M.

        Raises:
            UserError: saying which recommenders will do.
        """
        table, name = self.table(), type(self.model).__name__
        ids = torch.arange(3 * length, device=self.device).view(3, length) % (self.n_items - 1) + 1
        x = table[ids].requires_grad_()
        longest = self.model.max_seq_length - self.dropped
        try:
            by_id = self._score(ids)
            padded = self._score(F.pad(ids, (0, max(longest - length, 0))))
            with self._injected(x):
                by_embedding = self._score(torch.ones_like(ids))
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"backbone={name} cannot score {length} items given alone ({error}), so it cannot "
                "be the classifier of diffuasr_guidance=classifier",
                keys=("backbone", "diffuasr_guidance"),
            ) from error
        within = 1e-3 * by_id.std()
        same = all((s - by_id).abs().max() <= within for s in (padded, by_embedding))
        if not same or not by_embedding.requires_grad:
            raise UserError(
                f"the scores of backbone={name} do not follow from the embeddings of the items "
                "alone, so it cannot be the classifier of diffuasr_guidance=classifier; SASRec, "
                "GRU4Rec, BERT4Rec, S3Rec and this package's models with SASRec's scores can",
                keys=("backbone", "diffuasr_guidance"),
            )

    def _score(self, item_seq: Tensor) -> Tensor:
        """Scores of all items after these, right-padded with 0, [B, M] -> [B, n_items]."""
        length = (item_seq > 0).sum(1) + self.dropped
        item_seq = F.pad(item_seq, (self.dropped, 0), value=1)
        rows = {self.model.ITEM_SEQ: item_seq, self.model.ITEM_SEQ_LEN: length}
        score: Tensor = self.model.full_sort_predict(Interaction(rows))
        return score.view(len(item_seq), -1)[:, : self.n_items]

    @contextmanager
    def _injected(self, x: Tensor) -> Iterator[None]:
        """The next call of ``item_embedding`` gives x in place of its first M vectors a row."""
        pending = True

        def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            nonlocal pending
            if not pending:
                return output
            pending = False
            if output.numel() == x.numel():  # also packed tokens, [B M, d]
                return x.view_as(output)
            return torch.cat([x, output[:, x.shape[1] :]], 1)  # a mask token follows

        handle = self.model.item_embedding.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()
