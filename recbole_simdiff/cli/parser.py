"""The commands, their parsers, and the options that several commands share.

Only the given command adds its options. So ``--help`` and each command import no more than they
need.
"""

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from recbole_simdiff.errors import UserError

DEFAULTS = {"model": "SimDiffRec", "dataset": "ml-100k"}

# Module of a command -> the option that its first argument stands for.
FIRST = {
    "experiments": "--experiment",
    "checkpoint": "--action",
    "replay": "--run",
    "trec": "--run",
    "collect": "--runs",
}

# Attribute of a namespace -> its option, where they differ: from is a keyword of Python.
RENAMED = {"start": "from", "end": "to"}


class Command(NamedTuple):
    """A command of the program.

    Attributes:
        module (str): its file in this folder, with ``add_arguments`` and ``handle``.
        help (str): what it does, in one line.
    """

    module: str
    help: str


COMMANDS = {
    "train": Command("train", "train a model, select on validation, test once, save (the default)"),
    "evaluate": Command("evaluate", "evaluate a checkpoint, or lists of another program"),
    "trec": Command("trec", "test rankings of a run as TREC run files"),
    "estimate": Command("estimate", "memory and seconds of a training before it starts"),
    "replay": Command("replay", "train a finished run again and compare the figures"),
    "recommend": Command(
        "recommend", "top-k items for users or histories, from a checkpoint alone"
    ),
    "serve": Command("serve", "recommendations over HTTP"),
    "export": Command("export", "vectors of items and of histories, as files"),
    "checkpoint": Command("checkpoint", "strip, card, push, pull: checkpoints to be shared"),
    "benchmark": Command(
        "experiments", "models x data sets x seeds: a table with significance tests"
    ),
    "ablate": Command(
        "experiments", "a model with and without its parts: a table with significance tests"
    ),
    "sweep": Command("experiments", "a metric over the values of a setting: curves and a table"),
    "collect": Command("collect", "finished single runs: a table with significance tests"),
    "plot": Command("experiments", "figures of runs, from their records"),
    "analyze": Command(
        "experiments",
        "metrics by history length and target popularity; quality of augmented views",
    ),
    "tune": Command(
        "tune", "search the best setting of a model by its validation score, then test it once"
    ),
    "augment": Command("augment", "the data that DiffuASR trains on, as an atomic .inter file"),
    "prepare": Command("prepare", "raw downloads to RecBole atomic files"),
    "list": Command("list", "models, data sets and presets; --explain: every value"),
}

EPILOG = """\
examples:
  %(prog)s --model=SimDiffRec --dataset=ml-100k                       train, select, test, save
  %(prog)s --model=SimDiffRec --dataset=amazon-beauty --cl_weight=0 --diff_weight=0
  %(prog)s --model=SASRec --dataset=ml-100k                           RecBole's own models likewise
  %(prog)s --model=DiffuASR --backbone=GRU4Rec --dataset=ml-100k      a backbone on augmented data
  %(prog)s --resume=saved/<run>                                       continue a stopped run
  %(prog)s --dataset=ml-1m --nproc=4                                  by four processes
  %(prog)s evaluate --checkpoint=saved/<run>
  %(prog)s evaluate --lists=lists.csv --dataset=ml-100k               lists of another program
  %(prog)s estimate --model=DuoRec --dataset=ml-1m                      memory and seconds
  %(prog)s replay saved/<run>                                         train it again and compare
  %(prog)s recommend --checkpoint=saved/<run> --users=1,2 --k=10
  %(prog)s recommend --checkpoint=saved/<run> --input=- < histories.csv
  %(prog)s serve --checkpoint=saved/<run> --port=8000
  %(prog)s export --checkpoint=saved/<run> --format=npz --output=vectors
  %(prog)s checkpoint strip --checkpoint=saved/<run> --output=model.safetensors
  %(prog)s benchmark --models=SASRec,DuoRec --datasets=ml-100k --seeds=1,2,3
  %(prog)s ablate table3 --datasets=amazon-beauty --jobs=2            an experiment file, in part
  %(prog)s collect saved/<run> saved/<run>                            a table of single runs
  %(prog)s tune --model=SimDiffRec --dataset=amazon-beauty --trials=50   the best setting
  %(prog)s augment --dataset=ml-100k --output=FILE.inter            DiffuASR's data as a file
  %(prog)s prepare --source=movielens --input=ratings.dat --output=dataset/ml-1m
  %(prog)s list --explain --model=SimDiffRec --dataset=ml-100k        every value and its file
"""


class _Once(argparse.Action):
    """An option with one value: a second, different value is an error."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = vars(self).setdefault("given", values)
        if given != values:
            raise UserError(f"{option_string} is given twice: {given!r} and {values!r}")
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """A parser without abbreviated options, whose options have one value by default."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self.register("action", None, _Once)


def build_parser(
    command: str = "train",
    add_arguments: Callable[[argparse.ArgumentParser, str], None] | None = None,
) -> argparse.ArgumentParser:
    """The parser of a command; any other --key=value is a configuration key.

    Args:
        command (str): its name; the other commands are only listed in the help.
        add_arguments (Callable | None): adds the command's options to its parser.
    """
    parser = _Parser(
        prog="run_recbole_simdiff.py",
        description="Diffusion and contrastive sequential recommendation on RecBole.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar=f"{{{','.join(COMMANDS)}}}")
    parsers = {name: commands.add_parser(name, help=c.help) for name, c in COMMANDS.items()}
    if add_arguments:
        add_arguments(parsers[command], command)
    return parser


def split(arguments: Sequence[str]) -> list[str]:
    """The arguments with the command first, which is ``train`` if none is given.

    ``ablate NAME ...`` becomes ``ablate --experiment NAME ...``. As a positional argument, argparse
    would also accept an unknown ``--key=value`` with a space in it.

    Raises:
        UserError: if the first argument is neither a command nor an option.
    """
    start = arguments[0] if arguments else ""
    if start and not start.startswith("-") and start not in COMMANDS:
        near = difflib.get_close_matches(start, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
        raise UserError(f"{start!r} is neither a command nor of the form --key=value; {hint}")
    if start not in (*COMMANDS, "-h", "--help"):
        return ["train", *arguments]
    option = FIRST.get(COMMANDS[start].module) if start in COMMANDS else None
    if option and len(arguments) > 1 and not arguments[1].startswith("-"):
        return [start, option, *arguments[1:]]
    return list(arguments)


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options of a command.

    Returns:
        tuple: the options, and the arguments that are none.

    Raises:
        UserError: if an option is given an empty value.
    """
    namespace, rest = parser.parse_known_args(arguments)
    for key, value in vars(namespace).items():
        if value == "" or (key == "config_files" and "" in value):
            raise UserError(f"--{RENAMED.get(key, key)} is empty; give a value, or leave it out")
    return namespace, rest


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for a model, a data set and configuration files."""
    parser.add_argument(
        "--model", "-m", help=f"a name, or FILE.py:CLASS of your own; default {DEFAULTS['model']}"
    )
    add_data_arguments(parser)


def add_model_file(parser: argparse.ArgumentParser) -> None:
    """Add what names the code of a checkpoint's model where it is the user's own."""
    parser.add_argument(
        "--model_file", metavar="FILE.py", help="code of a checkpoint's model, if it is your own"
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for a data set and configuration files."""
    parser.add_argument("--dataset", "-d", help=f"default {DEFAULTS['dataset']}")
    parser.add_argument(
        "--config_files",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="YAML files; later ones override earlier ones",
    )
