"""Search spaces: RecBole's parameter files mean what they mean there, and none is evaluated."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hyperopt.pyll.stochastic import sample
from recbole.trainer import HyperTuning

from recbole_simdiff.config.config import Config
from recbole_simdiff.config.layers import parse_value, properties_dir
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.registry import WRAPPERS, available_models, plugin_models
from recbole_simdiff.tuning.space import Dimension, find_space, read_space
from tests.test_recbole_models import REFUSED

SHIPPED = sorted((properties_dir() / "search_space").glob("*.hyper"))


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], tuple[Dimension, ...]]:
    """read(text) -> the space of a file with this text."""

    def parse(text: str) -> tuple[Dimension, ...]:
        path = tmp_path / "my.hyper"
        path.write_text(text)
        return read_space(path)

    return parse


def test_the_four_types(read: Any) -> None:
    choice, uniform, log, steps = read(
        "# a comment of many words\n\n"
        "n_layers choice [1, 2,3]\n"
        "tau uniform 0.05,1\n"
        "learning_rate loguniform -8, -4\n"
        "   k_noise   quniform\t5,50,5  \n"
    )
    assert (choice.key, choice.grid(), choice.value("2")) == ("n_layers", ["1", "2", "3"], 2)
    assert (uniform.key, uniform.low, uniform.high) == ("tau", 0.05, 1.0)
    assert (log.key, log.low, log.high) == ("learning_rate", -8.0, -4.0)
    assert steps.grid() == [5.0 * i for i in range(1, 11)]
    assert [str(d) for d in (choice, uniform, log, steps)] == [
        "choice [1, 2, 3]",
        "uniform 0.05,1",
        "loguniform -8,-4",
        "quniform 5,50,5",
    ]


def test_choices_are_literals_and_text_is_read_as_on_the_command_line(read: Any) -> None:
    (found,) = read("x choice ['[64,64]','CE','True', None, 1e-3, False, (1,2), '5']\n")
    values = [found.value(text) for text in found.grid()]
    assert values == [[64, 64], "CE", True, None, 0.001, False, [1, 2], 5]
    (found,) = read("x choice 1,2\n")  # a tuple without brackets is one in Python, too
    assert found.grid() == ["1", "2"]


@pytest.mark.parametrize(
    "text", ["0,1,0.3", "1,10,4", "0.25,0.35,0.1", "2.5,3.5,1", "0.1,0.9,0.1", "-3,3,2"]
)
def test_multiples_are_those_that_recbole_draws(read: Any, tmp_path: Path, text: str) -> None:
    """Also outside the bounds, where the nearest multiple lies there."""
    (ours,) = read(f"x quniform {text}\n")
    theirs = HyperTuning._build_space_from_file(tmp_path / "my.hyper")
    drawn = {round(float(sample(theirs["x"])), 9) for _ in range(400)}
    assert drawn == {round(value, 9) for value in ours.grid()}
    assert [ours.value(v) for v in ours.grid()] == ours.grid()


def test_bounds_of_loguniform_are_exponents_as_in_recbole(read: Any, tmp_path: Path) -> None:
    (ours,) = read("x loguniform -8,-4\n")
    theirs = HyperTuning._build_space_from_file(tmp_path / "my.hyper")
    drawn = [float(sample(theirs["x"])) for _ in range(400)]
    low, inside, high = ours.probes()
    assert (low, high) == (math.exp(-8), math.exp(-4))
    assert low <= min(drawn) < inside < max(drawn) <= high
    assert min(drawn) < 2 * low
    assert max(drawn) > high / 2


def test_probes_of_a_range_are_its_ends_and_no_whole_number_between(read: Any) -> None:
    uniform, steps = read("a uniform 1,3\nb quniform 1,9,2\n")
    low, inside, high = uniform.probes()
    assert (low, high) == (1.0, 3.0)
    assert inside not in (1.0, 2.0, 3.0)
    assert low < inside < high
    assert steps.probes() == [steps.grid()[0], steps.grid()[1], steps.grid()[-1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tau normal 0,1", "line 1: 'normal' is not one of the types choice, uniform, loguniform"),
        ("tau uniform 0", "line 1: tau uniform needs low,high, not '0'"),
        ("tau uniform 0,1,2", "needs low,high, not '0,1,2'"),
        ("tau uniform a,b", "needs low,high, not 'a,b'"),
        ("tau uniform 0,inf", "needs low,high"),
        ("tau uniform 1,0.5", "line 1: tau uniform 1,0.5: 1 must be below 0.5"),
        ("tau loguniform -1,-1", "-1 must be below -1"),
        ("k quniform 1,5", "line 1: k quniform needs low,high,q, not '1,5'"),
        ("k quniform 1,5,0", "line 1: k quniform 1,5,0: the step 0 must be positive"),
        ("k choice []", "line 1: k choice needs a list such as [1,2], not '[]'"),
        ("k choice {1: 2}", "needs a list such as [1,2]"),
        ("k choice [1,2", "needs a list such as [1,2], not '[1,2'"),
        ("k choice range(1,5)", "needs a list such as [1,2], not 'range(1,5)'"),
        ("k choice [1,2,1]", "line 1: k has the same choice twice in [1,2,1]"),
        ("k choice ['1',1]", "the same choice twice"),
        ("a choice [1]\n\nb choice [1]\na uniform 0,1", "my.hyper, line 4: a is given twice, see"),
        ("# nothing\n", "names no parameter"),
        ("", "names no parameter"),
    ],
)
def test_mistakes_are_named_with_file_and_line(read: Any, text: str, message: str) -> None:
    with pytest.raises(UserError) as found:
        read(text)
    assert "my.hyper" in str(found.value)
    assert message in str(found.value)


def test_lines_of_two_words_are_skipped_as_in_recbole_and_said(
    read: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = read("my space\ntau uniform 0,1\nn_layers [1,2]\n")
    assert [d.key for d in found] == list(HyperTuning._build_space_from_file(tmp_path / "my.hyper"))
    assert "line 1: 'my space' is skipped" in caplog.text
    assert "line 3: 'n_layers [1,2]' is skipped" in caplog.text


def test_nothing_is_evaluated(read: Any, tmp_path: Path) -> None:
    for text in ("open('hacked','w')", "[open('hacked','w')]", "__import__('os').getcwd()"):
        with pytest.raises(UserError, match="needs a list"):
            read(f"x choice {text}\n")
    assert not (tmp_path / "hacked").exists()


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the search space .*gone\.hyper: No such"):
        read_space(tmp_path / "gone.hyper")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary is not a text file"):
        read_space(tmp_path / "binary")


# ---------------------------------------------------------------- what is shipped


def test_every_model_that_can_be_trained_has_a_space() -> None:
    names = {path.stem for path in SHIPPED}
    assert names == {*available_models(), *WRAPPERS} - REFUSED - {"Pop"}  # which has no settings
    assert len(SHIPPED) >= 37
    assert {find_space(name) for name in names} == set(SHIPPED)


def test_without_a_space_the_message_says_what_there_is_and_how_to_write_one(read: Any) -> None:
    with pytest.raises(UserError, match=r"no search space is shipped for DIEN, only for") as found:
        find_space("DIEN")
    for name in ("BERT4Rec", "FEARec", "SimDiffRec", "--space=FILE"):
        assert name in str(found.value)
    (line,) = re.findall("'(.*?)'", str(found.value))
    assert [dimension.key for dimension in read(line)] == ["tau"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_recbole_reads_each_shipped_file_unchanged(path: Path) -> None:
    """Its parser evaluates choices and takes long comments for parameters."""
    ours = read_space(path)
    theirs = HyperTuning._build_space_from_file(path)
    assert list(theirs) == [dimension.key for dimension in ours]
    for dimension in ours:
        if dimension.kind == "choice":
            options = [literal.obj for literal in theirs[dimension.key].pos_args[1:]]
            # Lists are text to hyperopt; RecBole's configuration reads them, as ours does.
            options = [parse_value(o) if isinstance(o, str) else o for o in options]
            assert options == list(dimension.texts.values())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_each_shipped_value_is_a_possible_one(path: Path) -> None:
    probes = {dimension.key: dimension.probes() for dimension in read_space(path)}
    for i in range(max(map(len, probes.values()))):
        setting = {key: values[i % len(values)] for key, values in probes.items()}
        for dataset in ("amazon-beauty", "toy"):  # whose settings are tuned, and which has none
            config = Config(path.stem, dataset, overrides=setting)
            assert {key: config[key] for key in setting} == setting


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_each_shipped_file_says_where_its_ranges_come_from(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    if path.stem in {*plugin_models(), *WRAPPERS}:
        source, number = lines[0].removeprefix("# ").removesuffix("v1").split(":")
        assert source in ("arXiv", "doi")
        model_file = (properties_dir() / "model" / f"{path.stem}.yaml").read_text()
        assert number in model_file
