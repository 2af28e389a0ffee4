"""Search spaces in the format of RecBole's parameter files: each line has a key, a type and values.

    n_layers choice [1,2,3]         one of these
    tau uniform 0.05,1              any number in this range
    learning_rate loguniform -8,-4  e to the power of any number in this range
    k_noise quniform 5,50,5         any multiple of 5 in this range, both ends included

Lines that begin with # are comments. RecBole's own parser needs single blanks, reads a comment of
three words as a parameter and evaluates choices as Python code. Here choices are literals.
"""

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_simdiff.config.layers import parse_value, properties_dir
from recbole_simdiff.errors import UserError
from recbole_simdiff.log import logger

# Type -> the form of its values.
FORMS = {
    "choice": "a list such as [1,2]",
    "uniform": "low,high",
    "loguniform": "low,high",
    "quniform": "low,high,q",
}

_INSIDE = (math.sqrt(5) - 1) / 2  # position in a range; irrational, so hardly ever a whole number


@dataclass(frozen=True)
class Dimension:
    """One parameter of a search space.

    Attributes:
        key (str): key of the configuration.
        kind (str): one of ``FORMS``.
        source (str): file and line, for messages.
        texts (dict): of a choice: text -> value. Engines choose among the texts, because every
            storage can hold text.
        low, high (float): bounds; exponents of e for loguniform, multiples of ``q`` for quniform.
        q (float): step of quniform.
    """

    key: str
    kind: str
    source: str
    texts: Mapping[str, Any]
    low: float = math.nan
    high: float = math.nan
    q: float = math.nan

    def value(self, drawn: Any) -> Any:
        """The value of the configuration for what an engine drew.

        Args:
            drawn (str | float): a text of a choice, else a number.
        """
        if self.kind == "choice":
            return self.texts[drawn]
        return _multiple(round(drawn / self.q), self.q) if self.kind == "quniform" else float(drawn)

    def grid(self) -> list[str] | list[float]:
        """Every possible draw.

        Raises:
            UserError: if the parameter is continuous.
        """
        if self.kind == "choice":
            return list(self.texts)
        if self.kind == "quniform":
            steps = range(round(self.low / self.q), round(self.high / self.q) + 1)
            return [_multiple(step, self.q) for step in steps]
        raise UserError(f"{self.source}: an exhaustive search needs choice or quniform")

    def probes(self) -> list[Any]:
        """Values to check before the search: all of a choice, else both bounds and one inside."""
        if self.kind == "choice":
            return list(self.texts.values())
        if self.kind == "quniform":
            return [
                self.low,
                min(_multiple(round(self.low / self.q) + 1, self.q), self.high),
                self.high,
            ]
        inside = [self.low, self.low + _INSIDE * (self.high - self.low), self.high]
        return [math.exp(x) for x in inside] if self.kind == "loguniform" else inside

    def __str__(self) -> str:
        if self.kind == "choice":
            return f"choice [{', '.join(self.texts)}]"
        numbers = (self.low, self.high, self.q)[: FORMS[self.kind].count(",") + 1]
        return f"{self.kind} {','.join(f'{n:g}' for n in numbers)}"


def _multiple(step: int, q: float) -> float:
    """``step`` times ``q`` without the error of binary fractions: 0.3, not 0.30000000000000004."""
    return float(f"{step * q:.12g}")


def find_space(model: str) -> Path:
    """The file of the search space that is shipped for a model.

    Raises:
        UserError: if there is none.
    """
    folder = properties_dir() / "search_space"
    path = folder / f"{model}.hyper"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.hyper")))
        raise UserError(
            f"no search space is shipped for {model}, only for {known}. Write one, with a line "
            "such as 'tau uniform 0.05,1' for each parameter, and give it with --space=FILE"
        )
    return path


def read_space(path: Path) -> tuple[Dimension, ...]:
    """The parameters of a file, in its order.

    Raises:
        UserError: naming file and line of the first mistake.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the search space {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the search space {path} is not a text file") from None
    space: dict[str, Dimension] = {}
    for number, line in enumerate(lines, start=1):
        words, source = line.split(maxsplit=2), f"{path}, line {number}"
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 3:
            logger.warning(
                f"{source}: {line.strip()!r} is skipped, as RecBole does; it is too short"
            )
            continue
        if words[0] in space:
            raise UserError(f"{source}: {words[0]} is given twice, see {space[words[0]].source}")
        space[words[0]] = _dimension(words[0], words[1], words[2].strip(), source)
    if not space:
        raise UserError(f"{path} names no parameter; a line is like: tau uniform 0.05,1")
    return tuple(space.values())


def _dimension(key: str, kind: str, text: str, source: str) -> Dimension:
    if kind not in FORMS:
        raise UserError(f"{source}: {kind!r} is not one of the types {', '.join(FORMS)}")
    wrong = UserError(f"{source}: {key} {kind} needs {FORMS[kind]}, not {text!r}")
    if kind == "choice":
        try:
            listed = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise wrong from None
        if not isinstance(listed, list | tuple) or not listed:
            raise wrong
        texts = {str(value): value for value in map(_plain, listed)}
        if len(texts) < len(listed):
            raise UserError(f"{source}: {key} has the same choice twice in {text}")
        return Dimension(key, kind, source, texts)
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise wrong from None
    if len(numbers) != FORMS[kind].count(",") + 1 or not all(map(math.isfinite, numbers)):
        raise wrong
    low, high = numbers[:2]
    if low >= high:
        raise UserError(f"{source}: {key} {kind} {text}: {low:g} must be below {high:g}")
    if kind != "quniform":
        return Dimension(key, kind, source, {}, low, high)
    q = numbers[2]
    if q <= 0:
        raise UserError(f"{source}: {key} quniform {text}: the step {q:g} must be positive")
    # The multiples nearest to low and high, as in hyperopt; they may lie outside the bounds.
    first, last = math.floor(low / q + 0.5), math.ceil(high / q - 0.5)
    return Dimension(key, kind, source, {}, _multiple(first, q), _multiple(last, q), q)


def _plain(value: Any) -> Any:
    """A choice as a value of the configuration.

    As in RecBole, text is read as on the command line: '[64,64]' is a list and 'CE' is text.
    """
    if isinstance(value, str):
        return parse_value(value)
    return list(value) if isinstance(value, tuple) else value
