"""RecBole's collector for one target a row."""

import copy
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.evaluator import Collector
from torch import Tensor


class TargetCollector(Collector):
    """RecBole's collector without its users x items matrix, for one target a row.

    With ``save_rankings`` it also keeps the rank of each target and the items ranked first. Items
    of score -inf, which cannot be recommended, are in no list: 0 stands for them.

    Also closes a fault of RecBole 1.2.1: the coverage metrics (ItemCoverage, GiniIndex,
    AveragePopularity, TailPercentage) crash because ``.cpu()`` is called on numbers and counters.
    """

    def eval_batch_collect(
        self,
        scores_tensor: Tensor,
        interaction: Interaction,
        positive_u: Tensor,
        positive_i: Tensor,
    ) -> None:
        """Collect one batch: scores [B, N], and the row and id of each target."""
        needs = [n for n in ("rec.meanrank", "rec.score", "data.label") if self.register.need(n)]
        one_each = torch.equal(positive_u.cpu(), torch.arange(len(scores_tensor)))
        k, keep = max(self.topk), self.config["save_rankings"] and one_each
        by_recbole, lists = bool(needs) or not one_each, self.register.need("rec.items")
        values, top = scores_tensor.topk(k, dim=-1)  # [B, K]
        top = top.masked_fill(values == -torch.inf, 0)
        if by_recbole:
            super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
            if lists:
                self.data_struct["rec.items"][-len(top) :] = top
            if not keep:
                return
        target = positive_i.to(top.device).unsqueeze(1)
        hit = (top == target).int()
        if (lists and not by_recbole) or (keep and not lists):
            self.data_struct.update_tensor("rec.items", top)
        if self.register.need("rec.topk") and not by_recbole:
            self.data_struct.update_tensor(
                "rec.topk", torch.cat([hit, torch.ones_like(hit[:, :1])], 1)
            )
        if keep:
            # Among the first K the place in the list, so that metrics of ranks are RecBole's also
            # where scores are equal.
            better = (scores_tensor > scores_tensor.gather(1, target)).sum(1)
            rank = torch.where(hit.any(1), hit.argmax(1) + 1, (better + 1).clamp(min=k + 1))
            self.data_struct.update_tensor("rec.rank", rank)

    def get_data_struct(self) -> Any:
        """What was collected, with the entries that are not tensors left alone."""
        store = self.data_struct._data_dict
        others = {k: v for k, v in store.items() if not isinstance(v, Tensor)}
        for key in others:
            del store[key]
        struct = super().get_data_struct()
        store.update(others)
        for key, value in others.items():
            struct.set(key, copy.copy(value))
        return struct
