"""Which class the name of a model means, whose defaults it has, what other processes call it."""

from collections.abc import Iterator, Mapping
from typing import Any

from recbole_simdiff.config.layers import plain_value, properties_dir, read_yaml, short_name
from recbole_simdiff.errors import UserError
from recbole_simdiff.models import own
from recbole_simdiff.models.registry import WRAPPERS, get_model, plugin_models, recbole_models
from recbole_simdiff.modules.base import SequentialModel

_PATH = {"/", "\\", "\0"}  # not in names, which become names of files


def check_name(key: str, value: Any) -> None:
    """Refuse what cannot be the name of a file.

    Raises:
        UserError: naming the key and its value.
    """
    if not isinstance(value, str) or not value or value[0] == "." or set(value) & _PATH:
        more = "; a model of your own is FILE.py:CLASS" if key == "model" else ""
        raise UserError(
            f"{key}={value!r} must be a name without / and \\ that does not begin with a dot; "
            f"data_path says where the folders of data sets are{more}",
            keys=(key,),
        )


def find_model(key: str, value: Any, from_checkpoint: bool) -> type[SequentialModel]:
    """The class that a value of ``model`` or ``backbone`` means.

    Args:
        key (str): ``model`` or ``backbone``.
        value (Any): a name, ``FILE.py:CLASS`` or a class.
        from_checkpoint (bool): whether a checkpoint says so, which may be anybody's.

    Raises:
        UserError: if there is none, or if a checkpoint names a file of code.
    """
    if isinstance(value, type):
        return get_model(value)
    if not own.is_file(str(value)):
        check_name(key, value if key == "model" else str(value))
    elif from_checkpoint:
        raise UserError(f"{key}={value!r} comes from a checkpoint, which runs no code")
    return get_model(str(value))


def find_backbone(
    wrapper: str, values: dict[str, Any], from_checkpoint: bool
) -> type[SequentialModel]:
    """The class that a method around a model trains; ``backbone`` becomes its name.

    Args:
        wrapper (str): name of the method.
        values (dict): given values.
        from_checkpoint (bool): see ``find_model``.

    Raises:
        UserError: if there is none, or it is such a method itself.
    """
    default = read_yaml(properties_dir() / "model" / f"{wrapper}.yaml")["backbone"]
    backbone = values.get("backbone", default)
    if str(backbone) in WRAPPERS:
        raise UserError(
            f"backbone={backbone} must be a recommender; {wrapper} trains one", keys=("backbone",)
        )
    found = find_model("backbone", backbone, from_checkpoint)
    if "backbone" in values:
        values["backbone"] = found.__name__
    return found


def host_name(model: type) -> str:
    """The model of RecBole that a class is or derives from; its own name if there is none."""
    there = recbole_models()
    bases = (base.__name__ for base in model.__mro__)
    return next((name for name in bases if name in there), model.__name__)


def layers(model: type) -> list[str]:
    """Names whose files are read for a model, in order: those it derives from, and its own."""
    known, folder = {*plugin_models(), host_name(model)}, properties_dir() / "model"
    bases = dict.fromkeys(base.__name__ for base in reversed(model.__mro__))
    names = [name for name in bases if name in known or (folder / f"{name}.yaml").is_file()]
    return names if model.__name__ in names else [*names, model.__name__]


def own_defaults(model: own.OwnModel | None) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Values and origin of the defaults of a model of the user's own, later ones win."""
    if model is None:
        return
    for values, origin in model.defaults:
        yield {key: plain_value(value) for key, value in values.items()}, origin
    for file in model.files:
        yield read_yaml(file), short_name(file, properties_dir())


def portable(config: Any) -> dict[str, Any]:
    """``Config.plain`` for another process, where an own model is named by its file.

    Args:
        config (Config): resolved configuration.

    Raises:
        UserError: if no file has the model.
    """
    plain: dict[str, Any] = config.plain()
    if config.own is None:
        return plain
    reference = config.own.reference_for_others()
    if config.wraps:
        plain["values"]["backbone"] = reference
    else:
        plain["model"] = reference
    return plain
