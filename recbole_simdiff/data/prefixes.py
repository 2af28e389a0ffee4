"""Ready-made prefixes: the rows of ``benchmark_filename``, which are not whole histories."""

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import SequentialDataset
from recbole.utils import FeatureSource, FeatureType

from recbole_simdiff import files
from recbole_simdiff.data.recbole_fixes import RecBoleFixes
from recbole_simdiff.errors import UserError


class ReadyPrefixes(RecBoleFixes, SequentialDataset):
    """RecBole's ``SequentialDataset`` with the faults of its ready-made prefixes fixed."""

    def _benchmark_presets(self) -> None:
        """Newest items, padded, and lengths of pre-split sequences.

        Symptom: ``agg(len)`` fails on pandas 3; Caser, DIN, FOSSIL, HGN, RepeatNet and SINE fail
        where no history has MAX_ITEM_LIST_LENGTH items.

        Raises:
            UserError: if there is no column of histories.
        """
        for field in self.inter_feat:
            if field + self.config["LIST_SUFFIX"] in self.inter_feat:
                setattr(self, f"{field}_list_field", field + self.config["LIST_SUFFIX"])
        length = self.item_list_length_field
        self.check_new_columns(length)
        history = self.iid_field + self.config["LIST_SUFFIX"]
        declared = self.field2type.get(history)
        if declared != FeatureType.TOKEN_SEQ:
            state = f"is declared {declared.value}" if declared else "is not loaded"
            raise UserError(
                f"benchmark_filename={self.benchmark_filename_list!r}: the column of histories, "
                f"{history}:token_seq, {state}; ITEM_ID_FIELD and LIST_SUFFIX make its name, and "
                "load_col loads it",
                keys=("benchmark_filename",),
            )
        self._leave_out_prefixes(history)
        self.set_field_property(length, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)
        # RecBole applies no limit here, and models fail on rows beyond their last position.
        limit = self.max_item_list_len
        newest = [cell[-limit:] for cell in self.inter_feat[history]]
        padded = [np.pad(cell, (0, limit - len(cell))) for cell in newest]
        self.inter_feat[history] = pd.Series(padded, index=self.inter_feat.index, dtype=object)
        self.field2seqlen[history] = limit
        self.inter_feat[length] = [len(cell) for cell in newest]

    def _leave_out_prefixes(self, history: str) -> None:
        """Leave out ready-made prefixes without a user, a target or a history.

        Symptom: RecBole trains on padding as a target, and fails on an empty history.
        """
        feat = self.inter_feat
        some = np.array([len(cell) > 0 for cell in feat[history]], bool)
        kept = some & (feat[self.uid_field] > 0).to_numpy() & (feat[self.iid_field] > 0).to_numpy()
        if kept.all():
            return
        self.logger.warning(
            f"{self.dataset_name}: {(~kept).sum():,} of {len(kept):,} ready-made prefixes have no "
            f"{self.uid_field}, no {self.iid_field} or no {history} and are left out"
        )
        parts = np.split(kept, np.cumsum(self.file_size_list)[:-1])
        self.file_size_list = [int(part.sum()) for part in parts]
        self.inter_feat = feat[kept].reset_index(drop=True)

    def check_new_columns(self, *names: str) -> None:
        """Refuse to write sequences and their lengths over columns of the file."""
        columns = {self.uid_field, self.iid_field, *self.inter_feat}
        if taken := columns & {*names, self.config["NEG_PREFIX"] + self.iid_field}:
            keys = ("ITEM_LIST_LENGTH_FIELD", "LIST_SUFFIX", "NEG_PREFIX")
            named = ", ".join(f"{key}={self.config[key]!r}" for key in keys)
            raise UserError(
                f"the column {taken.pop()!r} would be written over: {named} must give names that "
                f"the columns {', '.join(columns)} do not have"
            )

    def ready_rows(self) -> str | None:
        """Checksum of the rows and of the size of each part; None if there are whole histories."""
        if self.benchmark_filename_list is None:
            return None
        rows, sizes = self.inter_feat.interaction, torch.tensor(self.file_size_list)
        history = self.iid_field + self.config["LIST_SUFFIX"]
        longest = int(rows[self.item_list_length_field].max())
        return files.digest(rows | {"sizes": sizes, history: rows[history][:, :longest]})
