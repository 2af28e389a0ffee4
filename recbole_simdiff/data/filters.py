"""Faults of RecBole's ``Dataset`` in filters, one override a fault; what is left out is said."""

import numpy as np
from recbole.utils import FeatureType

from recbole_simdiff.data.loading import LoadingFixes
from recbole_simdiff.errors import UserError


class FilterFixes(LoadingFixes):
    """Filters leave out what they should, with a warning; an empty data set is refused."""

    def _filter_nan_user_or_item(self) -> None:
        """Leave out lines without a user or an item.

        Symptom: once a line has no user, RecBole drops a wrong line for each without an item, and
        item 0 remains in the sequences.
        """
        for name, fields in (
            ("inter_feat", [self.uid_field, self.iid_field]),
            ("user_feat", [self.uid_field]),
            ("item_feat", [self.iid_field]),
        ):
            feat = getattr(self, name)
            missing = feat[fields].isna().any(axis=1) if feat is not None else np.array([])
            if missing.any():
                self.logger.warning(
                    f"{self.dataset_name}: {missing.sum():,} of {len(feat):,} lines of {name} have "
                    f"no {' or no '.join(fields)} and are left out"
                )
                setattr(self, name, feat[~missing])

    def _filter_by_field_value(self) -> None:
        """Refuse what RecBole cannot filter by.

        Symptom: at text that is no interval it warns, filters nothing and drops the last line but
        one; other faults of ``val_interval`` end in tracebacks.
        """
        intervals = self.config["val_interval"]
        if not isinstance(intervals, dict | None):
            raise UserError(
                f'val_interval={intervals!r} must be like {{field: "[5,inf)"}}, or None',
                keys=("val_interval",),
            )
        for field, chosen in (intervals or {}).items():
            if self.field2type.get(field) in (FeatureType.FLOAT, FeatureType.FLOAT_SEQ):
                allowed = 'an interval such as "[5,inf)"'
                try:
                    parsed = self._parse_intervals_str(chosen) or ()
                except (IndexError, ValueError):
                    parsed = ()
                good = len(parsed) == str(chosen).count(";") + 1
            else:
                allowed = "a list of values as text, such as ['1', '2']"
                good = isinstance(chosen, list) and all(isinstance(v, str) for v in chosen)
            self.check_loaded("val_interval", field)
            if not good:
                raise UserError(
                    f"val_interval: {field}={chosen!r} must be {allowed}",
                    keys=("val_interval",),
                )
        super()._filter_by_field_value()

    def _filter_inter_by_user_or_item(self) -> None:
        """Leave out events whose user or item has no line in .user or .item, with a warning.

        Raises:
            UserError: if no event is left.
        """
        if self.config["filter_inter_by_user_or_item"] is not True:
            return
        n, kept = len(self.inter_feat), np.ones(len(self.inter_feat), bool)
        for kind, field in (("user", self.uid_field), ("item", self.iid_field)):
            feat, ids = getattr(self, f"{kind}_feat"), self.inter_feat[field]
            known = None if feat is None else ids.isin(feat[field]).to_numpy()
            if known is None or known.all():
                continue
            file = f"{self.dataset_name}.{kind}"
            if {*(self.config["val_interval"] or ())} & {*feat}:
                file += f" after val_interval={self.config['val_interval']}"
            if not known.any():
                example = f"there it is {feat[field].iloc[0]!r}" if len(feat) else "it is empty"
                raise UserError(
                    f"dataset={self.dataset_name!r} ({self.dataset_path}): no event has its {kind} "
                    f"in {file}. The first {field} of the events is {ids.iloc[0]!r}, {example}; "
                    "filter_inter_by_user_or_item=False keeps such events",
                    keys=("dataset", "filter_inter_by_user_or_item"),
                )
            self.logger.warning(
                f"{self.dataset_name}: {(~known).sum():,} of {n:,} events have {kind}s without a "
                f"line in {file} and are left out (filter_inter_by_user_or_item)"
            )
            kept &= known
        self.inter_feat = self.inter_feat[kept]

    def _remove_duplication(self) -> None:
        """Drop repeated (user, item) pairs in stable time order.

        Symptom: RecBole sorts with an unstable algorithm, so equal times of a user (days, in the
        Amazon data) lose their order in the file.
        """
        keep = self.config["rm_dup_inter"]
        if keep is None:
            return
        if self.time_field in self.inter_feat:
            self.inter_feat = self.inter_feat.sort_values(self.time_field, kind="stable")
        self.inter_feat = self.inter_feat.drop_duplicates(
            [self.uid_field, self.iid_field], keep=keep
        )

    def _reset_index(self) -> None:
        """Refuse an empty data set, and name the filters that may have left nothing."""
        keys = ["val_interval", "user_inter_num_interval", "item_inter_num_interval"]
        if self.user_feat is not None or self.item_feat is not None:
            keys.append("filter_inter_by_user_or_item")
        default = ("None", "False", "[0,inf)")  # leave nothing out
        given = [k for k in keys if str(self.config[k]).replace(" ", "") not in default]
        filters = ", ".join(f"{k}={self.config[k]}" for k in given)
        for name in self.feat_name_list:
            if getattr(self, name).empty:
                what = "interactions" if name == "inter_feat" else f"lines of {name}"
                raise UserError(
                    f"dataset={self.dataset_name!r} ({self.dataset_path}) has no {what}"
                    + (f", or {filters} leave none" if filters else ""),
                    keys=("dataset", *given),
                )
        super()._reset_index()
