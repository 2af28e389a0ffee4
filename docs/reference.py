"""Reference pages of the site, as Markdown: made from parsers, yaml comments and docstrings."""

import argparse
import ast
import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import recbole_simdiff
from recbole_simdiff.cli.parser import COMMANDS, FIRST, build_parser
from recbole_simdiff.config.layers import properties_dir
from recbole_simdiff.models.diffuasr import generator
from recbole_simdiff.models.registry import plugin_models


class Setting(NamedTuple):
    """A key of a yaml file.

    Attributes:
        section (str): heading above it; empty if there is none.
        key (str): its name.
        value (str): its default, as the file writes it.
        meaning (str): its comment.
    """

    section: str
    key: str
    value: str
    meaning: str


def pages() -> dict[str, str]:
    """Path of each reference page, under the folder of the documentation -> its Markdown."""
    return {
        "reference/command-line.md": command_line(),
        "reference/settings.md": common_settings(),
        "reference/model-settings.md": model_settings(),
        "reference/data-settings.md": data_settings(),
        "reference/models.md": models(),
        "reference/python.md": python_names(),
    }


# ---------------------------------------------------------------- command line


def command_line() -> str:
    """Every command with its options."""
    parts = [
        "# Command line",
        "`python run_recbole_simdiff.py COMMAND --option=value ...`; after `pip install .` also "
        "`recbole-simdiff COMMAND ...`. Without a command it is `train`. `COMMAND --help` prints "
        "what stands here. Commands that train or evaluate accept every key of the "
        "configuration as `--key=value`: [settings of all models](settings.md), [of each "
        "model](model-settings.md), [of data sets](data-settings.md).",
        "Exit codes: 0 success, 1 failure, 2 wrong input, 128 + number of the signal that stopped "
        "the program.",
    ]
    for name, command in COMMANDS.items():
        parser = parser_of(name)
        parts += [f"## {name}", sentence(escaped(parser.description or command.help))]
        if option := FIRST.get(command.module):
            parts.append(f"The first argument is the value of `{option}`.")
        parts.append(table(["option", "meaning"], options_of(parser)))
    return joined(parts)


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command, with its options."""
    module = importlib.import_module(f"recbole_simdiff.cli.{COMMANDS[command].module}")
    parsers: list[argparse.ArgumentParser] = []

    def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
        module.add_arguments(parser, name)
        parsers.append(parser)

    build_parser(command, add_arguments)
    return parsers[0]


def options_of(parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    """The options of a parser with their help."""
    return [
        (
            ", ".join(f"`{option}{value_of(action)}`" for option in action.option_strings),
            help_of(parser, action),
        )
        for action in parser._actions  # argparse has no public list of them
        if "--help" not in action.option_strings
    ]


def value_of(action: argparse.Action) -> str:
    """What stands behind the name of an option."""
    if action.nargs == 0:
        return ""
    names = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    return f"={metavar or names or action.dest.upper()}" + " ..." * (action.nargs in ("+", "*"))


def help_of(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Help of an option with its placeholders filled, and whether it must be given."""
    text = "" if action.help in (None, argparse.SUPPRESS) else str(action.help)
    text %= {**vars(action), "prog": parser.prog}
    return escaped("; ".join(filter(None, [text, "required" * action.required])))


# ---------------------------------------------------------------- settings


def common_settings() -> str:
    """What ``overall.yaml`` and the file of the encoder say."""
    return joined(
        [
            "# Settings of all models",
            "Every key with its default. `list --explain --model=M --dataset=D` shows the values "
            "that hold for a run and the file that each comes from. Keys that are not here are "
            "RecBole's.",
            *file_section("overall.yaml", "Defaults"),
            *file_section("model/EncoderRecommender.yaml", "Models around the encoder"),
        ]
    )


def model_settings() -> str:
    """A section for each file under ``model/``, with its presets."""
    parts = [
        "# Settings of each model",
        "[P] paper, [C] released code, [H] chosen here. They add to the [settings of all "
        "models](settings.md). A preset is given as `--preset=NAME`.",
    ]
    root = properties_dir()
    for path in sorted((root / "model").glob("*.yaml"), key=lambda path: path.stem.lower()):
        if path.stem == "EncoderRecommender":
            continue
        parts += file_section(f"model/{path.name}", path.stem)
        for preset in sorted((root / "preset" / path.stem).glob("*.yaml")):
            parts += file_section(
                f"preset/{path.stem}/{preset.name}", f"{path.stem}, preset {preset.stem}", level=3
            )
    return joined(parts)


def data_settings() -> str:
    """A section for each data set, with the values tuned for it."""
    parts = [
        "# Settings of data sets",
        "A data set's file names the columns of one provider's files, the filters and the "
        "dropout; those under *tuned* hold for one model on it. Values of a data set go over "
        "those of a model.",
    ]
    root = properties_dir()
    for path in sorted((root / "dataset").glob("*.yaml")):
        parts += file_section(f"dataset/{path.name}", path.stem)
        for tuned in sorted((root / "tuned" / path.stem).glob("*.yaml")):
            parts += file_section(
                f"tuned/{path.stem}/{tuned.name}", f"{tuned.stem} on {path.stem}", level=3
            )
    return joined(parts)


def file_section(name: str, title: str, level: int = 2) -> Iterator[str]:
    """Heading, opening comment and tables of one yaml file, given under ``properties/``."""
    text = (properties_dir() / name).read_text()
    yield f"{'#' * level} {title}"
    yield f"`properties/{name}`. {escaped(opening(text))}".strip()
    rows: dict[str, list[tuple[str, ...]]] = {}
    for setting in settings(text):
        row = (f"`{setting.key}`", code(setting.value), escaped(setting.meaning))
        rows.setdefault(setting.section, []).append(row)
    for section, lines in rows.items():
        if section:
            yield f"**{escaped(section[:1].upper() + section[1:])}**"
        yield table(["key", "default", "meaning"], lines)


def opening(text: str) -> str:
    """The comment at the top of a yaml file, in one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#") or line.startswith("# ----"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def settings(text: str) -> Iterator[Setting]:
    """The keys of a yaml file in its order, with their comments, which may go on below."""
    section, current = "", None
    for line in text.splitlines():
        head = re.match(r"(\w+):(.*)", line)
        if line.startswith("# ----"):
            section = line.removeprefix("# ----").strip()
        if head or line.startswith("# ----"):
            if current:
                yield current
            current = None
        if head:
            value, meaning = parted(head[2])
            current = Setting(section, head[1], value, meaning)
        elif current and line.startswith(" "):
            value, meaning = parted(line)
            current = current._replace(
                value=f"{current.value} {value}".strip(),
                meaning=f"{current.meaning} {meaning}".strip(),
            )
    if current:
        yield current


def parted(line: str) -> tuple[str, str]:
    """Value and comment of a line."""
    value, _, comment = f" {line}".partition(" #")
    return value.strip(), comment.strip()


# ---------------------------------------------------------------- models and names


def models() -> str:
    """The opening of each model's file: symbols, method, differences."""
    parts = [
        "# Models",
        "What each model's file says first: paper, symbols, method, and where paper, released "
        "code and this package differ. All [settings](model-settings.md) of a model, and "
        "[paper, code, here](../methods.md) in one table.",
    ]
    files = {name: inspect.getmodule(model) for name, model in plugin_models().items()}
    for name, module in sorted((files | {"DiffuASR": generator}).items()):
        doc = ast.get_docstring(ast.parse(inspect.getsource(module)))
        parts += [f"## {name}", f"```text\n{doc}\n```"]
    return joined(parts)


def python_names() -> str:
    """The public names of the package."""
    names = [name for name in recbole_simdiff.__all__ if name != "__version__"]
    order = sorted(names, key=lambda name: (name[0].isupper(), name))
    return joined(
        [
            "# Python",
            "What `recbole_simdiff` offers. A [tour](../tour.md) uses most of it.",
            *(f"::: recbole_simdiff.{name}" for name in order),
        ]
    )


# ---------------------------------------------------------------- Markdown


def joined(parts: Sequence[str]) -> str:
    """Blocks of a page, with an empty line between two."""
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells are escaped by the caller but for their bars."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', bar(cell)) for cell in line)} |" for line in lines
    )


def bar(cell: str) -> str:
    """A bar inside a cell: as an entity, which code cannot have, or escaped."""
    return "\\|" if "`" in cell else "&#124;"


def code(value: str) -> str:
    """A value as code; nothing if there is none."""
    return f"`{value}`" if value else ""


def escaped(text: str) -> str:
    """Text of a comment that Markdown shows as it is."""
    return re.sub(r"([\\*_<\[\]~])", r"\\\1", text)


def sentence(text: str) -> str:
    """Text that begins with a capital and ends with a stop."""
    text = f"{text[:1].upper()}{text[1:]}"
    return text if text.endswith(".") else f"{text}."
