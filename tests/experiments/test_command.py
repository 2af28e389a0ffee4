"""The commands end to end: files, text, exit codes."""

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_simdiff.cli import main as cli
from recbole_simdiff.cli.experiments import _stem
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import KEPT, REMOVED
from recbole_simdiff.evaluation.rankings import LISTS, RANKS
from recbole_simdiff.experiments import analysis, execute, plots
from recbole_simdiff.experiments.embeddings import Sequences, sequences
from recbole_simdiff.experiments.execute import LINES
from recbole_simdiff.experiments.plots import FORMATS
from recbole_simdiff.runs import identity
from recbole_simdiff.runs.result import RESULT, read_result
from tests.conftest import write_inter
from tests.experiments.conftest import tiny

MAGIC = {"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}


@pytest.fixture
def main(data_path: Path, tmp_path: Path, capsys: Any) -> Any:
    """main(argument, ..., models, key=value) -> (exit code, output, errors), on toy, in seconds.

    Without models nothing is changed but where things are.
    """

    def start(
        *arguments: str, models: tuple[str, ...] = ("SimDiffRec",), **values: Any
    ) -> tuple[int, str, str]:
        own = {"data_path": str(data_path), "checkpoint_dir": str(tmp_path / "saved")}
        given = [
            f"--{k}={json.dumps(v)}"
            for k, v in ((tiny(*models) if models else {}) | own | values).items()
        ]
        code = cli.main([*arguments, f"--output={tmp_path / 'results'}", *given])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return start


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Where main leaves what it writes."""
    return tmp_path / "results" / "parts"


def drawn(folder: Path, name: str) -> None:
    """The figure is there in every format, and not empty."""
    for suffix in FORMATS:
        content = (folder / f"{name}.{suffix}").read_bytes()
        assert content.startswith(MAGIC[suffix])
        assert len(content) > 3000


def test_an_ablation(main: Any, write: Any, files: Path) -> None:
    path = write(figures=["curves", "cost", "embeddings"], settings=tiny("SimDiffRec"))
    code, out, _ = main("ablate", path, models=())
    assert code == 0
    assert (files / "table.md").read_text().strip() in out
    for protocol in (KEPT, REMOVED):
        assert f"**Parts. toy, test, leave-one-out by time, all items ranked, {protocol}" in out
        assert f"**toy, {protocol}: against SimDiffRec.**" in out
    assert r"\begin{tabular}" in (files / "table.tex").read_text()
    rows = list(csv.DictReader((files / "table.csv").open()))
    lines = [json.loads(line) for line in (files / LINES).read_text().splitlines()]
    for line in lines:
        for protocol, metrics in line["test"].items():
            for metric, value in metrics.items():
                (row,) = (
                    r
                    for r in rows
                    if (r["row"], r["seed"], r["split"], r["protocol"], r["metric"])
                    == (line["row"], str(line["seed"]), "test", protocol, metric)
                )
                assert float(row["value"]) == value
    compared = list(csv.DictReader((files / "significance.csv").open()))
    assert {r["metric"] for r in compared} == {"hit@5", "ndcg@5"}
    assert {r["users"] for r in compared} == {"5"}
    for name in ("history-kept", "history-removed", "curves", "cost", "embeddings"):
        drawn(files, f"parts-toy-{name}")


def test_a_sweep(main: Any, write: Any, files: Path) -> None:
    path = write(
        kind="sweep",
        rows={"SimDiffRec": {}},
        sweep={"k_sample": [2, 3], "aug_position": ["confidence", "random"]},
        settings=tiny("SimDiffRec"),
    )
    code, out, _ = main("sweep", path, models=())
    assert code == 0
    for swept in ("k_sample=2", "k_sample=3", "aug_position=random"):
        assert f"| SimDiffRec, {swept} | 2 |" in out
    for protocol in ("history-kept", "history-removed"):
        drawn(files, f"parts-toy-{protocol}")
    assert not (files / "significance.csv").exists()


def test_a_benchmark_without_a_file(main: Any, tmp_path: Path) -> None:
    models = ("SASRec", "CL4SRec")
    arguments = ["benchmark", f"--models={','.join(models)}", "--datasets=toy", "--seeds=1"]
    code, out, err = main(*arguments, models=models, topk=[5, 2])
    assert code == 0, err
    assert "| row | seeds | hit@5 | hit@2 | ndcg@5 | ndcg@2 |" in out
    assert "against SASRec" in out
    lines = (tmp_path / "results" / "benchmark-SASRec-CL4SRec" / LINES).read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [*models]


def test_statistics(main: Any, write: Any, files: Path, data_path: Path, capsys: Any) -> None:
    path = write(kind="statistics", rows=None, metrics=None, datasets=["toy", "nowhere"])
    where = [f"--output={files.parent}", f"--data_path={data_path}"]

    def code(*arguments: str) -> int:
        return cli.main(["benchmark", path, *where, *arguments])

    assert code("--datasets=nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
    assert not files.exists()
    assert code("--datasets=toy") == 0
    assert not (files / "table.md").exists()  # of the whole, which was not asked for
    assert code() == 0
    text = (files / "table.md").read_text()
    assert "| toy | here | 6 | 12 | 30 | 5.00 | 58.33 |" in text
    assert "| nowhere | here | " in text


def test_statistics_of_repeated_pairs_and_of_ready_made_prefixes(
    write: Any, files: Path, data_path: Path, capsys: Any
) -> None:
    """A repeated pair counts once for sparsity; prefixes say nothing about whole histories."""
    write_inter(data_path, "again", {"a": ["x", "y", "x", "x"], "b": ["y", "z", "y"]})
    where = [f"--output={files.parent}", f"--data_path={data_path}"]
    path = write(kind="statistics", rows=None, metrics=None, datasets=["again"])
    assert cli.main(["benchmark", path, *where]) == 0
    assert "| again | here | 2 | 3 | 7 | 3.50 | 33.33 |" in capsys.readouterr().out

    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    for name in ("train", "valid", "test"):
        (data_path / "again" / f"again.{name}.inter").write_text(header + "u\tx y\tz\n")
    columns = "--load_col={inter: [user_id, item_id_list, item_id]}"
    ready = ["--benchmark_filename=[train, valid, test]", columns]
    assert cli.main(["benchmark", path, *where, *ready]) == 0
    assert "| again | here | 1 | 3 | 3 | - | - |" in capsys.readouterr().out


def test_a_failed_run_shows_in_the_report_and_in_the_exit_code(main: Any, write: Any) -> None:
    rows = {"SimDiffRec": {}, "bad": {"model": "SimDiffRec", "learning_rate": 1e30}}
    code, out, _ = main("ablate", write(rows=rows, seeds=[1]), epochs=3)
    assert code == 1
    assert "1 runs failed, 0 were not run." in out
    assert "- bad on toy, seed 1: TrainingDiverged" in out
    assert "| SimDiffRec | 1 |" in out


def test_part_of_an_experiment(main: Any, write: Any, files: Path) -> None:
    code, out, _ = main("ablate", write(), "--models=w/o both", "--seeds=5")
    assert code == 0
    (line,) = (files / LINES).read_text().splitlines()
    assert (json.loads(line)["row"], json.loads(line)["seed"]) == ("w/o both", 5)
    assert not (files / "table.md").exists()  # which is of the whole experiment
    (part,) = files.glob("part-*/table.md")
    assert part.read_text().strip() in out
    assert "epochs=1" in part.read_text()


def test_figures_and_analyses_of_what_is_there(
    main: Any, write: Any, files: Path, data_path: Path, monkeypatch: Any
) -> None:
    """Neither trains anything."""
    path = write(seeds=[1], settings=tiny("SimDiffRec"))
    assert main("ablate", path, models=())[0] == 0
    code, out, _ = main("plot", path, "--figures=curves", models=())
    assert code == 0
    assert out.split() == [
        str(files / f"parts-toy-{name}.{suffix}")
        for name in ("history-kept", "history-removed", "curves")
        for suffix in FORMATS
    ]
    figures = out
    code, out, _ = main("analyze", path, "--by=length,train_count,views", models=())
    assert code == 0
    assert "**SimDiffRec on toy: test by length, history kept**" in out
    assert "| hard negative, random |" in out
    assert (files / "parts-analysis.md").read_text().strip() in out
    code, out, _ = main("analyze", path, "--models=w/o both", models=())
    assert code == 0
    assert "w/o both" in out
    assert "**SimDiffRec" not in out
    rows = list(csv.DictReader((files / "parts-analysis.csv").open()))
    lines = [json.loads(line) for line in (files / LINES).read_text().splitlines()]
    for line in lines:
        own = [r for r in rows if r["row"] == f"{line['row']} on toy"]
        own = [r for r in own if r["table"] == f"test by length, {KEPT}"]
        n, hits = (
            {r["group"]: float(r["value"]) for r in own if r["measure"] == name}
            for name in ("rows", "hit@5")
        )
        total = sum(n[group] * hits[group] for group in n) / sum(n.values())
        assert total == pytest.approx(line["test"][KEPT]["hit@5"])
    code, _, err = main("plot", path, "--seeds=9", models=())
    assert code == 2
    assert "has no finished run of parts" in err
    # What shows results trains nothing, so neither other code nor missing data stop it.
    before = (files / "parts-analysis.csv").read_text()
    monkeypatch.setattr(identity, "source_checksum", lambda: "of tomorrow")
    shutil.rmtree(data_path / "toy")
    assert main("plot", path, "--figures=curves", models=())[:2] == (0, figures)
    code, _, err = main("analyze", path, "--by=length,train_count", models=())
    assert code == 0
    assert "2 of these 2 runs were made with other code of this package or other data" in err
    again = (files / "parts-analysis.csv").read_text()
    assert [row for row in before.splitlines() if "test by" in row] == again.splitlines()[1:]


def test_figures_of_single_runs(main: Any, write: Any, tmp_path: Path, capsys: Any) -> None:
    assert main("ablate", write(seeds=[1]))[0] == 0
    runs = ",".join(str(path.parent) for path in (tmp_path / "saved").glob(f"*/{RESULT}"))
    code = cli.main(["plot", f"--runs={runs}", f"--output={tmp_path / 'figures'}"])
    assert code == 0
    written = capsys.readouterr().out.split()
    assert len(written) == 6
    assert all(Path(path).stat().st_size > 3000 for path in written)


def change_result(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    result = json.loads((run / RESULT).read_text())
    change(result)
    (run / RESULT).write_text(json.dumps(result))


def test_figures_of_runs_that_cannot_be_shown_together(
    main: Any, write: Any, tmp_path: Path, capsys: Any
) -> None:
    assert main("ablate", write(seeds=[1]))[0] == 0
    one, other = (path.parent for path in sorted((tmp_path / "saved").glob(f"*/{RESULT}")))
    capsys.readouterr()

    def fails(figure: str, message: str) -> None:
        target = tmp_path / "figures"
        arguments = [f"--runs={one},{other}", f"--figures={figure}", f"--output={target}"]
        assert cli.main(["plot", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not target.exists()

    change_result(other, lambda r: r.update(test={}))
    fails("cost", f"{other} was not tested")
    change_result(other, lambda r: r["config"].update(dataset="elsewhere"))
    fails("embeddings", f"{other} has elsewhere: plot them separately")
    change_result(other, lambda r: r["config"]["values"].update(valid_metric="MRR@5"))
    fails("curves", f"{other} has MRR@5: plot them separately")


def test_runs_of_one_name_are_drawn_apart(
    main: Any, write: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    assert main("ablate", write(seeds=[1]))[0] == 0
    runs = [path.parent for path in sorted((tmp_path / "saved").glob(f"*/{RESULT}"))]
    for number, run in enumerate(runs):
        (tmp_path / str(number)).mkdir()
        run.rename(tmp_path / str(number) / "run")
    change_result(tmp_path / "1" / "run", lambda r: r.update(augmentation={"seconds": 1e4}))
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "cost", lambda points, metric, path: drawn.update(points) or [])
    places = f"--runs={tmp_path / '0' / 'run'},{tmp_path / '1' / 'run'}"
    assert cli.main(["plot", places, "--figures=cost", f"--output={tmp_path}"]) == 0
    ((plain, _),), ((augmented, _),) = drawn.values()
    assert augmented > 1e4 > plain


def test_files_of_other_runs_have_other_names(tmp_path: Path) -> None:
    long = [f"SimDiffRec-amazon-beauty-20261121-0000{n:02}-1a2b" for n in range(3)]
    stems = {_stem([long[0], other], tmp_path) for other in long[1:]}
    assert len(stems) == 2
    assert all(len(Path(stem).name) < 100 for stem in stems)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmark"], "benchmark needs the name of an experiment, or --models"),
        (["ablate"], "ablate needs the name of an experiment\n"),
        (["plot"], "plot needs the name of an experiment, or --models or --runs"),
        (["analyze"], "analyze needs the name of an experiment, or --models or --runs"),
        (
            ["benchmark", "--models=SASRec", "--nproc=2"],
            "line: nproc cannot be a setting of experiments",
        ),
        (["benchmark", "--models=SASRec", "--topk=1.5"], "topk"),
        (["benchmark", "--models=SASRec", "--topk=[7]"], "valid_metric=NDCG@10"),
        (["sweep", "table3"], "table3 is of kind ablation; use: ablate table3"),
        (["ablate", "table3", "--jobs=0"], "--jobs=0 must be at least 1"),
        (["ablate", "table3", "--seeds=a"], "--seeds: seeds=['a'] must be"),
        (["ablate", "tabel3"], "neither a .yaml file nor one of"),
        (["ablate", "table3", "--modles=SASRec"], "unknown key 'modles'"),
        (["analyze", "table3", "--by=colour"], "--by=colour is not one of length"),
        (["plot", "table3", "--figures=pie"], "--figures: 'pie' is not one of"),
        (
            ["ablate", "table3", "--seed=3"],
            "the command line: seed cannot be a setting of",
        ),
        (
            ["benchmark", "temporal", "--model=SASRec"],
            "model cannot be a setting of experiments: use",
        ),
        (["benchmark", "--models=SASRec", "--config_files=gone.yaml"], "cannot read the conf"),
        (["plot", "--runs=a", "--config_files=gone.yaml"], "cannot read the configuration file"),
        (["plot", "--runs=a", "--epochs=3"], "plot --runs does not know --epochs"),
        (["analyze", "table3", "--runs=a"], "--experiment cannot be given with --runs"),
        (["plot", "--runs=nowhere"], "is not the result of a finished run"),
        (["analyze", "--runs=nowhere"], "--save_rankings=True"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: Any, tmp_path: Path) -> None:
    """One message, exit code 2, and nothing is written."""
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["models", "datasets", "seeds", "runs", "figures", "by"])
@pytest.mark.parametrize(
    ("value", "message"), [("", "is empty"), (" ,", "is empty"), ("a,b,a", "a twice")]
)
def test_options_that_name_nothing_or_the_same_twice(
    option: str, value: str, message: str, capsys: Any
) -> None:
    command = "analyze" if option == "by" else "plot"
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "table3", f"--{option}={value}"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_columns_follow_the_cutoffs_that_are_asked_for(data_path: Path, capsys: Any) -> None:
    """Of a benchmark without a file; those of a file are its own."""
    options = ["--topk=[20,3]", "--valid_metric=NDCG@20", f"--data_path={data_path}"]
    given = [*options, "--datasets=toy", "--output=file"]
    Path("file").touch()  # which comes after everything else is found right, before any training
    assert cli.main(["benchmark", "--models=SASRec", *given]) == 2
    assert "file/benchmark-SASRec/runs.jsonl cannot be written" in capsys.readouterr().err
    assert cli.main(["ablate", "table3", *given]) == 2
    assert "hit@5 is not computed" in capsys.readouterr().err


# ---------------------------------------------------------------------- analyses


@pytest.mark.parametrize("command", ["benchmark", "ablate", "sweep"])
def test_config_files_are_settings_of_all_runs(
    write: Any, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later files win, and what is typed wins over them; as for one training."""
    content: dict[str, Any] = {"kind": {"ablate": "ablation"}.get(command, command)}
    if command == "sweep":
        content |= {"rows": {"SimDiffRec": {}}, "sweep": {"k_sample": [2, 3]}}
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("learning_rate: 0.5\ntau: 0.5\nk_noise: 3\n")
    second.write_text("tau: 0.6\nepochs: 7\n")
    made: list[Any] = []

    def plan(experiment: Any) -> Any:
        made.extend(experiment.runs())
        raise UserError("enough")

    monkeypatch.setattr(execute, "plan", plan)
    files = f"--config_files={first},{second}"
    assert cli.main([command, write(**content), files, "--epochs=1"]) == 2
    wanted = {"learning_rate": 0.5, "tau": 0.6, "k_noise": 3, "epochs": 1}
    assert len(made) >= 2
    assert all(wanted.items() <= run.settings.items() for run in made)
    second.write_text("seed: 3\n")
    assert cli.main([command, write(**content), files]) == 2


@pytest.fixture
def finished(experiment: Any, tmp_path: Path) -> Any:
    """finished(model, key=value, ...) -> folder of a run."""

    def make(model: str, **settings: Any) -> Path:
        (one,) = execute.plan(experiment(rows={model: settings}, seeds=[1]))
        execute.execute([one], tmp_path / LINES)
        return one.run_dir

    return make


def test_rankings_give_the_metrics_of_the_run(finished: Any) -> None:
    folder = finished("SimDiffRec")
    result = read_result(folder)
    for protocol in (KEPT, REMOVED):
        (whole,) = (
            {m: sum(g["rows"] * g[m] for g in found.values()) / 5 for m in ("hit@5", "ndcg@5")}
            for found in [analysis.by_group([folder], "length", ("hit@5", "ndcg@5"), protocol)]
        )
        assert whole == pytest.approx({m: result.test[protocol][m] for m in whole})


def test_rankings_are_in_the_ids_of_the_data_set(finished: Any) -> None:
    folder = finished("SimDiffRec")
    rows = {row["user"]: row for row in csv.DictReader((folder / RANKS).open())}
    # User -> last item, how many come before (at most four are read), and in how many training
    # histories it is.
    wanted = {"a": ("i9", 4, 1), "b": ("i10", 4, 1), "c": ("i1", 4, 2), "d": ("i11", 3, 1)}
    wanted |= {"e": ("i7", 2, 2)}
    assert rows.keys() == wanted.keys()
    for user, (item, length, count) in wanted.items():
        assert rows[user]["item"] == item
        assert int(rows[user]["length"]) == length
        assert int(rows[user]["train_count"]) == count, user
        assert 1 <= int(rows[user]["rank_removed"]) <= int(rows[user]["rank_kept"]) <= 12
    with gzip.open(folder / LISTS, "rt") as file:
        lists = list(csv.DictReader(file))
    for user, row in rows.items():
        for history in ("kept", "removed"):
            first = [r["item"] for r in lists if (r["user"], r["history"]) == (user, history)]
            n = 4 if (user, history) == ("a", "removed") else 5  # a has had 8 of 12 items before
            assert len(first) == len(set(first)) == n
            rank = int(row[f"rank_{history}"])
            assert (first[rank - 1] == row["item"]) if rank <= 5 else row["item"] not in first


@pytest.mark.parametrize("model", ["SimDiffRec", "CaDiRec", "ECLSR"])
def test_quality_of_views(finished: Any, model: str) -> None:
    folder = finished(model)
    found = analysis.views(folder)
    own = {name: values for name, values in found.items() if not name.endswith(", random")}
    assert len(found) == 2 * len(own) > 0
    for values in found.values():
        assert 0 <= values["replaced"] <= 1
        assert 0 <= values["same row"] <= 1
        assert -1.001 <= values["to original"] <= 1.001
    assert analysis.views(folder, folder) == found  # its own table is the default


def test_views_by_hand() -> None:
    """Two rows: one item replaced by its opposite, none replaced."""
    table = torch.tensor([[0.0, 0], [1, 0], [0, 1], [-1, 0]])
    source = torch.tensor([[1, 2, 0], [2, 2, 2]])
    view = torch.tensor([[3, 2, 0], [2, 2, 2]])
    found = analysis._means(analysis._sums(source, view, table).double())
    assert found == pytest.approx(
        {"replaced": 1 / 5, "same row": 1 / 2, "to original": -1.0, "to context": 0.0}
    )


def test_a_model_without_augmented_views_is_refused(finished: Any) -> None:
    with pytest.raises(UserError, match="model=CL4SRec replaces no items"):
        analysis.views(finished("CL4SRec"))


def test_similarity_within_sequences_by_hand() -> None:
    table = np.array([[0, 0], [1, 0], [0, 1], [-1, 0]], dtype=np.float32)
    number = {"x": 1, "y": 2, "z": 3}
    found = Sequences(table, number, {"u": ["x", "y", "z"], "v": ["x", "y"], "w": ["x"]})
    # u: pairs 0, -1, 0; v: 0; w has no pair.
    assert found.similarity() == pytest.approx((-1 / 3 + 0) / 2)
    assert found.shuffled(0).histories.keys() == found.histories.keys()
    assert found.shuffled(0).similarity() == found.shuffled(0).similarity()


def test_sequences_of_a_run(finished: Any) -> None:
    found = sequences(finished("SimDiffRec"))
    assert found.histories["b"] == ["i2", "i3", "i5", "i1", "i10"]
    assert np.linalg.norm(found.vectors([["i1", "i2"]]), axis=1) == pytest.approx([1, 1])
    assert found.sample(3, seed=0) == found.sample(3, seed=0)
    assert set(found.sample(9, seed=0)) == {"a", "b", "c"}  # those with five items
