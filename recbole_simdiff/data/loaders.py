"""Training and evaluation batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.data.utils import create_samplers, get_dataloader
from torch import Tensor

from recbole_simdiff.data.dataset import FlatDataset
from recbole_simdiff.data.rows import gather_rows
from recbole_simdiff.distributed import local_rows
from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.batch import PSEUDO_LENGTH, ROW_NUMBER, ROW_START, TARGET
from recbole_simdiff.modules.catalogue import rows_at_once
from recbole_simdiff.modules.transformer import Batch


class BucketLoader:
    """Training batches of rows of similar length, trimmed to the longest; exact order per epoch.

    Rows are shuffled, sorted by length and cut into batches, and the batches are shuffled; the
    order depends on the seed and the epoch only, so a batch can be found again after a restart.
    Batches are made on the host, where models look up what a step would wait for on the device.

    Paper, Code: random batches. Here: in-batch negatives of a contrastive loss come from histories
    of similar length.

    Args:
        config (Config): resolved configuration.
        dataset (FlatDataset): the training part.
    """

    def __init__(self, config: Any, dataset: FlatDataset) -> None:
        self.config, self.dataset, self._dataset = config, dataset, dataset
        self.batch_size: int = config["train_batch_size"]
        self.shuffle: bool = config["shuffle"]
        self.epoch = 0
        rows = dataset.inter_feat
        self._lengths = rows[dataset.item_list_length_field]
        fields = [ROW_START, TARGET, *([PSEUDO_LENGTH] if dataset.pseudo is not None else [])]
        self._rows = {field: rows[field] for field in fields}
        self._users = rows[dataset.uid_field]
        self._items = dataset.flat[dataset.iid_field]
        self._list_field = dataset.iid_field + config["LIST_SUFFIX"]

    def __len__(self) -> int:
        return -(-len(self._lengths) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def batches(self) -> list[Tensor]:
        """Row indices of every batch of the current epoch, in order."""
        if not self.shuffle:
            return list(torch.split(torch.arange(len(self._lengths)), self.batch_size))
        generator = torch.Generator().manual_seed(self.config["seed"] * 1_000_003 + self.epoch)
        order = torch.randperm(len(self._lengths), generator=generator)
        order = order[self._lengths[order].argsort(stable=True)]
        batches = torch.split(order, self.batch_size)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def n_tokens(self, index: Tensor) -> int:
        """Items in the histories of the rows of a batch."""
        return int(self._lengths[index].sum())

    def __iter__(self) -> Iterator[Interaction]:
        for index in self.batches():
            yield self.collate(index)

    def collate(self, index: Tensor) -> Interaction:
        """This process's rows as a right-padded batch, no longer than its longest row."""
        dataset, index = self.dataset, local_rows(index)
        user, length = self._users[index], self._lengths[index]
        row = {field: values[index] for field, values in self._rows.items()}
        pseudo = dataset.pseudo
        extra = {} if pseudo is None else {PSEUDO_LENGTH: row[PSEUDO_LENGTH]}
        items = gather_rows(
            self._items,
            row[ROW_START],
            length,
            int(length.max()),
            row.get(PSEUDO_LENGTH),
            None if pseudo is None else pseudo[user],
        )
        return Batch(
            {
                dataset.uid_field: user,
                self._list_field: items,
                dataset.item_list_length_field: length,
                dataset.iid_field: self._items[row[TARGET]],
                ROW_NUMBER: index,
                **extra,
            }
        )


class HistoryEvalLoader(FullSortEvalDataLoader):
    """RecBole's full-ranking loader, with each row's history for the history-removed protocol.

    The second element of a batch is (row, item) pairs instead of None; the trainer ranks once with
    and once without them.
    """

    def _init_batch_size_and_step(self) -> None:
        """At most ``eval_batch_size`` rows, whose scores of all items fit into memory."""
        self.step = rows_at_once(self.config["eval_batch_size"], self._dataset.item_num)
        self.set_batch_size(self.step)

    def collate_fn(self, index: Any) -> tuple[Any, Any, Tensor, Tensor] | None:
        """Rows of this process, history pairs, and the position and id of the targets.

        Returns:
            tuple | None: None if the batch has fewer rows than there are processes, and none here.
        """
        index = local_rows(index)
        if len(index) == 0:
            return None
        interaction, _, positive_u, positive_i = super().collate_fn(index)
        dataset = self._dataset
        history = dataset.history(interaction) if dataset.list_fields else None
        return interaction, history, positive_u, positive_i


class SampledEvalLoader(NegSampleEvalDataLoader):
    """RecBole's loader of sampled rankings, with each row once beside all of its candidates.

    RecBole repeats a row for each candidate, which costs a pass of the model each. The candidates
    are RecBole's: drawn user by user from the same random state.
    """

    def _init_batch_size_and_step(self) -> None:
        """Users of at most ``eval_batch_size`` rows together, at least one."""
        rows = np.sort(self.uid2items_num[self.uid_list])[::-1].cumsum()
        self.step = max(1, int((rows <= self.config["eval_batch_size"]).sum()))
        self.set_batch_size(self.step)

    def collate_fn(self, index: Any) -> tuple[Interaction, Tensor, Tensor, Tensor]:
        """Rows of some users, with what is ranked in each.

        Returns:
            tuple: rows [B], candidates with the target first [B, 1 + n], number of each row's user
            within the batch [B], and target of each row [B].
        """
        users = self.uid_list[np.array(index)]
        places = [np.arange(rows.start, rows.stop) for rows in self.uid2index[users]]
        counts = [len(rows) for rows in places]
        rows = self.transform(self._dataset, self._dataset[np.concatenate(places)])
        items = rows[self.iid_field]
        candidates = []
        for user, targets in zip(users, items.split(counts), strict=True):
            drawn = self._sampler.sample_by_user_ids(
                np.full(len(targets), user), targets.numpy(), self.neg_sample_num
            )
            candidates.append(torch.cat([targets, drawn]).view(-1, len(targets)).t())
        number = torch.repeat_interleave(torch.arange(len(users)), torch.tensor(counts))
        return rows, torch.cat(candidates), number, items

    def with_items(self, rows: Interaction, items: Tensor) -> Interaction:
        """The rows with other items in place of their targets, item features included.

        Args:
            rows (Interaction): of a batch, [B].
            items (LongTensor): [B].
        """
        other = Interaction({**rows.interaction, self.iid_field: items})
        joined: Interaction = self._dataset.join(other)
        return joined


def create_loaders(
    config: Any, dataset: FlatDataset, pseudo: Tensor | None = None
) -> tuple[Any, Any, Any]:
    """(training, validation, test) loaders; None for a part without rows.

    Our models train on ``BucketLoader``; RecBole's own on RecBole's ``TrainDataLoader``. Evaluation
    is RecBole's in both cases.

    Args:
        config (Config): resolved configuration.
        dataset (FlatDataset): all interactions.
        pseudo (LongTensor | None): pseudo-items of each user, put in front of training rows and,
            with ``pseudo_at_evaluation``, of validation and test rows; [users, M].

    Raises:
        UserError: if the split leaves nothing to train on, or nothing of what it holds out.
    """
    parts = _parts(config, dataset, pseudo)
    samplers = create_samplers(config, dataset, parts)
    _check_negatives(config, parts, samplers)
    if config.is_plugin and dataset.list_fields:
        train: Any = BucketLoader(config, parts[0])
    else:
        train = get_dataloader(config, "train")(
            config, parts[0], samplers[0], shuffle=config["shuffle"]
        )
    evaluation = []
    for phase, part, sampler in zip(("valid", "test"), parts[1:], samplers[1:], strict=True):
        full = get_dataloader(config, phase) is FullSortEvalDataLoader
        loader = HistoryEvalLoader if full else SampledEvalLoader
        evaluation.append(loader(config, part, sampler, shuffle=False) if len(part) else None)
    return train, *evaluation


def _parts(config: Any, dataset: FlatDataset, pseudo: Tensor | None) -> list[FlatDataset]:
    """Training, validation and test part, with pseudo-items in front where they belong."""
    try:
        parts = dataset.build()
    except (NotImplementedError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"eval_args={config['eval_args']}: {error}", keys=("eval_args",)) from error
    if config.held_out and not len(parts[1]) and not len(parts[2]):
        raise UserError(
            f"dataset={dataset.dataset_name!r} ({dataset.statistics}): no user has enough "
            "interactions for validation or test under the split of eval_args",
            keys=("dataset",),
        )
    if pseudo is not None:
        if len(pseudo) != dataset.user_num:
            raise UserError(
                f"the pseudo-items are those of {len(pseudo) - 1} users, but the data set "
                f"{dataset.dataset_name!r} at {dataset.dataset_path} has {dataset.statistics}"
            )
        parts[0].prepend(pseudo, keep_rows=config["pseudo_mix"] == "both")
        for part in parts[1:] if config["pseudo_at_evaluation"] else ():
            part.prepend(pseudo, keep_rows=False)
    return parts


def _check_negatives(config: Any, parts: Sequence[FlatDataset], samplers: Sequence[Any]) -> None:
    """Refuse data in which some negative cannot be drawn, which a sampler would try without end.

    Args:
        config (Config): resolved configuration.
        parts (Sequence): training, validation and test part, pseudo-items included.
        samplers (Sequence): theirs, or None.

    Raises:
        UserError: naming what draws and a row, or the one item, that leaves nothing to draw.
    """
    drawn = []  # by whom, of which parts, and whether the target is ruled out, too
    if config["sr_loss"] == "BCE":
        drawn.append((f"sr_loss=BCE of {config['model']}", parts[:1], True))
    if config["transform"] == "mask_itemseq":
        drawn.append((f"transform=mask_itemseq of {config['model']}", parts, False))
    for who, of, with_target in drawn:
        for part in of:
            user = _user_with_all_items(part, with_target)
            if user is not None:
                raise UserError(
                    f"{who} draws items outside a row, but with MAX_ITEM_LIST_LENGTH="
                    f"{part.max_item_list_len} a row of user {user!r} holds all "
                    f"{part.item_num - 1} items there are; a smaller MAX_ITEM_LIST_LENGTH or more "
                    "items leave some to draw",
                    keys=("MAX_ITEM_LIST_LENGTH",),
                )
    # RecBole makes samplers for full rankings, too, which nobody asks.
    asked = [True, *(config["eval_args"]["mode"][part] != "full" for part in ("valid", "test"))]
    for sampler in (one for one, use in zip(samplers, asked, strict=True) if one and use):
        n_items = sampler.item_num - 1
        if sampler.distribution == "popularity":
            n_items = len(set(sampler._get_candidates_list()))
        if n_items < 2:
            raise UserError(
                f"dataset={parts[0].dataset_name!r} ({parts[0].statistics}) has one item to draw "
                "negatives from, which is the target itself; the loss of the model, or a sampled "
                "ranking, needs two",
                keys=("dataset",),
            )


def _user_with_all_items(part: FlatDataset, with_target: bool) -> str | None:
    """The user of a row that holds every item there is; None if no row does.

    Args:
        part (FlatDataset): its rows.
        with_target (bool): whether the target of a row is one of its items.
    """
    if part.max_item_list_len + with_target < part.item_num - 1:
        return None
    rows = part.inter_feat
    sequences = rows[part.iid_field + part.config["LIST_SUFFIX"]]
    for index in torch.arange(len(rows)).split(10_000):
        held = torch.zeros(len(index), part.item_num, dtype=torch.bool)
        held.scatter_(1, sequences[index], True)
        if with_target:
            held.scatter_(1, rows[part.iid_field][index].unsqueeze(1), True)
        full = held[:, 1:].all(1)
        if full.any():
            user = rows[part.uid_field][index][full][0]
            return str(part.id2token(part.uid_field, user))
    return None
