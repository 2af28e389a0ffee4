"""Faults of RecBole's ``Dataset`` in the values of columns, one override a fault."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

from recbole_simdiff.data.loading import LoadingFixes
from recbole_simdiff.errors import UserError


class FeatureFixes(LoadingFixes):
    """Columns are numbered, filled and scaled as RecBole does, on today's pandas."""

    _rest_fields: Any

    def _init_alias(self) -> None:
        """Choose the columns that share ids; of ready-made prefixes, a column and its list do.

        Symptom: unless ``alias_of_item_id`` names the column of histories, an item has one id
        there and another as a target. A name that is no column ends in "np.str_('...')".

        Raises:
            UserError: for a name that is no column of tokens, or is both a user and an item.
        """
        types = (FeatureType.TOKEN, FeatureType.TOKEN_SEQ)
        columns = [field for field, ftype in self.field2type.items() if ftype in types]
        groups: dict[str, list[str]] = {}
        for name, field in (("user_id", self.uid_field), ("item_id", self.iid_field)):
            given = self.config[f"alias_of_{name}"] or []
            if not isinstance(given, list) or any(name not in columns for name in given):
                raise UserError(
                    f"alias_of_{name}={given!r} must be a list of columns of tokens, of which are "
                    f"loaded: {', '.join(columns)}"
                )
            groups[name] = [field, *given]
        for field in columns if self.benchmark_filename_list is not None else ():
            name = field + self.config["LIST_SUFFIX"]
            if name in columns:
                owners = [group for group in groups.values() if field in group]
                owner = owners[0] if owners else groups.setdefault(field, [field])
                owner.append(name)
        both = set(groups["user_id"]) & set(groups["item_id"])
        if both:
            raise UserError(
                f"alias_of_user_id={self.config['alias_of_user_id']!r}, "
                f"alias_of_item_id={self.config['alias_of_item_id']!r}: "
                f"{', '.join(sorted(both))} cannot be users and items at once",
                keys=("alias_of_user_id", "alias_of_item_id"),
            )
        self.alias = {name: list(dict.fromkeys(group)) for name, group in groups.items()}
        taken = {field for group in self.alias.values() for field in group}
        self._rest_fields = [field for field in self.token_like_fields if field not in taken]

    def _fill_nan(self) -> None:
        """Fill missing tokens with 0, missing floats with the mean, missing sequences with none.

        Symptom: on pandas 3 RecBole's in-place ``fillna`` does nothing; missing floats stay NaN and
        missing tokens become the id -9223372036854775808.
        """
        for name in self.feat_name_list:
            feat = getattr(self, name)
            for field in feat:
                ftype = self.field2type[field]
                if ftype == FeatureType.TOKEN:
                    feat[field] = feat[field].fillna(0)
                elif ftype == FeatureType.FLOAT:
                    feat[field] = feat[field].fillna(feat[field].mean())
                elif feat[field].isna().any():  # rows that a merge added, e.g. for padding
                    cells = [np.array([]) if isinstance(c, float) else c for c in feat[field]]
                    feat[field] = pd.Series(cells, index=feat.index, dtype=object)

    def _set_label_by_threshold(self) -> None:
        for field in self.config["threshold"] or ():
            self.check_loaded("threshold", field)
        super()._set_label_by_threshold()

    def _normalize(self) -> None:
        """Scale columns of numbers to [0, 1].

        Symptom: as in ``_remap``, for columns of sequences.
        """
        names, everything = self.config["normalize_field"], self.config["normalize_all"]
        if names and everything:
            raise UserError(
                f"normalize_field={names} has no place beside normalize_all=True",
                keys=("normalize_field", "normalize_all"),
            )
        for field in names or (self.float_like_fields if everything else ()):
            self.check_loaded("normalize_field", field)
            if "float" not in self.field2type[field].value:
                raise UserError(
                    f"normalize_field={names}: {field} is {self.field2type[field].value}; only "
                    "columns of float and float_seq are numbers",
                    keys=("normalize_field",),
                )
            for feat in self.field2feats(field):
                values, ends = self._numbers(feat, field)
                low, high = values.min(initial=np.inf), values.max(initial=-np.inf)
                if low < high:
                    values = (values - low) / (high - low)
                else:
                    self.logger.warning(f"all values of {field} are the same")
                    values = np.ones_like(values)
                parts = np.split(values, ends)
                feat[field] = (
                    values
                    if self.field2type[field] == FeatureType.FLOAT
                    else pd.Series(parts, index=feat.index, dtype=object)
                )

    def _discretization(self) -> None:
        """Turn numerical features into pairs (weight, row of an embedding table).

        Symptom: as in ``_remap``, for columns of sequences.
        """
        buckets, names = self.config["discretization"] or {}, self.config["numerical_features"]
        for field in buckets:
            if field not in names:
                raise UserError(
                    f"discretization={buckets}: {field} must be among numerical_features={names}",
                    keys=("discretization", "numerical_features"),
                )
        for field in names:
            self.check_loaded("numerical_features", field)
            if "float" not in self.field2type[field].value:
                raise UserError(
                    f"numerical_features={names}: {field} is {self.field2type[field].value}; only "
                    "columns of float and float_seq are numbers",
                    keys=("numerical_features",),
                )
            for feat in self.field2feats(field):
                weight, ends = self._numbers(feat, field)
                row = np.ones_like(weight)
                if field in buckets:
                    row, weight = _buckets(weight, **buckets[field]), row
                    self.field2bucketnum[field] = int(row.max(initial=0)) + 1
                if self.field2type[field] == FeatureType.FLOAT:
                    pairs: list[Any] = np.stack([weight, row], axis=-1).tolist()
                else:
                    pairs = list(zip(np.split(weight, ends), np.split(row, ends), strict=True))
                feat[field] = pd.Series(pairs, index=feat.index, dtype=object)

    def _numbers(self, feat: pd.DataFrame, field: str) -> tuple[np.ndarray, np.ndarray]:
        """All numbers of a column as one array, and where each cell but the last ends."""
        if self.field2type[field] == FeatureType.FLOAT:
            return feat[field].to_numpy(copy=True), np.arange(1, len(feat))
        cells = [np.asarray(cell, dtype=float) for cell in feat[field]]
        ends = np.cumsum([len(cell) for cell in cells])[:-1]
        return np.concatenate([*cells, np.array([])]), ends

    def _remap_ID_all(self) -> None:  # noqa: N802, RecBole's name
        """Number the tokens of additional files, too.

        Symptom: RecBole numbers them only where an alias names them; elsewhere they stay text, of
        which no tensor can be made.
        """
        named = {field for alias in self.alias.values() for field in alias}
        others = [
            field
            for field, source in self.field2source.items()
            if not isinstance(source, FeatureSource)
            and "token" in self.field2type[field].value
            and field not in named
        ]
        self._rest_fields = [*self._rest_fields, *others]
        super()._remap_ID_all()

    def _drop_unused_col(self) -> None:
        for name in self.config["unused_col"] or ():
            if getattr(self, f"{name}_feat", None) is None:
                raise UserError(
                    f"unused_col={self.config['unused_col']}: no column of .{name} is loaded; "
                    f"load_col={self.config['load_col']}",
                    keys=("unused_col", "load_col"),
                )
        super()._drop_unused_col()

    def _remap(self, remap_list: list[tuple[pd.DataFrame, str, Any]]) -> None:
        """Number the tokens from 1, missing ones 0.

        Symptom: pandas 3 hands ``agg(len)`` the whole column, so token sequences fail with "Length
        of values does not match length of index".
        """
        if not remap_list:
            return
        flat = [
            feat[field].to_numpy(dtype=object)
            if ftype == FeatureType.TOKEN
            else np.concatenate(
                [np.asarray(c, dtype=object) for c in feat[field]] or [np.array([], object)]
            )
            for feat, field, ftype in remap_list
        ]
        ids, tokens = pd.factorize(np.concatenate(flat))
        names = np.array(["[PAD]", *tokens])
        parts = np.split(ids + 1, np.cumsum([len(part) for part in flat])[:-1])
        for (feat, field, ftype), part in zip(remap_list, parts, strict=True):
            if field not in self.field2id_token:
                self.field2id_token[field] = names
                self.field2token_id[field] = {token: i for i, token in enumerate(names)}
            if ftype == FeatureType.TOKEN:
                feat[field] = part
            else:
                ends = np.cumsum([len(cell) for cell in feat[field]])[:-1]
                cells = np.split(part, ends)
                feat[field] = pd.Series(cells, index=feat.index, dtype=object)

    def _dataframe_to_interaction(self, data: pd.DataFrame) -> Interaction:
        """Copy the arrays: pandas 3 hands out read-only ones, which torch must not share."""
        columns = {k: SimpleNamespace(values=data[k].to_numpy(copy=True)) for k in data}
        converted: Interaction = super()._dataframe_to_interaction(columns)
        return converted


def _buckets(values: np.ndarray, method: str, bucket: int = 0) -> np.ndarray:
    """RecBole's buckets of numbers: ED, of equal width; LD, by the square of the logarithm."""
    if method == "ED":
        low, high = values.min(initial=np.inf), values.max(initial=-np.inf) + 1e-9
        if low == high:
            return np.full_like(values, bucket)
        return np.floor((values - low) * bucket / (high - low) + 1)
    large = values > 2
    powers = np.floor(np.log(values * large + 1e-9) ** 2 + 1)
    return np.unique(np.where(large, powers, values), return_inverse=True)[1].astype(float)
