"""The command line: train (the default), evaluate, recommend, experiments and the rest."""

import argparse
import contextlib
import csv
import difflib
import errno
import json
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from safetensors import SafetensorError

from recbole_simdiff import checkpoint, distributed, errors
from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.cli import experiments as command
from recbole_simdiff.config.config import AUGMENTED, COMMAND_LINE, Config
from recbole_simdiff.config.layers import parse_overrides, preset_files, properties_dir, read_yaml
from recbole_simdiff.data import prepare, raw_formats
from recbole_simdiff.errors import Interrupted, OutOfMemory, TrainingDiverged, UserError
from recbole_simdiff.models.registry import needed_data_set, plugin_models, recbole_models
from recbole_simdiff.pipelines import diffuasr as augmentation
from recbole_simdiff.pipelines import report
from recbole_simdiff.runs.folder import start_logging
from recbole_simdiff.runs.identity import EVALUATION_KEYS
from recbole_simdiff.runs.processes import check_processes
from recbole_simdiff.runs.restore import evaluate, resumed_config
from recbole_simdiff.runs.result import RunResult, format_table
from recbole_simdiff.runs.run import run
from recbole_simdiff.serving import recommender as inference
from recbole_simdiff.tuning import search as tuning
from recbole_simdiff.tuning import space

DEFAULTS = {"model": "SimDiffRec", "dataset": "ml-100k"}

RENAMED = {"start": "from", "end": "to"}  # attributes of a namespace that cannot be called so

COMMANDS = (
    "train",
    "evaluate",
    "recommend",
    *command.COMMANDS,
    "tune",
    "augment",
    "prepare",
    "list",
)

PRINTING = ("evaluate", "recommend", "list")  # commands that leave nothing but what they print

FULL = (errno.ENOSPC, errno.EDQUOT)

MENDABLE = (  # by the user
    *FULL,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
)

EPILOG = """\
examples:
  %(prog)s --model=SimDiffRec --dataset=ml-100k                       train, select, test, save
  %(prog)s --model=SimDiffRec --dataset=amazon-beauty --cl_weight=0 --diff_weight=0
  %(prog)s --model=SASRec --dataset=ml-100k                           RecBole's own models likewise
  %(prog)s --model=DiffuASR --backbone=GRU4Rec --dataset=ml-100k      a backbone on augmented data
  %(prog)s --resume=saved/<run>                                       continue a stopped run
  %(prog)s --dataset=ml-1m --nproc=4                                  by four processes
  %(prog)s evaluate --checkpoint=saved/<run>
  %(prog)s recommend --checkpoint=saved/<run> --users=1,2 --k=10
  %(prog)s recommend --checkpoint=saved/<run> --input=- < histories.csv
  %(prog)s benchmark --models=SASRec,DuoRec --datasets=ml-100k --seeds=1,2,3
  %(prog)s ablate table3 --datasets=amazon-beauty --jobs=2            an experiment file, in part
  %(prog)s tune --model=SimDiffRec --dataset=amazon-beauty --trials=50   the best setting
  %(prog)s augment --dataset=ml-100k --output=FILE.inter            DiffuASR's data as a file
  %(prog)s prepare --source=movielens --input=ratings.dat --output=dataset/ml-1m
  %(prog)s list --explain --model=SimDiffRec --dataset=ml-100k        every value and its file
"""


class _Once(argparse.Action):
    """An option that has one value: a second one would silently replace the first."""

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
    """Options are named in full and, but for those that add up, have one value."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self.register("action", None, _Once)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; any other --key=value is a configuration key."""
    parser = _Parser(
        prog="run_recbole_simdiff.py",
        description="Diffusion and contrastive sequential recommendation on RecBole.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar=f"{{{','.join(COMMANDS)}}}")

    train = commands.add_parser(
        "train",
        help="train a model, select on validation, test once, save (the default)",
        description="Train a model. Every other --key=value overrides the configuration; "
        "'list --explain' shows all keys.",
    )
    _add_model_arguments(train)
    train.add_argument(
        "--resume", metavar="RUN", help="folder of a stopped run, or its last.safetensors"
    )
    train.add_argument(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="processes on this host that train together (default 1); under torchrun, which "
        "starts them on several hosts, it is not read",
    )

    test = commands.add_parser(
        "evaluate",
        help="evaluate a checkpoint on its data set",
        description="Validation and test of a checkpoint's model, as at the end of its training. "
        f"Of the configuration, these --key=value can be given: {', '.join(EVALUATION_KEYS)}; for "
        "DreamRec also those of its generation.",
    )
    test.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="run folder or .safetensors file"
    )

    recommend = commands.add_parser(
        "recommend",
        help="top-k items for users or histories, from a checkpoint alone",
        description="Histories are item ids as in the data set, oldest first. --input reads one a "
        'line: \'12,7,99\' (CSV), \'["12", "7"]\' or \'{"user": "u1", "items": ["12"]}\' (JSON).',
    )
    recommend.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder or file")
    users = recommend.add_mutually_exclusive_group()
    users.add_argument("--users", metavar="U,U", help="users of the training data set")
    users.add_argument("--all_users", action="store_true", help="all of them")
    recommend.add_argument(
        "--history", action="append", metavar="I,I", help="a history of item ids; may be repeated"
    )
    recommend.add_argument(
        "--input", metavar="FILE", help="file of histories, or - for standard input"
    )
    recommend.add_argument("--k", type=int, default=10, help="items per history (default 10)")
    recommend.add_argument(
        "--seen",
        choices=("drop", "keep"),
        default="drop",
        help="items of the history (default drop)",
    )
    recommend.add_argument(
        "--format", choices=("table", "json", "csv"), default="table", help="output (default table)"
    )
    recommend.add_argument("--use_gpu", choices=("true", "false"), default="true")

    command.add_parsers(commands)
    _add_tune(commands)

    augment = commands.add_parser(
        "augment",
        help="the data that DiffuASR trains on, as an atomic .inter file",
        description="Runs the stages of --model=DiffuASR before the last and writes all "
        "interactions, invented ones in front. Other --key=value override the configuration.",
    )
    _add_data_arguments(augment)
    augment.add_argument("--output", required=True, metavar="FILE", help="file to write")

    _add_prepare_arguments(
        commands.add_parser(
            "prepare",
            help="raw downloads to RecBole atomic files",
            description="Files are plain or .gz; their first line says which format of the source "
            "they have. Repeated visits stay in the file.",
        )
    )

    listing = commands.add_parser(
        "list", help="models, data sets and presets; --explain: every value"
    )
    _add_model_arguments(listing)
    listing.add_argument("--explain", action="store_true", help="each effective value and its file")
    return parser


def _add_tune(commands: Any) -> None:
    text = "search the best setting of a model by its validation score, then test it once"
    parser = commands.add_parser(
        "tune",
        help=text,
        description=f"{text.capitalize()}. The space is a RecBole parameter file, by default "
        "properties/tuning/<Model>.hyper; a key given here as --key=value is fixed and not "
        "searched. The same command continues what was interrupted; started several times, or on "
        "several machines with one --storage, the trials are shared. <output>/tune-<model>-"
        "<dataset>/ holds trials.csv and best.yaml.",
    )
    _add_model_arguments(parser)
    parser.add_argument("--space", metavar="FILE", help="RecBole parameter file")
    parser.add_argument("--engine", default="optuna", help="optuna (default), hyperopt or ray")
    parser.add_argument("--algo", help="bayes, random or exhaustive; default bayes, of ray random")
    parser.add_argument("--trials", type=int, default=50, metavar="N", help="default 50")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="trials at the same time (default 1)"
    )
    parser.add_argument("--storage", metavar="URL", help="Optuna's data base, default in <output>")
    parser.add_argument("--output", default="results", metavar="DIR", help="default results")
    parser.add_argument(
        "--no_pruning", action="store_true", help="let trials that look bad run to their end"
    )


def _add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, choices=raw_formats.SOURCES)
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="amazon: reviews (JSON lines) or ratings (CSV) of 2014; yelp: reviews; movielens: "
        "ratings.dat, ratings.csv, u.data; sequences: a line 'user item item ...' for each user",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR/NAME",
        help="makes DIR/NAME/NAME.inter, for --dataset=NAME --data_path=DIR",
    )
    parser.add_argument(
        "--titles",
        metavar="FILE",
        help="also makes NAME.item. amazon: metadata; yelp: businesses; movielens: movies.dat, "
        "movies.csv, u.item",
    )
    parser.add_argument(
        "--k_core",
        type=int,
        default=5,
        metavar="K",
        help="users and items with fewer interactions are taken out until none is left (default "
        "5, as in the papers; 0: none)",
    )
    date = "YYYY-MM-DD[ HH:MM:SS]"
    parser.add_argument("--from", dest="start", metavar="DATE", help=f"first date, UTC: {date}")
    parser.add_argument("--to", dest="end", metavar="DATE", help="last date; a day is meant whole")
    parser.add_argument(
        "--min_rating",
        type=float,
        metavar="R",
        help="least rating (default none, as in the papers)",
    )
    parser.add_argument(
        "--skip_malformed", action="store_true", help="count lines that cannot be read, and go on"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", "-m", help=f"default {DEFAULTS['model']}")
    _add_data_arguments(parser)


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", "-d", help=f"default {DEFAULTS['dataset']}")
    parser.add_argument(
        "--config_files",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="YAML files, later ones win",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 failed, 2 wrong input, 128 + signal stopped."""
    handler = {
        "train": _train,
        "evaluate": _evaluate,
        "recommend": _recommend,
        **dict.fromkeys(command.COMMANDS, command.handle),
        "tune": _tune,
        "augment": _augment,
        "prepare": _prepare,
        "list": _list,
    }
    several = distributed.launched()
    first = not several or os.environ["RANK"] == "0"
    failed = f"process {os.environ['RANK']}: error" if several else "error"
    _open_streams()
    try:
        namespace, rest = _parse(list(sys.argv[1:] if argv is None else argv))
        if namespace.command in PRINTING and sys.__stdout__ is None:
            raise UserError(f"standard output is closed, and {namespace.command} only prints")
        if several and namespace.command != "train":
            raise UserError(f"{namespace.command} is a command for one process; train is not")
        code = handler[namespace.command](namespace, parse_overrides(rest))
        sys.stdout.flush()
        return code
    except UserError as error:
        _tell(f"{failed}: {error}")
        return 2
    except (TrainingDiverged, OutOfMemory, errors.ProcessLost) as error:
        _tell(f"{failed}: {error}")
        return 1
    except Interrupted as stop:
        again = f"{_program()} --resume={shlex.quote(str(stop.run_dir))}"
        again += f" --nproc={os.environ['WORLD_SIZE']}" if several else ""
        again = "the same command" if stop.same_command else again
        if first:
            name = signal.Signals(stop.signum).name
            _tell(f"stopped by {name}; everything is saved. Continue with\n  {again}")
        return 128 + stop.signum
    except KeyboardInterrupt:
        if first:
            _tell("stopped; a run that had begun keeps its last finished epoch")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _abandon(sys.stdout, sys.stderr)
        return 128 + signal.SIGPIPE
    except (OSError, SafetensorError) as error:  # a folder that cannot be written, a full disk
        _tell(f"{failed}: {_of_system(error)}")
        _abandon(sys.stdout)
        return 2 if getattr(error, "errno", None) in MENDABLE else 1


def _open_streams() -> None:
    """Let a stream that the caller closed read nothing, and take what is written.

    A file opened later would get its number, and what libraries print would go into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _tell(text: str) -> None:
    """Say something on standard error, which may be a terminal that is gone."""
    with contextlib.suppress(OSError):
        print("\n".join(map(printable, text.split("\n"))), file=sys.stderr)


def _abandon(*streams: TextIO) -> None:
    """Let what is left in streams that cannot be written go nowhere when the program ends."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):  # no file, or closed
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _of_system(error: OSError | SafetensorError) -> str:
    """What the system refused, where, and what to do."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    place = os.fsdecode(error.filename or "standard output")
    text = f"{place}: {error.strerror}"
    if error.errno in FULL:
        text += "; make room there"
        folder = os.path.dirname(place)
        if folder and os.path.isfile(os.path.join(folder, LAST)):
            again = f"{_program()} --resume={shlex.quote(folder)}"
            text += f". The run goes on from its last saved state with {again}"
    elif error.errno in MENDABLE:
        text += "; see that it can be read and written, or name another place"
    return text


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What the command takes, and the other arguments."""
    start = arguments[0] if arguments else ""
    if start and not start.startswith("-") and start not in COMMANDS:
        near = difflib.get_close_matches(start, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
        raise UserError(f"{start!r} is neither a command nor of the form --key=value; {hint}")
    if start not in (*COMMANDS, "-h", "--help"):
        arguments = ["train", *arguments]
    namespace, rest = build_parser().parse_known_args(command.name_first(arguments))
    for key, value in vars(namespace).items():
        if value == "" or (key == "config_files" and "" in value):
            raise UserError(f"--{RENAMED.get(key, key)} is empty; give a value, or leave it out")
    return namespace, rest


def _program() -> str:
    """How this program was called: as the installed command, or as a script of some folder."""
    called = Path(sys.argv[0])
    if called.name == "recbole-simdiff":
        return called.name
    script = "run_recbole_simdiff.py"
    return f"python {shlex.quote(sys.argv[0]) if called.name == script else script}"


def _files(namespace: argparse.Namespace) -> list[str]:
    return [part for text in namespace.config_files for part in text.split(",") if part]


def _config(namespace: argparse.Namespace, overrides: dict[str, Any]) -> Config:
    files = _files(namespace)
    named: dict[str, Any] = {}
    for file in files:
        named |= {key: value for key, value in read_yaml(file).items() if key in DEFAULTS}
    model, dataset = (getattr(namespace, k) or named.get(k) or DEFAULTS[k] for k in DEFAULTS)
    return Config(model, dataset, files, overrides, COMMAND_LINE)


# Control characters, line separators, marks that turn the direction of writing, half characters.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text for a terminal: what would steer it is written as an escape, such as ``\\x1b``."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _train(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    resume = None
    if namespace.resume:
        for key in ("model", "dataset", "config_files"):
            if getattr(namespace, key):
                raise UserError(f"--{key} cannot be given with --resume: the checkpoint fixes it")
        resume = checkpoint.find(namespace.resume, LAST)
        config = resumed_config(resume, overrides, COMMAND_LINE)
    else:
        config = _config(namespace, overrides)
    several = distributed.launched()
    n = int(os.environ["WORLD_SIZE"]) if several else namespace.nproc
    check_processes(config, n)
    if n > 1 and not several:
        return distributed.launch(n)
    with distributed.group():
        if config.name == AUGMENTED and resume is None:
            result = augmentation.run_augmented(config)
        else:
            result = run(config, resume)
        if distributed.rank() > 0:
            return 0
    _print_result(result)
    _print_place(result)
    try:
        _show_users(result, config["show_users"])
    except UserError as error:  # the run itself succeeded
        print(error, file=sys.stderr)
    return 0


def _print_place(result: RunResult) -> None:
    print(f"checkpoints and result.json: {result.run_dir}")


def _print_result(result: RunResult) -> None:
    chosen = f"best epoch {result.best_epoch}, last {result.epochs - 1}"
    if result.best_epoch is None:
        chosen = f"nothing to validate on, the last of {result.epochs} epochs"
    print(
        f"\n{result.config['model']} on {result.config['dataset']}: {chosen}, "
        f"{result.seconds:.0f} s of training, peak memory {result.peak_memory_mb / 1024:.2f} GiB"
        + (f", on the GPU {gpu / 1024:.2f} GiB" if (gpu := result.peak_gpu_memory_mb) else "")
    )
    print(result.table())
    if result.sampling:
        seeds = result.sampling["seeds"]
        spread = {n: v for n, v in result.sampling.items() if n != "seeds"}
        rows = {k: {n: v[k] for n, v in spread.items()} for k in ("mean", "std")}
        print(f"\ntest, {next(iter(result.test))}, over sampling seeds {seeds[0]}..{seeds[-1]}")
        print(format_table({"test": rows}, result.digits))
    if result.augmentation:
        notes = result.augmentation
        if result.test and "baseline" in notes:
            print(f"\ntest of {notes['backbone']} by input length, without and with augmentation")
            print(report.format_report(result))
        if "quality" in notes:
            print(f"\n{report.format_quality(notes['quality'])}")


def _show_users(result: RunResult, n_users: int) -> None:
    if not n_users:
        return
    recommender = inference.load(result.run_dir, result.config["values"]["use_gpu"])
    for user in recommender.users[:n_users]:
        history = recommender.history(user)
        (found,) = recommender.recommend([history], k=10)
        print(f"\nuser {printable(user)}, newest of {len(history)}:")
        for item in history[-5:]:
            print(f"    {printable(recommender.title(item))}")
        print("  recommended next:")
        for rank, item in enumerate(found.items, start=1):
            print(f"  {rank:>2}  {printable(recommender.title(item))}")


def _evaluate(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    _print_result(evaluate(namespace.checkpoint, overrides, origin=COMMAND_LINE))
    return 0


class _Request(NamedTuple):
    name: str
    items: list[str]


def _recommend(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    if overrides:
        raise UserError(f"recommend does not know --{next(iter(overrides))}; see recommend --help")
    recommender = inference.load(namespace.checkpoint, namespace.use_gpu == "true")
    requests = list(_requests(namespace, recommender))
    if not requests:
        raise UserError(
            f"nothing to recommend to: {namespace.input} has no history"
            if namespace.input
            else "nothing to recommend to: give --users, --all_users, --history or --input"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown items are reported per history below
        found = recommender.recommend(
            [request.items for request in requests], namespace.k, namespace.seen == "drop"
        )
    for request, answer in zip(requests, found, strict=True):
        unknown, shown = len(answer.unknown), ", ".join(answer.unknown[:10])
        if unknown == len(request.items):
            note = (
                f"no known item, no recommendation: {shown or 'it is empty'} (items are separated "
                f"by commas: {','.join(recommender.item_ids[1:4])})"
            )
        elif not answer.items:
            note = "all items there are have been seen; --seen=keep ranks them, too"
        elif unknown:
            note = f"{unknown} unknown items left out: {shown}"
        else:
            continue
        print(printable(f"{request.name}: {note}"), file=sys.stderr)
    if all(len(a.unknown) == len(r.items) for r, a in zip(requests, found, strict=True)):
        raise UserError("no history has an item of the training data")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if namespace.format == "csv":
        writer.writerow(["history", "rank", "item", "score"])
    for request, answer in zip(requests, found, strict=True):
        ranked = list(enumerate(zip(answer.items, answer.scores, strict=True), start=1))
        if namespace.format == "json":
            print(json.dumps({"history": request.name, **answer._asdict()}))
        elif namespace.format == "csv":
            writer.writerows([request.name, rank, i, f"{s:.6f}"] for rank, (i, s) in ranked)
        else:
            print(printable(request.name))
            for rank, (item, score) in ranked:
                print(f"  {rank:>3}  {score:9.4f}  {printable(recommender.title(item))}")
    return 0


def _ids(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _requests(
    namespace: argparse.Namespace, recommender: inference.Recommender
) -> Iterator[_Request]:
    for user in recommender.users if namespace.all_users else _ids(namespace.users or ""):
        yield _Request(user, recommender.history(user))
    for number, text in enumerate(namespace.history or (), start=1):
        yield _Request(f"history {number}", _ids(text))
    try:
        if namespace.input == "-":
            if sys.__stdin__ is None:
                raise UserError("standard input is closed; give --input=FILE")
            yield from _read_histories(sys.stdin, "standard input")
        elif namespace.input:
            with open(namespace.input, encoding="utf-8-sig") as file:
                yield from _read_histories(file, namespace.input)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {namespace.input}: {error}") from None


def _read_histories(lines: Iterable[str], source: str) -> Iterator[_Request]:
    """One history a line: CSV of item ids, a JSON list, or a JSON object with ``items``."""
    for number, line in enumerate(lines, start=1):
        line, name = line.removeprefix("\ufeff").strip(), f"line {number}"
        if not line:
            continue
        try:
            yield _request(line, name)
        except RecursionError:
            raise UserError(f"{source}, line {number}: nested too deep") from None
        except (ValueError, csv.Error) as error:
            raise UserError(f"{source}, line {number}: {error}") from None


def _request(line: str, name: str) -> _Request:
    """The history of a line.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if line[0] not in "[{":
        return _Request(name, [cell.strip() for cell in next(csv.reader([line])) if cell.strip()])
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    except ValueError:  # Python reads no longer ones
        raise ValueError("a number of more than 4300 digits; write ids as text") from None
    items = value.get("items") if isinstance(value, dict) else value
    if not isinstance(items, list) or any(isinstance(item, list | dict) for item in items):
        raise ValueError('expected [...] or {"items": [...]}, of ids')
    name = str(value.get("user", name)) if isinstance(value, dict) else name
    return _Request(name, [str(item) for item in items])


def _tune(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    start_logging(None)
    config = _config(namespace, overrides)
    place = Path(namespace.space) if namespace.space else space.find_space(config.name)
    search = tuning.new_search(
        config,
        space.read_space(place),
        _files(namespace),
        overrides,
        engine=namespace.engine,
        algo=namespace.algo,
        trials=namespace.trials,
        jobs=namespace.jobs,
        pruning=not namespace.no_pruning,
        storage=namespace.storage,
        output=Path(namespace.output),
    )
    trials = tuning.tune(search)
    print(tuning.summary(search, trials))
    result = tuning.test_best(search, search.ranked(trials)[0])
    _print_result(result)
    _print_place(result)
    return 0


def _augment(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    namespace.model = AUGMENTED
    path = Path(namespace.output)
    if path.suffix != ".inter":
        raise UserError(f"--output={path} must end in .inter, RecBole's atomic file")
    config = _config(namespace, overrides)
    if "LS" not in config["eval_args"]["split"]:
        raise UserError(
            f"eval_args={config['eval_args']}: only a leave-one-out split (LS) of the file would "
            "hold out what is held out here"
        )
    augmentation.export(augmentation.augment(config), path)
    print(path)
    print("read it with rm_dup_inter: ~ and without filters by time", file=sys.stderr)
    return 0


def _prepare(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    if overrides:
        raise UserError(f"prepare does not know --{next(iter(overrides))}; see prepare --help")
    done = prepare.prepare(
        namespace.source,
        namespace.input,
        namespace.output,
        k=namespace.k_core,
        selection=prepare.select(namespace.start, namespace.end, namespace.min_rating),
        titles=namespace.titles,
        skip_malformed=namespace.skip_malformed,
        overwrite=namespace.overwrite,
    )
    if done.malformed:
        shown = "\n  ".join(done.shown)
        print(
            f"{done.malformed:,} malformed lines left out, among them\n  {shown}", file=sys.stderr
        )
    print(done.report())
    return 0


def _list(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    if namespace.explain:
        rows = _config(namespace, overrides).explain()
        width = max(len(key) for key, _, _ in rows)
        for key, value, origin in rows:
            print(f"{key.ljust(width)}  {value!s:<32}  {origin}")
        return 0
    given = [key for key in (*DEFAULTS, "config_files") if getattr(namespace, key)]
    if given or overrides:
        raise UserError(f"list reads --{[*given, *overrides][0]} with --explain only")
    models = plugin_models()
    trained = sorted(name for name in recbole_models() if needed_data_set(name) is None)
    print("models:           ", ", ".join(sorted(models)))
    print("RecBole's models: ", ", ".join(trained))
    print(
        "data sets with settings here:",
        ", ".join(p.stem for p in sorted((properties_dir() / "dataset").glob("*"))),
    )
    print(f"augmented data:    {AUGMENTED}, for any of them: --model={AUGMENTED} --backbone=NAME")
    lineages = {name: [base.__name__ for base in models[name].__mro__] for name in sorted(models)}
    for model, names in (lineages | {AUGMENTED: [AUGMENTED]}).items():
        print(f"presets of {model}: {', '.join(['paper', *sorted(preset_files(names))])}")
    return 0
