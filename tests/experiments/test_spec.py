"""What an experiment file says, and what it may not say."""

from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff.config.layers import properties_dir
from recbole_simdiff.errors import UserError
from recbole_simdiff.experiments import spec
from recbole_simdiff.experiments.checks import check
from recbole_simdiff.experiments.spec import load_experiment, plain_experiment, select

SHIPPED = sorted(path.stem for path in (properties_dir() / "experiment").glob("*.yaml"))


def test_rows_times_data_sets_times_seeds(write: Any) -> None:
    runs = load_experiment(write(datasets=["toy", "ml-100k"])).runs()
    assert [(r.dataset, r.row, r.seed) for r in runs] == [
        (dataset, row, seed)
        for dataset in ("toy", "ml-100k")
        for row in ("SimDiffRec", "w/o both")
        for seed in (1, 2)
    ]
    assert {r.model for r in runs} == {"SimDiffRec"}
    assert runs[2].overrides() == {"cl_weight": 0, "diff_weight": 0, "seed": 1}


def test_a_sweep_moves_one_key_at_a_time(write: Any) -> None:
    sweep = {"k_noise": [1, 2], "cl_weight": [0.1]}
    runs = load_experiment(write(kind="sweep", sweep=sweep, seeds=[7])).runs()
    first = [r.swept for r in runs if r.row == "SimDiffRec"]
    assert first == [("k_noise", 1), ("k_noise", 2), ("cl_weight", 0.1)]
    assert runs[0].overrides() == {"k_noise": 1, "seed": 7}
    assert str(runs[0]) == "SimDiffRec, k_noise=1 on toy, seed 7"


def test_the_row_wins_over_the_settings_and_the_command_over_both(write: Any) -> None:
    path = write(settings={"epochs": 5, "cl_weight": 0.3, "tau": 0.5})
    experiment = select(load_experiment(path), command={"tau": 0.7})
    plain, without = experiment.runs()[0], experiment.runs()[2]
    assert plain.settings == {"epochs": 5, "cl_weight": 0.3, "tau": 0.7}
    assert without.settings == {"epochs": 5, "cl_weight": 0, "diff_weight": 0, "tau": 0.7}


def test_a_selection(write: Any) -> None:
    whole = load_experiment(write(reference="w/o both"))
    part = select(whole, models=["SimDiffRec"], datasets=["ml-100k"], run_seeds=[3])
    assert [(r.row, r.dataset, r.seed) for r in part.runs()] == [("SimDiffRec", "ml-100k", 3)]
    assert part.reference == "SimDiffRec"
    assert select(whole).reference == "w/o both"


def test_models_without_a_file() -> None:
    experiment = plain_experiment(["SASRec", "DuoRec"], ["ml-100k"], [1])
    assert [r.model for r in experiment.runs()] == ["SASRec", "DuoRec"]
    assert experiment.reference == "SASRec"


PUBLISHED: dict[str, Any] = {
    "source": "x",
    "protocol": "history kept",
    "metrics": ["hit@5"],
    "values": {"toy": {"SASRec": [0.1]}},
}


def test_published_numbers(write: Any) -> None:
    """A data set without any is one for which nothing is cited."""
    cited = PUBLISHED | {"values": {"toy": {"SASRec": [0.1]}, "ml-100k": None}}
    (found,) = load_experiment(write(cited=[cited])).cited
    assert found.rows("toy") == {"SASRec": {"hit@5": 0.1}}
    assert found.rows("ml-100k") == found.rows("yelp") == {}
    assert load_experiment(write(cited=[])).cited == ()


def test_a_title_that_is_left_empty(write: Any) -> None:
    path = Path(write())
    path.write_text(path.read_text().replace("title: Parts", "title:"))
    with pytest.raises(UserError, match="lacks 'title'"):
        load_experiment(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "bench"}, "kind='bench' is not one of benchmark, ablation, sweep, statistics"),
        ({"title": None}, "lacks 'title'"),
        ({"dataset": ["toy"]}, "unknown key 'dataset'; did you mean datasets?"),
        ({"rows": {}}, "kind=ablation needs rows"),
        ({"rows": ["SimDiffRec"]}, "kind=ablation needs rows, a mapping"),
        ({"rows": {"SimDiffRec": 3}}, "row SimDiffRec must be a mapping"),
        ({"kind": "sweep"}, "kind=sweep needs sweep"),
        ({"sweep": {"k_noise": [1]}}, "kind=ablation has no sweep"),
        ({"kind": "sweep", "sweep": {"k_noise": 1}}, "sweep of k_noise must be a list"),
        ({"seeds": [1, 1]}, "must be different whole numbers"),
        ({"seeds": [0.5]}, "must be different whole numbers"),
        ({"seeds": 1}, "seeds must be a list"),
        ({"datasets": []}, "datasets must be a list with at least one ele"),
        ({"reference": "SASRec"}, "reference='SASRec' is not one of SimDiffRec, w/o both"),
        ({"figures": ["pie"]}, "'pie' is not one of curves, cost, embeddings"),
        (
            {"cited": [{"source": "x"}]},
            "each entry of cited needs exactly metrics, protocol",
        ),
        (
            {"cited": [{"source": "x", "protocol": "kept", "metrics": [], "values": {}}]},
            "protocol='kept' is not one of history kept, history removed",
        ),
        (
            {"cited": [PUBLISHED | {"values": {"toy": {"SASRec": [0.1, 0.2]}}}]},
            "SASRec on toy needs one number for each metric",
        ),
        ({"cited": 5}, "cited must be a list"),
        ({"cited": True}, "cited must be a list with at least one element, not True"),
        ({"cited": {"source": "x"}}, "cited must be a list with at least one element, not {"),
        ({"cited": [None]}, "each entry of cited needs"),
        ({"cited": [PUBLISHED | {"values": {"toy": {"a|b": [0.1]}}}]}, "'a|b' is shown in tables"),
        ({"cited": [PUBLISHED | {"source": "a\nb"}]}, r"'a\nb' is shown in tables"),
        ({"rows": {"a|b": {"model": "SimDiffRec"}}}, "'a|b' is shown in tables and must have no |"),
        ({"rows": {"a\nb": {"model": "SimDiffRec"}}}, "no line break"),
        ({"title": ""}, "lacks 'title'"),
        ({"datasets": ["toy", "toy"]}, "datasets=['toy', 'toy'] must be different"),
        ({"settings": {"nproc": 2}}, "nproc cannot be a setting of experiments: each run is one"),
        ({"metrics": ["HR@5"]}, "metric 'HR@5' must be one of hit, recall, ndcg, mrr at a cutoff"),
        ({"metrics": ["precision@5"]}, "metric 'precision@5' must be one of"),
        ({"rows": {"a, b": {"model": "SimDiffRec"}}}, "row 'a, b' must have no comma"),
        (
            {"rows": {"SimDiffRec": {"seed": 3}}},
            "seed cannot be a setting of experiments: use",
        ),
        (
            {"settings": {"model": "SASRec"}},
            "model cannot be a setting of experiments: use",
        ),
        ({"kind": "sweep", "sweep": {"seed": [1]}}, "seed cannot be a setting"),
        (
            {"kind": "sweep", "sweep": {"topk": [[5], [10]]}},
            "values of a sweep are numbers or text",
        ),
    ],
)
def test_mistakes_in_a_file(write: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_experiment(write(**changes))
    assert message in str(error.value)


def test_a_name_that_is_no_experiment() -> None:
    with pytest.raises(UserError, match=r"neither a .yaml file nor one of .*table2"):
        load_experiment("table9")


def test_a_row_that_is_not_there(write: Any) -> None:
    with pytest.raises(UserError, match="--models: 'SASRec' is not a row of parts"):
        select(load_experiment(write()), models=["SASRec"])


def test_a_swept_key_cannot_be_fixed(write: Any) -> None:
    experiment = load_experiment(write(kind="sweep", sweep={"k_noise": [1]}))
    with pytest.raises(UserError, match="--k_noise is swept by parts"):
        select(experiment, command={"k_noise": 3})


def test_an_impossible_run_is_named_before_any_is_started(experiment: Any) -> None:
    rows = {"SimDiffRec": {}, "w/o both": {"model": "SimDiffRec", "aug_ratio": 99}}
    with pytest.raises(UserError, match=r"w/o both on toy, seed 1: aug_ratio=99"):
        check(experiment(rows=rows))


@pytest.mark.parametrize("key", ["model", "dataset", "seed", "save_rankings"])
def test_the_command_line_cannot_contradict_the_experiment(write: Any, key: str) -> None:
    """--model=X would put the numbers of one model under the labels of all."""
    with pytest.raises(UserError, match=f"overrides: {key} cannot be a setting"):
        select(load_experiment(write()), command={key: 1})


def test_what_cannot_be_ranked_is_refused(experiment: Any) -> None:
    split = {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO"}
    with pytest.raises(UserError, match=r"needs mode=full, not .*uni3"):
        check(experiment(command={"eval_args": split | {"mode": "uni3"}}))
    with pytest.raises(UserError, match="must not include auc"):
        check(experiment(command={"metrics": ["Hit", "NDCG", "GAUC"]}))
    everything = split | {"split": {"RS": [1, 0, 0]}, "mode": "full"}
    with pytest.raises(UserError, match="It uses all data for training"):
        check(experiment(command={"eval_args": everything}))
    assert all(config["save_rankings"] for _, config in check(experiment()))


def test_rows_that_are_split_differently_are_refused(experiment: Any) -> None:
    """Their metrics are of other test items."""
    split = {"split": {"LS": "test_only"}, "group_by": "user", "order": "TO", "mode": "full"}
    rows = {"SimDiffRec": {}, "other": {"model": "SimDiffRec", "eval_args": split}}
    with pytest.raises(UserError, match=r"other on toy, seed 1 has .* cannot be compared"):
        check(experiment(rows=rows))


@pytest.mark.parametrize("key", ["user_inter_num_interval", "item_inter_num_interval"])
def test_rows_on_differently_filtered_data_are_refused(experiment: Any, key: str) -> None:
    rows = {"SimDiffRec": {}, "other": {"model": "SimDiffRec", key: "[3,inf)"}}
    with pytest.raises(UserError, match=rf"has {key}=.* other on toy, seed 1 has .* compared"):
        check(experiment(rows=rows))


def test_an_unknown_metric_is_refused(experiment: Any) -> None:
    with pytest.raises(UserError, match="ndcg@7 is not computed"):
        check(experiment(metrics=["ndcg@7"]))


def test_many_are_shipped() -> None:
    assert {"table1", "table2", "table3", "figure3", "figure4", "figure5"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_experiment(name: str) -> None:
    """It says how it is run, and every run of it on ml-100k has a configuration."""
    path = properties_dir() / "experiment" / f"{name}.yaml"
    experiment = load_experiment(name)
    command = {"benchmark": "benchmark", "statistics": "benchmark", "ablation": "ablate"}
    first = path.read_text().splitlines()[0]
    assert (
        first == f"# python run_recbole_simdiff.py {command.get(experiment.kind, 'sweep')} {name}"
    )
    experiment = select(experiment, datasets=["ml-100k"], run_seeds=[1])
    found = list(check(experiment))
    assert len(found) == len(experiment.rows) * max(1, sum(map(len, experiment.sweep.values())))
    assert len({str(s) for s, _ in found}) == len(found)
    for run, config in found:
        for key, value in run.overrides().items():
            if key != "eval_args":
                assert config[key] == value, (run, key)


@pytest.mark.parametrize("name", SHIPPED)
def test_cited_rows_are_rows(name: str) -> None:
    experiment = load_experiment(name)
    for part in experiment.cited:
        assert set(part.values) <= set(experiment.datasets)
        for dataset in part.values:
            assert set(part.rows(dataset)) <= set(experiment.rows)


def test_the_documented_file_is_one(tmp_path: Path) -> None:
    text = (spec.__doc__ or "").split("anywhere else:\n\n")[1]
    path = tmp_path / "documented.yaml"
    path.write_text("\n".join(line[4:] for line in text.splitlines()))
    with pytest.raises(UserError, match="kind=benchmark has no sweep"):
        load_experiment(str(path))
    path.write_text(path.read_text().replace("kind: benchmark ", "kind: sweep "))
    experiment = load_experiment(str(path))
    assert len(experiment.runs()) == 2 * 2 * 2
