"""Rankings as TREC files, and lists of other programs under our protocols."""

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from recbole_simdiff.cli.main import main
from recbole_simdiff.evaluation.lists import QRELS, write_trec
from recbole_simdiff.evaluation.rankings import RANKS
from recbole_simdiff.runs.result import RunResult
from recbole_simdiff.runs.run import run_one
from tests.conftest import SEQUENCES

TOPK = [1, 5, 12]  # 12 is all items, so that no list is cut


@pytest.fixture
def result(make_config: Any) -> RunResult:
    """A run with rankings of all items."""
    return run_one(make_config("SASRecCE", epochs=1, topk=TOPK, save_rankings=True))


@pytest.fixture
def score(data_path: Path, capsys: Any) -> Any:
    """score(path, argument, ...) -> (exit code, protocol -> metric -> value, errors)."""

    def run(path: Path, *arguments: str) -> tuple[int, dict[str, dict[str, float]], str]:
        given = ["--dataset=toy", f"--data_path={data_path}", f"--topk={json.dumps(TOPK)}"]
        given += ["--valid_metric=NDCG@5", "--use_gpu=False"]
        code = main(["evaluate", f"--lists={path}", *given, *arguments])
        captured = capsys.readouterr()
        head, *lines = captured.out.splitlines() or [""]
        rows = {" ".join(line.split()[1:3]): list(map(float, line.split()[3:])) for line in lines}
        names = head.split()[2:]
        return code, {k: dict(zip(names, v, strict=True)) for k, v in rows.items()}, captured.err

    return run


def test_our_own_lists_get_the_metrics_of_the_run(
    result: RunResult, score: Any, tmp_path: Path
) -> None:
    kept, *_ = (p for p in write_trec(Path(result.run_dir), tmp_path) if p.name == "kept.trec")
    code, found, _ = score(kept)
    assert code == 0
    assert found.keys() == result.test.keys()
    for protocol, metrics in result.test.items():
        assert found[protocol] == pytest.approx(metrics, abs=6e-5)


def test_trec_files_say_what_the_rankings_say(result: RunResult, tmp_path: Path) -> None:
    names = {path.name for path in write_trec(Path(result.run_dir), tmp_path)}
    assert names == {QRELS, "kept.trec", "removed.trec"}
    ranks = pd.read_csv(Path(result.run_dir) / RANKS).set_index("user")
    targets = dict(line.split()[::2] for line in (tmp_path / QRELS).read_text().splitlines())
    assert targets == dict(ranks["item"])
    for name in ("kept", "removed"):
        lines = [line.split() for line in (tmp_path / f"{name}.trec").read_text().splitlines()]
        assert {(line[1], len(line)) for line in lines} == {("Q0", 6)}
        for user, target in targets.items():
            own = [line for line in lines if line[0] == user]
            assert [int(line[3]) for line in own] == list(range(1, len(own) + 1))
            scores = [float(line[4]) for line in own]
            assert scores == sorted(scores, reverse=True)
            assert len(set(scores)) == len(scores)
            (place,) = (int(line[3]) for line in own if line[2] == target)
            assert place == ranks.loc[user, f"rank_{name}"]


def test_several_rows_of_a_user_are_several_queries(make_config: Any, tmp_path: Path) -> None:
    split = {"split": {"RS": [0.4, 0.2, 0.4]}, "group_by": "user"}
    config = make_config("SASRecCE", epochs=1, save_rankings=True, eval_args=split)
    write_trec(Path(run_one(config).run_dir), tmp_path)
    queries = [line.split()[0] for line in (tmp_path / QRELS).read_text().splitlines()]
    assert len(set(queries)) == len(queries) > len({q.partition(":")[0] for q in queries})
    listed = {line.split()[0] for line in (tmp_path / "kept.trec").read_text().splitlines()}
    assert listed == set(queries)


def perfect(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_lists_by_hand(score: Any, tmp_path: Path) -> None:
    """Every user's last item is first, behind one item of the history: found at 1 when removed."""
    rows = []
    for user, items in SEQUENCES.items():
        rows += [f"{user},{items[0]},9.5", f"{user},{items[-1]},1e-1"]
    _, found, err = score(perfect(tmp_path / "lists.csv", "user,item,score", rows))
    assert found["history kept"]["hit@1"] == 0
    assert found["history kept"]["hit@5"] == 1
    assert found["history removed"]["hit@1"] == 1
    assert "have fewer than 12 items (0 have none)" in err


def test_ranks_order_a_list_and_other_users_are_missed(score: Any, tmp_path: Path) -> None:
    path = tmp_path / "lists.tsv.gz"
    with gzip.open(path, "wt") as file:
        file.write("item\tuser\trank\ni1\ta\t2\ni9\ta\t1\nnew\ta\t3\n")
    code, found, err = score(path)
    assert code == 0
    n_users = sum(len(items) > 2 for items in SEQUENCES.values())
    assert found["history kept"]["hit@1"] == pytest.approx(1 / n_users, abs=6e-5)
    assert "1 of 3 lines name items that are not in the data set" in err
    assert f"({n_users - 1} have none)" in err


def test_lists_that_are_short_without_the_history_are_named(score: Any, tmp_path: Path) -> None:
    """Of the 12 items listed, user a has seen all but the target and some others."""
    lines = [f"a,i{n},{n}" for n in range(1, 13)]
    path = perfect(tmp_path / "lists.csv", "user,item,rank", lines)
    _, _, err = score(path)
    assert "without the items of their histories 1 of 5 lists have fewer than 12 items" in err
    _, _, err = score(path, "--topk=[1]", "--valid_metric=NDCG@1")
    assert "without the items of their histories" not in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item\na,i1\n", "it needs user, item, and rank or score"),
        ("user,item,rank\nnobody,i1,1\n", "user 'nobody' is not in the data set toy"),
        ("user,item,rank\na,17,1\na,18,2\n", "none of its items is in the data set toy; ids"),
        ("user,item,rank\na,i1,1\na,i1,2\n", "user 'a' has item 'i1' twice"),
        ("user,item,score\na,i1,nan\n", "score 'nan' is not a number"),
        ("user,item,score\na,i1,x\n", "score 'x' is not a number"),
        ("user,item,score\n", "has no lines"),
        ("", "cannot be read"),
    ],
)
def test_wrong_lists(text: str, message: str, score: Any, tmp_path: Path) -> None:
    path = tmp_path / "lists.csv"
    path.write_text(text)
    code, _, err = score(path)
    assert code == 2
    assert message in err


def test_wrong_arguments(score: Any, result: RunResult, tmp_path: Path, capsys: Any) -> None:
    assert score(tmp_path / "gone.csv")[::2][0] == 2
    path = perfect(tmp_path / "lists.csv", "user,item,rank", ["a,i1,1"])
    for value, message in (
        ("{split: {RS: [0.4, 0.2, 0.4]}}", "needs one row a user"),
        ("{mode: uni5}", "which needs a test part and mode=full"),
    ):
        code, _, err = score(path, f"--eval_args={value}")
        assert code == 2
        assert message in err
    assert main(["evaluate"]) == 2
    assert "evaluate needs --checkpoint=RUN, or --lists=FILE" in capsys.readouterr().err
    assert main(["evaluate", f"--checkpoint={result.run_dir}", "--dataset=toy"]) == 2
    assert "a checkpoint fixes it" in capsys.readouterr().err


def test_the_command_and_its_mistakes(result: RunResult, tmp_path: Path, capsys: Any) -> None:
    assert main(["trec", result.run_dir, f"--output={tmp_path / 'out'}"]) == 0
    assert "kept.trec" in capsys.readouterr().out
    ranks = Path(result.run_dir) / RANKS
    ranks.write_text(ranks.read_text().replace("\na,", "\na b,"))
    assert main(["trec", result.run_dir, f"--output={tmp_path / 'out'}"]) == 2
    assert "'a b' has a space in it" in capsys.readouterr().err
    ranks.unlink()
    assert main(["trec", result.run_dir, f"--output={tmp_path / 'out'}"]) == 2
    assert "--save_rankings=True" in capsys.readouterr().err
