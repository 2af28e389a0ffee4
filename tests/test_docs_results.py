"""Tables of several seeds: means, deviations, tests over users; how records are kept."""

import json
from pathlib import Path
from typing import Any

import keep
import numpy as np
import pandas as pd
import pytest
import records
import render
from scipy import stats

from recbole_simdiff.evaluation.protocols import PROTOCOLS
from recbole_simdiff.experiments.results import metric_of_rank

USERS = 40
METRICS = [f"{name}@{k}" for name in ("hit", "ndcg") for k in (5, 10, 20)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of results without records; runs go beside it."""
    here = tmp_path / "results"
    (here / "runs").mkdir(parents=True)
    (here / "rows.txt").write_text("encoder\nmodel | encoder\nolder\n")
    columns = ["row", "arguments", "best_epoch", "epochs", "ended", "split", "protocol", *METRICS]
    lines = [
        ["older", "--model=Old", "3", "9", "by hand", split, protocol, *["0.25"] * len(METRICS)]
        for split in ("valid", "test")
        for protocol in PROTOCOLS
    ]
    (here / "amazon-beauty.csv").write_text("\n".join(",".join(x) for x in [columns, *lines]))
    monkeypatch.setattr(records, "HERE", here)
    for module in (records, keep):
        monkeypatch.setattr(module, "RUNS", here / "runs")
    return tmp_path


def a_run(
    folder: Path,
    name: str,
    seed: int,
    best: int,
    ranked: bool = True,
    model: str = "M",
    **values: Any,
) -> str:
    """A run folder with ``result.json`` and, if ``ranked``, ``ranks.csv``."""
    generator = np.random.default_rng([seed, best])
    ranks = {p: generator.integers(1, best, USERS) for p in PROTOCOLS}
    metrics = {p: {m: metric_of_rank(ranks[p], m).mean() for m in METRICS} for p in PROTOCOLS}
    settings = {"seed": seed, "epochs": 9, "hidden_size": 8, "data_path": str(folder)} | values
    result = {
        "valid": metrics,
        "test": metrics,
        "best_epoch": 1,
        "epochs": 3,
        "log": [
            {"epoch": e, "seconds": s, "updates": 5 * e + 5, "valid": {}}
            for e, s in enumerate((2.0, 4.0, 9.0))
        ],
        "record": {"command": ["train", f"--data_path={folder}", "--epochs=9"]},
        "run_dir": str(folder / name),
        "config": {"model": model, "dataset": "amazon-beauty", "values": settings},
    }
    run = folder / name
    run.mkdir()
    (run / "result.json").write_text(json.dumps(result))
    if ranked:
        users = [f"u{i}" for i in generator.permutation(USERS)]  # in any order
        table = {"user": users, "item": [f"i{u}" for u in users]}
        table |= {f"rank_{p.removeprefix('history ')}": ranks[p] for p in PROTOCOLS}
        pd.DataFrame(table).to_csv(run / "ranks.csv", index=False)
    return str(run)


def two_rows(folder: Path, seeds: tuple[int, ...]) -> None:
    for name, best in (("encoder", 60), ("model", 15)):
        runs = [a_run(folder, f"{name}-{seed}", seed, best) for seed in seeds]
        keep.main(runs, name, name, f"--model={name}")


def test_a_row_of_three_seeds_has_mean_and_deviation(folder: Path) -> None:
    two_rows(folder, (2020, 2021, 2022))
    names = sorted(path.name for path in (folder / "results" / "runs").iterdir())
    assert names[:3] == ["encoder-2021.json", "encoder-2021.npz", "encoder-2022.json"]
    assert len(names) == 12
    head, encoder, *_ = render.detail_rows(list(records.rows().values()), "test", PROTOCOLS[0])
    values = [
        json.loads(path.read_text())["test"][PROTOCOLS[0]]["ndcg@10"]
        for path in (folder / "results" / "runs").glob("encoder*.json")
    ]
    assert encoder[0] == "encoder (3 seeds)"
    shown = dict(zip(head, encoder, strict=True))
    assert shown["NDCG@10"] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    assert shown["best epoch"] == "1 of 3, 1 of 3, 1 of 3"


def test_rows_of_one_seed_have_plain_numbers(folder: Path) -> None:
    two_rows(folder, (2020,))
    *_, older = render.detail_rows(list(records.rows().values()), "test", PROTOCOLS[0])
    assert older == ("older", *["0.2500"] * 6, "3 of 9+")
    (_, line, _) = render.commands(list(records.rows().values())).strip().splitlines()[1:]
    assert line == "    $R --model=model"


def test_commands_name_the_seeds(folder: Path) -> None:
    two_rows(folder, (2020, 2022))
    lines = render.commands(list(records.rows().values())).strip().splitlines()
    assert lines[1:] == [
        "    $R --model=encoder  # --seed=2020, 2022",
        "    $R --model=model  # --seed=2020, 2022",
        "    $R --model=Old --stopping_updates=0",
    ]


def test_cost_is_that_of_the_log(folder: Path) -> None:
    two_rows(folder, (2020,))
    rows = list(render.cost_rows(list(records.rows().values())))
    assert [row[0] for row in rows] == ["model", "encoder", "model"]  # none of the older run
    assert rows[1][1:] == ("4.0", "10", "15", f"{15 / 3600:.2f}")


def test_the_comparison_is_that_of_the_users(folder: Path) -> None:
    two_rows(folder, (2020, 2021))
    rows = records.rows()
    one = render.compare(rows["model"], rows["encoder"], PROTOCOLS[1], "ndcg@10")
    by_user = []
    for seed in (2020, 2021):
        sides = []
        for name in ("model", "encoder"):
            table = pd.read_csv(folder / f"{name}-{seed}" / "ranks.csv", index_col="user")
            rank = table["rank_removed"]
            sides.append(pd.Series(metric_of_rank(rank.to_numpy(), "ndcg@10"), rank.index))
        by_user.append(sides[0] - sides[1])
    difference = sum(by_user) / 2
    assert one.difference == pytest.approx(difference.mean())
    assert one.p_users == pytest.approx(stats.ttest_1samp(difference, 0).pvalue)
    assert one.p_wilcoxon == pytest.approx(stats.wilcoxon(difference.round(12)).pvalue)
    assert one.p_seeds == pytest.approx(stats.ttest_1samp([d.mean() for d in by_user], 0).pvalue)
    text = render.compared(list(rows.values()))
    assert text.count("| model | encoder |") == 4
    line = next(line for line in text.splitlines() if "removed | NDCG@10" in line)
    assert f"| 2 | {difference.mean():+.4f} |" in line


def test_without_ranks_nothing_is_compared(folder: Path) -> None:
    keep.main([a_run(folder, "a", 2020, 60)], "encoder", "encoder", "")
    keep.main([a_run(folder, "b", 2020, 15, ranked=False)], "model", "model", "")
    assert "so far" in render.compared(list(records.rows().values()))


def test_other_users_are_not_compared(folder: Path) -> None:
    keep.main([a_run(folder, "a", 2020, 60)], "encoder", "encoder", "")
    run = a_run(folder, "b", 2020, 15)
    path = Path(run, "ranks.csv")
    path.write_text(path.read_text().replace("u7,", "other,"))
    keep.main([run], "model", "model", "")
    with pytest.raises(ValueError, match="model and encoder rank for other users"):
        render.compared(list(records.rows().values()))


def test_a_record_has_no_path_of_the_machine(folder: Path) -> None:
    two_rows(folder, (2020,))
    text = (folder / "results" / "runs" / "model.json").read_text()
    assert str(folder) not in text
    assert json.loads(text)["record"]["command"] == ["train", "--epochs=9"]
    run = a_run(folder, "with", 2021, 15, item_vectors=str(folder / "v.npz"))
    with pytest.raises(ValueError, match=r"path of this machine: .*v\.npz"):
        keep.main([run], "model", "model", "")


def test_the_kept_records_have_no_path_of_a_machine() -> None:
    for path in (Path(render.__file__).parent / "runs").glob("*.json"):
        keep.check(json.loads(path.read_text()), [])


def test_runs_of_a_row_have_the_same_settings(folder: Path) -> None:
    two_rows(folder, (2020,))
    before = sorted((folder / "results" / "runs").iterdir())
    run = a_run(folder, "other", 2021, 15, hidden_size=16)
    with pytest.raises(ValueError, match="runs of 'model' differ in hidden_size"):
        keep.main([run], "model", "model", "")
    assert sorted((folder / "results" / "runs").iterdir()) == before


def test_runs_of_a_row_have_the_same_model(folder: Path) -> None:
    two_rows(folder, (2020,))
    run = a_run(folder, "other", 2021, 15, model="N")
    with pytest.raises(ValueError, match="runs of 'model' differ in model"):
        keep.main([run], "model", "model", "")


def test_two_runs_of_a_seed_are_not_kept_together(folder: Path) -> None:
    both = [a_run(folder, name, 2020, 15) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"a and .*b both have seed 2020; give one"):
        keep.main(both, "model", "model", "")


def test_a_run_without_ranks_does_not_inherit_those_kept_before(folder: Path) -> None:
    two_rows(folder, (2020,))
    ranks = folder / "results" / "runs" / "model.npz"
    assert ranks.is_file()
    keep.main([a_run(folder, "new", 2020, 20, ranked=False)], "model", "model", "")
    assert not ranks.exists()


def test_a_run_may_be_kept_again_with_other_settings(folder: Path) -> None:
    two_rows(folder, (2020,))
    keep.main([a_run(folder, "new", 2020, 15, hidden_size=16)], "model", "model", "")
    record = json.loads((folder / "results" / "runs" / "model.json").read_text())
    assert record["config"]["values"]["hidden_size"] == 16


def test_ranks_of_another_evaluation_are_refused(folder: Path) -> None:
    run = a_run(folder, "a", 2020, 15)
    path = Path(run, "ranks.csv")
    table = pd.read_csv(path)
    table["rank_kept"] += 1
    table.to_csv(path, index=False)
    good = a_run(folder, "b", 2021, 15)
    with pytest.raises(ValueError, match=r"run evaluate --save_rankings=True again"):
        keep.main([good, run], "model", "model", "")
    assert list((folder / "results" / "runs").iterdir()) == []


def test_two_runs_of_a_seed_are_an_error(folder: Path) -> None:
    keep.main([a_run(folder, "a", 2020, 15)], "older", "older", "")
    with pytest.raises(ValueError, match="'older' has two runs with seed 2020"):
        records.rows()


def test_a_seed_beside_an_older_run_is_an_error(folder: Path) -> None:
    keep.main([a_run(folder, "a", 2021, 15)], "older", "older", "")
    with pytest.raises(ValueError, match=r"'older' has an older run, .* beside older-2021; train"):
        records.rows()


def test_a_row_without_a_place_is_an_error(folder: Path) -> None:
    keep.main([a_run(folder, "a", 2020, 15)], "new", "new", "")
    with pytest.raises(ValueError, match=r"'new' has a run and no line in rows\.txt"):
        records.rows()
