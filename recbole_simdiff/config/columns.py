"""Columns that the settings of a data set name, and those that its file has.

``properties/dataset/<name>.yaml`` names the columns of one provider's file. Others hand out the
same data with the columns ``user_id, item_id, timestamp``. Such a file is read by these names, and
filters of columns that it lacks do not apply to it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What RecBole calls them where no settings of the data set say otherwise.
COMMON_NAMES = {"USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "TIME_FIELD": "timestamp"}

# What the origin of an adapted value is called in messages.
ORIGIN = "the columns of the file"


def fit_to_file(final: dict[str, Any], origin: dict[str, str], stem: Path) -> str | None:
    """Replace names of columns that the file lacks by the common ones, where it has those.

    Only values from a data set's yaml are replaced; what a user or a checkpoint gave stays.

    Args:
        final (dict): key -> value; ``*_FIELD``, ``load_col``, ``val_interval`` and
            ``item_title_field`` may change.
        origin (dict): key -> where the value comes from; changed with it.
        stem (Path): the data set's files without their suffix.

    Returns:
        str | None: what was replaced, one line for the log; None if nothing was.
    """
    if final["benchmark_filename"] is not None:
        return None
    changes = _title(final, origin, stem)
    columns = _columns(stem.with_name(f"{stem.name}.inter"), final)
    fields = _fields(final, origin, columns) if columns else None
    if fields:
        changes |= fields | _filters(final | fields, origin, columns)
        changes |= _loaded(final, fields, origin, columns)
    changes = {key: value for key, value in changes.items() if final[key] != value}
    if not changes:
        return None
    replaced = ", ".join(f"{key}={value} for {final[key]}" for key, value in changes.items())
    files = ", ".join(dict.fromkeys(origin[key] for key in changes))
    final.update(changes)
    origin.update(dict.fromkeys(changes, ORIGIN))
    return f"{stem.name}: the file has not all columns that {files} names. Used: {replaced}"


def _from_data_set(key: str, origin: Mapping[str, str]) -> bool:
    """Whether a value comes from a data set's yaml, this package's or RecBole's."""
    return Path(origin.get(key, "")).parts[-3:-1] == ("properties", "dataset")


def _columns(path: Path, final: Mapping[str, Any]) -> list[str]:
    """Names of the columns of an atomic file; none if it cannot be read, which loading reports."""
    try:
        if not path.is_file():  # opening a pipe would wait
            return []
        with open(path, encoding=final.get("encoding") or "utf-8") as file:
            header = file.readline().rstrip("\n").removeprefix("\ufeff")
    except (OSError, LookupError, UnicodeDecodeError):
        return []
    return [cell.partition(":")[0] for cell in header.split(final["field_separator"])]


def _title(final: Mapping[str, Any], origin: Mapping[str, str], stem: Path) -> dict[str, Any]:
    """No titles where the ``.item`` file has no such column."""
    field = final["item_title_field"]
    if field is None or not _from_data_set("item_title_field", origin):
        return {}
    known = field in _columns(stem.with_name(f"{stem.name}.item"), final)
    return {} if known else {"item_title_field": None}


def _fields(
    final: Mapping[str, Any], origin: Mapping[str, str], columns: list[str]
) -> dict[str, Any] | None:
    """Columns of users, items and times; None if the file lacks one under both names."""
    fields = {}
    for key, common in COMMON_NAMES.items():
        fields[key] = final[key]
        if final[key] and final[key] not in columns:
            if common not in columns or not _from_data_set(key, origin):
                return None
            fields[key] = common
    return fields


def _filters(
    final: Mapping[str, Any], origin: Mapping[str, str], columns: list[str]
) -> dict[str, Any]:
    """Intervals of columns that are there: in this file, or loaded from another one."""
    intervals = final["val_interval"]
    if not isinstance(intervals, dict) or not _from_data_set("val_interval", origin):
        return {}
    loaded = final["load_col"] or {}
    others = {name for kind, names in loaded.items() if kind != "inter" for name in names}
    kept = {name: value for name, value in intervals.items() if name in {*columns, *others}}
    return {"val_interval": kept or None}


def _loaded(
    final: Mapping[str, Any],
    fields: Mapping[str, Any],
    origin: Mapping[str, str],
    columns: list[str],
) -> dict[str, Any]:
    """Columns to load, under the names that the file has."""
    loaded = final["load_col"]
    if not isinstance(loaded, dict) or not _from_data_set("load_col", origin):
        return {}
    renamed = {final[key]: name for key, name in fields.items()}
    names = [renamed.get(name, name) for name in loaded.get("inter") or ()]
    names = [*names, *filter(None, fields.values())]
    there = [name for name in dict.fromkeys(names) if name in columns]
    return {"load_col": {**loaded, "inter": there}}
