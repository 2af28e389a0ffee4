"""``recommend --output``: parts that are written once, whole, and in bounded memory."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff import files
from recbole_simdiff.checkpoint import BEST
from recbole_simdiff.cli import recommend as recommend_command
from recbole_simdiff.cli.main import main
from recbole_simdiff.errors import UserError
from recbole_simdiff.serving import batch
from recbole_simdiff.serving.batch import MANIFEST
from recbole_simdiff.serving.recommender import Recommender

Recommend = Callable[..., int]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "BLOCK", 3)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of histories of each call of the model."""
    sizes: list[int] = []
    stock = Recommender.recommend

    def count(self: Any, histories: Any, *rest: Any) -> Any:
        sizes.append(len(histories))
        return stock(self, histories, *rest)

    monkeypatch.setattr(Recommender, "recommend", count)
    return sizes


def histories(path: Path, n: int, start: int = 0) -> Path:
    """A file of n histories of toy."""
    lines = (
        json.dumps({"user": f"u{i}", "items": [f"i{1 + i % 12}", f"i{1 + i % 5}"]})
        for i in range(start, start + n)
    )
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def recommend(run_dir: Path, tmp_path: Path) -> Recommend:
    """recommend(options) -> exit code; of eight histories to the folder ``out``, as JSON."""
    place = histories(tmp_path / "in.jsonl", 8)

    def call(*given: str) -> int:
        usual = [f"--checkpoint={run_dir}", "--use_gpu=false", "--format=json", "--k=4"]
        usual += [f"--input={place}", f"--output={tmp_path / 'out'}"]
        options = {option.partition("=")[0]: option for option in (*usual, *given)}
        return main(["recommend", *options.values()])

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def test_the_parts_are_what_would_be_printed(
    recommend: Recommend, run_dir: Path, tmp_path: Path, capsys: Any, answered: list[int]
) -> None:
    given = [f"--checkpoint={run_dir}", "--use_gpu=false", f"--input={tmp_path / 'in.jsonl'}"]
    assert recommend() == 0
    said = capsys.readouterr()
    assert "out: 8 histories in 3 parts, 0 of them from before; 0 histories have no" in said.out
    names = [f"part-00000{number}.jsonl" for number in range(3)]
    assert sorted(contents(tmp_path / "out")) == sorted([*names, MANIFEST])
    text = "".join((tmp_path / "out" / name).read_text() for name in names)
    assert main(["recommend", *given, "--format=json", "--k=4"]) == 0
    assert text == capsys.readouterr().out
    assert answered == [3, 3, 2, 3, 3, 2]  # what is printed is computed in blocks, too

    assert recommend("--format=csv", f"--output={tmp_path / 'csv'}") == 0
    capsys.readouterr()
    assert main(["recommend", *given, "--format=csv", "--k=4"]) == 0
    printed = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    parts = sorted((tmp_path / "csv").glob("part-*.csv"))
    assert [row for part in parts for row in csv.DictReader(part.open())] == printed


def test_users_of_the_training_data_are_written_likewise(
    run_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    usual = [f"--checkpoint={run_dir}", "--use_gpu=false", "--format=json"]
    assert main(["recommend", *usual, "--all_users", f"--output={tmp_path / 'out'}"]) == 0
    assert "6 histories in 2 parts" in capsys.readouterr().out


def test_a_stopped_command_goes_on_where_it_was(
    recommend: Recommend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    answered: list[int],
) -> None:
    assert recommend(f"--output={tmp_path / 'unbroken'}") == 0
    answered.clear()
    with monkeypatch.context() as patch:
        stock = Recommender.recommend

        def signalled(self: Any, *rest: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return stock(self, *rest)

        patch.setattr(Recommender, "recommend", signalled)
        assert recommend() == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert "stopped by SIGTERM; everything is saved. Continue with\n  the same command" in said
    assert len(contents(tmp_path / "out")) == 2
    assert recommend() == 0
    assert "8 histories in 3 parts, 1 of them from before" in capsys.readouterr().out
    assert answered == [3, 3, 2]
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")
    assert recommend() == 0
    assert len(answered) == 3


def test_a_part_that_could_not_be_written_is_written_next_time(
    recommend: Recommend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: list[int]
) -> None:
    stock = files.write_text

    def full(path: Path, text: str) -> None:
        if path.name == "part-000001.jsonl":
            raise OSError(28, "No space left on device", str(path))
        stock(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", full)
        assert recommend() == 2
    assert not (tmp_path / "out" / "part-000001.jsonl").exists()
    answered.clear()
    assert recommend() == 0
    assert answered == [3, 2]
    (tmp_path / "out" / "part-000000.jsonl").unlink()
    assert recommend() == 0
    assert answered == [3, 2, 3]


def test_a_changed_line_changes_its_part_alone(
    recommend: Recommend, tmp_path: Path, answered: list[int]
) -> None:
    assert recommend() == 0
    place = tmp_path / "in.jsonl"
    lines = place.read_text().splitlines()
    lines[4] = '{"user": "new", "items": ["i3"]}'
    place.write_text("\n".join(lines))
    answered.clear()
    assert recommend() == 0
    assert answered == [3]
    first = json.loads((tmp_path / "out/part-000001.jsonl").read_text().splitlines()[1])
    assert first["history"] == "new"


def test_parts_of_lines_that_are_gone_are_removed(
    recommend: Recommend, tmp_path: Path, capsys: Any
) -> None:
    assert recommend() == 0
    histories(tmp_path / "in.jsonl", 3)
    capsys.readouterr()
    assert recommend() == 0
    assert "3 histories in 1 parts, 1 of them from before" in capsys.readouterr().out
    assert set(contents(tmp_path / "out")) == {"part-000000.jsonl", MANIFEST}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--k=5"], "holds parts with k=4, and now it is 5; give another --output, or delete it"),
        (["--seen=keep"], "holds parts with seen=drop, and now it is keep"),
        (["--format=csv"], "holds parts with format=json, and now it is csv"),
        (["--exclude=ids"], "holds parts with filters="),
    ],
)
def test_parts_of_other_settings_are_not_mixed_in(
    recommend: Recommend, tmp_path: Path, capsys: Any, given: list[str], message: str
) -> None:
    (tmp_path / "ids").write_text("i1\n")
    assert recommend() == 0
    before = contents(tmp_path / "out")
    assert recommend(*given) == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_another_checkpoint_makes_other_parts(
    recommend: Recommend, run_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    assert recommend() == 0
    assert recommend(f"--checkpoint={run_dir / 'last.safetensors'}") == 2
    assert "holds parts with checkpoint=" in capsys.readouterr().err


PART = '{"of": "x", "requests": 1, "unanswered": 0}'


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"settings": {}, "parts": {"a": {}}}',
        '{"settings": {}, "parts": {"part-000000.jsonl": []}}',
        '{"settings": {}, "parts": {"part-000000.jsonl": ' + PART.replace("1", '"1"') + "}}",
        '{"settings": [1], "parts": {"part-000000.jsonl": ' + PART + "}}",
    ],
)
def test_a_manifest_of_something_else_is_refused(
    recommend: Recommend, tmp_path: Path, capsys: Any, content: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text(content)
    assert recommend() == 2
    assert "parts.json is none of this program; give another --output" in capsys.readouterr().err


def test_a_manifest_cannot_name_files_elsewhere(
    recommend: Recommend, tmp_path: Path, capsys: Any
) -> None:
    assert recommend() == 0
    (tmp_path / "mine.txt").write_text("mine")
    path = tmp_path / "out" / MANIFEST
    content = json.loads(path.read_text())
    content["parts"]["../mine.txt"] = json.loads(PART)
    path.write_text(json.dumps(content))
    assert recommend() == 2
    assert "none of this program" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").is_file()


def test_parts_that_no_manifest_tells_of_are_not_replaced(
    recommend: Recommend, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-000000.jsonl").write_text("mine")
    assert recommend() == 2
    assert "holds parts, but no parts.json that says of what" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"part-000000.jsonl": b"mine"}


def test_a_checkpoint_that_is_replaced_meanwhile_makes_no_parts(
    recommend: Recommend,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """Neither in this process nor in one that loads it later."""
    options, stock = [], recommend_command._Recommend

    def replaced(namespace: Any, quiet: bool = False) -> Any:
        options.append(namespace)
        made = stock(namespace, quiet)
        with (run_dir / BEST).open("ab") as file:
            file.write(b" ")
        return made

    content = (run_dir / BEST).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(recommend_command, "_Recommend", replaced)
        assert recommend() == 2
    assert "was replaced while it was read" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("part*"))
    (run_dir / BEST).write_bytes(content)
    with pytest.raises(UserError, match="was replaced"):
        recommend_command._part_writer(options[0], "of other weights")([])


def test_an_empty_input_removes_nothing(recommend: Recommend, tmp_path: Path, capsys: Any) -> None:
    assert recommend() == 0
    before = contents(tmp_path / "out")
    (tmp_path / "in.jsonl").write_text("")
    capsys.readouterr()
    assert recommend() == 2
    said = capsys.readouterr()
    assert "nothing to recommend to" in said.err
    assert said.out == ""
    assert contents(tmp_path / "out") == before


class Killed(BaseException):
    """In place of SIGKILL."""


def killed_before_noted(recommend: Recommend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is killed when a part is written, and before that is noted."""

    def add(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(batch._Manifest, "add", add)
        with pytest.raises(Killed):
            recommend()


def test_a_part_that_was_replaced_is_not_taken_for_the_former_one(
    recommend: Recommend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recommend() == 0
    before = contents(tmp_path / "out")
    histories(tmp_path / "in.jsonl", 8, start=100)
    killed_before_noted(recommend, monkeypatch)
    assert contents(tmp_path / "out")["part-000000.jsonl"] != before["part-000000.jsonl"]
    histories(tmp_path / "in.jsonl", 8)
    assert recommend() == 0
    assert contents(tmp_path / "out") == before


def test_a_part_that_was_not_noted_does_not_outlive_its_settings(
    recommend: Recommend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_before_noted(recommend, monkeypatch)
    assert (tmp_path / "out" / "part-000000.jsonl").is_file()
    assert recommend("--format=csv") == 0
    names = {f"part-00000{number}.csv" for number in range(3)}
    assert set(contents(tmp_path / "out")) == names | {MANIFEST}


def test_a_mistake_leaves_nothing_to_mend(recommend: Recommend, capsys: Any) -> None:
    assert recommend("--k=0") == 2
    assert "k=0 must be at least 1" in capsys.readouterr().err
    assert recommend() == 0


def test_a_name_may_be_half_a_character(
    recommend: Recommend, run_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "in.jsonl").write_text('{"user": "\\ud800", "items": ["i1"]}\n')
    assert recommend("--format=csv") == 0
    text = (tmp_path / "out" / "part-000000.csv").read_text()
    assert text.splitlines()[1].startswith("\\ud800,1,")
    usual = [f"--checkpoint={run_dir}", "--use_gpu=false", f"--input={tmp_path / 'in.jsonl'}"]
    capsys.readouterr()
    assert main(["recommend", *usual, "--format=csv", "--k=4"]) == 0
    assert capsys.readouterr().out == text


def test_two_commands_do_not_write_to_one_folder(
    recommend: Recommend, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "out").mkdir()
    with files.locked(tmp_path / "out" / ".lock"):
        assert recommend() == 2
    assert "another process writes to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--format=table"], "--output needs --format=json or --format=csv"),
        (["--jobs=0"], "--jobs=0 must be at least 1"),
    ],
)
def test_options_that_do_not_go_together(
    recommend: Recommend, capsys: Any, given: list[str], message: str
) -> None:
    assert recommend(*given) == 2
    assert message in capsys.readouterr().err


def test_several_processes_need_files(run_dir: Path, capsys: Any) -> None:
    given = ["--users=a", "--use_gpu=false", "--jobs=2"]
    assert main(["recommend", f"--checkpoint={run_dir}", *given]) == 2
    assert "--jobs=2 needs --output" in capsys.readouterr().err


def test_histories_without_a_known_item_are_counted(
    recommend: Recommend, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "in.jsonl").write_text('["nobody"]\n["i1"]\n[]\n["i2", "nobody"]\n')
    assert recommend() == 0
    assert "4 histories in 2 parts, 0 of them from before; 2 histories h" in capsys.readouterr().out
    (tmp_path / "in.jsonl").write_text('["nobody"]\n' * 4)
    assert recommend() == 2
    assert "no history has an item of the training data" in capsys.readouterr().err
    assert recommend("--fallback=popular", f"--output={tmp_path / 'popular'}") == 0


def test_what_is_printed_is_complete_however_late_a_known_item_comes(
    run_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "in.jsonl").write_text('["nobody"]\n' * 3 + '["i1"]\n')
    usual = [f"--checkpoint={run_dir}", "--use_gpu=false", f"--input={tmp_path / 'in.jsonl'}"]
    assert main(["recommend", *usual, "--format=json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main(["recommend", *usual, "--format=csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {row["history"] for row in rows} == {"line 4"}


def test_no_more_blocks_are_read_than_are_under_way(tmp_path: Path) -> None:
    """A process that has nothing else to do reads a block when the one before is written."""
    read, written = [], []

    def requests() -> Iterator[int]:
        for number in range(60):
            read.append(number)
            assert len(read) - len(written) <= 3
            yield number

    def answer(block: Any) -> batch.Answers:
        written.extend(block)
        return batch.Answers("".join(map(str, block)), 0)

    totals = batch.write_parts(requests(), lambda: answer, tmp_path / "out", {}, "txt", 1)
    assert (totals.parts, totals.requests) == (20, 60)


# ---------------------------------------------------------------- real processes


def start(*given: str) -> subprocess.Popen[str]:
    """The command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "recbole_simdiff", "recommend", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_several_processes_write_what_one_writes_however_often_they_are_killed(
    run_dir: Path, tmp_path: Path
) -> None:
    place = histories(tmp_path / "in.jsonl", 45_000)
    given = [f"--checkpoint={run_dir}", "--use_gpu=false", "--format=json", f"--input={place}"]
    out, error = start(*given, f"--output={tmp_path / 'one'}").communicate(timeout=300)
    assert "45,000 histories in 5 parts" in out, error
    several = [*given, f"--output={tmp_path / 'several'}", "--jobs=2"]
    for sent in (signal.SIGKILL, signal.SIGINT):
        process = start(*several)
        assert process.stderr is not None
        next(line for line in process.stderr if "10,000 histories" in line)
        os.killpg(process.pid, sent)
        error = process.communicate(timeout=300)[1]
        if sent == signal.SIGINT:
            assert process.returncode == 128 + sent
            assert "everything is saved. Continue with\n  the same command" in error
            assert "Traceback" not in error
    out, error = start(*several).communicate(timeout=300)
    assert "45,000 histories in 5 parts" in out, error
    assert ", 0 of them from before" not in out
    assert contents(tmp_path / "several") == contents(tmp_path / "one")


MEASURED = """
import sys
from recbole_simdiff.cli.main import main
from recbole_simdiff.runs.result import peak_memory_mb
code = main(sys.argv[1:])
print(peak_memory_mb())
sys.exit(code)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_users(run_dir: Path, tmp_path: Path) -> None:
    peaks = []
    for n in (100_000, 1_000_000):
        place = histories(tmp_path / f"{n}.jsonl", n)
        given = [f"--checkpoint={run_dir}", "--use_gpu=false", "--format=json"]
        given += [f"--input={place}", f"--output={tmp_path / str(n)}"]
        command = [sys.executable, "-c", MEASURED, "recommend", *given]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks.append(float(out.splitlines()[-1]))
    assert peaks[1] < 1.1 * peaks[0]
