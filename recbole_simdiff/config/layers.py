"""Reading of configuration values and files as plain YAML."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from recbole_simdiff.errors import UserError

SEPARATORS = ("field_separator", "seq_separator")

# Limits of a YAML text: depth of nested lists and mappings, and number of values with aliases
# expanded.
_MAX_DEPTH, _MAX_VALUES = 50, 100_000


# libyaml's parser is eight times faster; PyYAML's wheels contain it.
class PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML that reads 1e-3 as a float and dates as text, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The keys and values of a node.

        Raises:
            ConstructorError: if a key is given twice.
        """
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _whole_number(loader: Any, node: yaml.ScalarNode) -> int | str:
    """A whole number; one with more digits than Python prints stays text."""
    try:
        value: int = loader.construct_yaml_int(node)
    except ValueError:
        return str(node.value)
    return value if abs(value) < 2**1024 else str(node.value)


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

PlainLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)

PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def properties_dir() -> Path:
    """The folder of our YAML files: inside the installed package, or beside it in a checkout.

    Raises:
        UserError: naming both places, if neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    folders = [package / "properties", package.parent / "properties"]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise UserError(f"properties/ is missing; looked for {folders[0]} and {folders[1]}")


def known_datasets(data_root: str) -> list[str]:
    """Names of the data sets with settings here or with a folder in ``data_path``.

    Args:
        data_root (str): the folder of the data sets' folders.
    """
    settings = {path.stem for path in (properties_dir() / "dataset").glob("*.yaml")}
    return sorted(settings | {path.parent.name for path in Path(data_root).glob("*/*.inter")})


def _check_size(text: str) -> None:
    """Refuse YAML that is too large once its aliases are expanded, before it is built.

    Raises:
        UserError: if it is nested too deep, or has too many values.
        YAMLError: if it is not YAML.
    """
    sizes: dict[str, int] = {}  # anchor -> number of values in it
    depth = total = 0
    begun: list[tuple[str | None, int]] = []  # anchor of each open list, values before it
    for event in yaml.parse(text, Loader=PlainLoader):
        if isinstance(event, yaml.AliasEvent):
            # An alias inside its own anchor would expand without end.
            total += sizes.get(str(event.anchor), _MAX_VALUES + 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            begun.append((event.anchor, total))
            depth, total = max(depth, len(begun)), total + 1
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            if anchor:
                sizes[anchor] = total - before
        if depth > _MAX_DEPTH:
            raise UserError(f"more than {_MAX_DEPTH} lists are nested in each other")
        if total > _MAX_VALUES:
            raise UserError(f"with its aliases expanded it has more than {_MAX_VALUES:,} values")


def _load(text: str) -> Any:
    """The content of a YAML text.

    Raises:
        UserError: see ``_check_size``.
        YAMLError: if it is not YAML.
    """
    _check_size(text)
    return yaml.load(text, Loader=PlainLoader)


def parse_value(text: str) -> Any:
    """A value typed by a user, read as YAML and never evaluated; text that is not YAML stays text.

    ``1e-3``, ``true``, ``None``, ``[5,10]`` and ``{a: 1}`` are read as a number, a truth value,
    None, a list and a mapping.

    Raises:
        UserError: if the text is nested too deep, or has too many values.
    """
    if text == "None":
        return None
    try:
        return _load(text)
    except UserError as error:
        raise UserError(f"{text} cannot be used: {error}") from None
    except (yaml.YAMLError, ValueError):
        return text


def _typed_separator(text: str) -> Any:
    """A separator exactly as it was typed; only text in quotes is read as YAML."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return parse_value(text) if quoted or text == "None" else text


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """``--key=value`` and ``--key value`` arguments as a dictionary of parsed values.

    Args:
        arguments (Iterable): arguments of the command line, without options of the command.

    Raises:
        UserError: for an argument that is neither, an empty value, or a key given twice with
            different values.
    """
    result: dict[str, Any] = {}
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not key:
            raise UserError(f"{argument!r} is not of the form --key=value")
        if not equals:
            if not pending or pending[0].startswith("--"):
                raise UserError(f"--{key} needs a value: --{key}=value")
            text = pending.pop(0)
        if not text:
            raise UserError(f"--{key}= is empty; give a value, or {key}=None for none")
        try:
            value = _typed_separator(text) if key in SEPARATORS else parse_value(text)
        except UserError as error:
            raise UserError(f"--{key}: {error}") from None
        if key in result and result[key] != value:
            raise UserError(f"--{key} is given twice: {result[key]!r} and {value!r}")
        result[key] = value
    return result


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a dictionary.

    Raises:
        UserError: if the file is missing, is not YAML, or does not hold keys and values.
    """
    try:
        content = _load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not a YAML file: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold 'key: value' lines, not a {type(content).__name__}")
    for key in content:
        if not isinstance(key, str):
            raise UserError(f"{path} must hold 'key: value' lines; the key {key!r} is not a name")
    return content


def preset_files(names: Sequence[str]) -> dict[str, Path]:
    """Preset -> its file, for a model and the models it derives from.

    Args:
        names (Sequence): the models, base classes first. If two have a preset of the same name,
            the later model's is taken.
    """
    folders = [properties_dir() / "preset" / name for name in names]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def short_name(file: str | Path, properties: Path) -> str:
    """Name of a file of defaults in messages: ``properties/...`` or ``recbole/properties/...``.

    Args:
        file (str | Path): the file.
        properties (Path): see ``properties_dir``.
    """
    parts = Path(os.path.normpath(file)).parts
    if "properties" not in parts:
        return str(file)
    start = len(parts) - 1 - parts[::-1].index("properties")
    of_plugin = Path(os.path.normpath(file)).is_relative_to(properties)
    return "/".join(parts[start:] if of_plugin else ("recbole", *parts[start:]))


def plain_value(value: Any) -> Any:
    """A Python value as YAML has it: NumPy numbers, tuples and paths are converted."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [plain_value(part) for part in value]
    if isinstance(value, Mapping):
        return {plain_value(key): plain_value(part) for key, part in value.items()}
    return value
