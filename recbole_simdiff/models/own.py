"""Models of the user's own: a class in a file, in a notebook, or in an installed package.

A file is run when the user names it, and never because a checkpoint does. What has been named is
known by the name of its class for the rest of the process.
"""

import ast
import hashlib
import importlib.util
import linecache
import sys
import traceback
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from recbole.model.abstract_recommender import SequentialRecommender

from recbole_simdiff.errors import UserError
from recbole_simdiff.files import outline

GROUP = "recbole_simdiff.models"  # entry points of installed packages


class OwnModel(NamedTuple):
    """A model that neither this package nor RecBole has.

    Attributes:
        model (type): the class as the user wrote it.
        reference (str): how another process finds it: ``/FOLDER/FILE.py:CLASS``, or the name of an
            entry point; empty for a class that no file has at its top level.
        place (str): what messages call the place of its code.
        checksum (str): of the code, see ``checksum``; empty if the code is not at hand.
        defaults (tuple): (values, origin) of the ``defaults`` of the class and those before it.
        files (tuple): YAML files beside its file with more defaults.
    """

    model: Any
    reference: str
    place: str
    checksum: str
    defaults: tuple[tuple[Mapping[str, Any], str], ...]
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        """What it is called: the name of its class."""
        return self.model.__name__

    def reference_for_others(self) -> str:
        """``reference``, which the processes of experiments and searches need.

        Raises:
            UserError: if there is none.
        """
        if not self.reference:
            raise UserError(
                f"model={self.name} is in {self.place}, where other processes do not find it; "
                "write it to a file and give FILE.py:CLASS",
                keys=("model",),
            )
        return self.reference

    def note(self) -> dict[str, str]:
        """What a checkpoint keeps of it."""
        return {"name": self.name, "file": self.place, "checksum": self.checksum}


_KNOWN: dict[str, OwnModel] = {}

# Path -> text and module of the files that were run.
_FILES: dict[Path, tuple[str, ModuleType]] = {}


def is_file(name: str) -> bool:
    """Whether a name is ``FILE.py`` or ``FILE.py:CLASS``, and not that of a model."""
    return name.endswith(".py") or ".py:" in name


def installed() -> dict[str, EntryPoint]:
    """Name -> entry point of every model that an installed package offers; nothing is imported."""
    return {point.name: point for point in entry_points(group=GROUP)}


def known(name: str) -> OwnModel | None:
    """The model of that name that the user has named, or that an installed package offers.

    Raises:
        UserError: if the package cannot be imported or offers something else.
    """
    if name not in _KNOWN and name in installed():
        point = installed()[name]
        try:
            model = point.load()
        except (Exception, SystemExit) as error:
            raise UserError(
                f"model={name} of the entry point {point.value} cannot be imported: "
                f"{type(error).__name__}: {error}",
                keys=("model",),
            ) from error
        _check_class(model, point.value)
        if model.__name__ != name:
            raise UserError(
                f"the entry point {name} = {point.value} must have the name of its class, "
                f"{model.__name__}",
                keys=("model",),
            )
        _KNOWN[name] = _own(model)._replace(reference=name, place=point.value)
    return _KNOWN.get(name)


def of(model: type) -> OwnModel | None:
    """What is known of a class, or of the one it adapts; None for models that are not own ones."""
    own_model = _KNOWN.get(model.__name__)
    return own_model if own_model and own_model.model in model.__mro__ else None


def add(model: type) -> OwnModel:
    """Make a class known by its name; a former one of that name is forgotten.

    Raises:
        UserError: if it is no sequential recommender.
    """
    _check_class(model, f"module {model.__module__}")
    own_model = _KNOWN.get(model.__name__)
    if own_model is None or own_model.model is not model:
        own_model = _own(model)
    _KNOWN[own_model.name] = own_model
    return own_model


def add_file(reference: str) -> list[OwnModel]:
    """Run a file and make its models known; again only if its text has changed.

    Args:
        reference (str): ``FILE.py`` for all models in it, or ``FILE.py:CLASS`` for one.

    Raises:
        UserError: if there is no such file or class, if the class is no sequential recommender, or
            if the file cannot be run.
    """
    file, name = (reference, "") if reference.endswith(".py") else reference.rsplit(":", 1)
    path = Path(file).expanduser().resolve()
    module = _run(path, reference)
    models = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and issubclass(value, SequentialRecommender)
    }
    if name and name not in models and isinstance(vars(module).get(name), type):
        _check_class(vars(module)[name], str(path))
        models[name] = vars(module)[name]  # imported there from elsewhere
    if not models or (name and name not in models):
        there = ", ".join(models) or "no class that is a sequential recommender"
        raise UserError(
            f"model={reference}: {path} has no class {name!r}; it has {there}"
            if name
            else f"model={reference}: {path} has {there}",
            keys=("model",),
        )
    return [add(model) for key, model in models.items() if name in (key, "")]


def files_run() -> list[str]:
    """Paths of the files of models that were run."""
    return [str(path) for path in _FILES]


def checksum(text: str) -> str:
    """Checksum of what Python code defines: classes, functions, constants and imports.

    Comments, docstrings and layout do not count, nor do statements that call something, so that a
    notebook's cell or a script may also train its model.
    """
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    outlines = []
    for part in body:
        calls = any(isinstance(node, ast.Call) for node in ast.walk(part))
        if isinstance(part, ast.Import | ast.ImportFrom):
            outlines.append(ast.unparse(part))
        elif isinstance(part, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not calls:
            outlines.append(outline(part))
    return hashlib.blake2b("\n".join(filter(None, outlines)).encode(), digest_size=8).hexdigest()


def _own(model: Any) -> OwnModel:
    """What is to be known of a class."""
    functions = (value for value in vars(model).values() if isinstance(value, FunctionType))
    code = next((f.__code__.co_filename for f in functions), "")
    linecache.checkcache(code)
    # A notebook's cell is no file, but its text is there.
    text = "".join(linecache.getlines(code))
    path = Path(code).resolve()
    stored = code != "" and path.is_file()
    top = "." not in model.__qualname__
    beside = [path.with_name(f"{stem}.yaml") for stem in (path.stem, model.__name__)]
    bases = [base for base in reversed(model.__mro__) if "defaults" in vars(base)]
    return OwnModel(
        model=model,
        reference=f"{path}:{model.__name__}" if stored and top else "",
        place=path.name if stored else "a notebook or a prompt",
        checksum=checksum(text) if text else "",
        defaults=tuple((_defaults(base), f"{base.__name__}.defaults") for base in bases),
        files=tuple(dict.fromkeys(file for file in beside if stored and file.is_file())),
    )


def _defaults(model: type) -> Mapping[str, Any]:
    values = vars(model)["defaults"]
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise UserError(
            f"{model.__name__}.defaults must be a dictionary of keys and values, not {values!r}",
            keys=("model",),
        )
    return values


def _check_class(model: Any, place: str) -> None:
    """Refuse what cannot be trained here."""
    if not isinstance(model, type) or not issubclass(model, SequentialRecommender):
        name = model.__name__ if isinstance(model, type) else repr(model)
        raise UserError(
            f"model={name} ({place}) is not a sequential recommender: derive it from "
            "recbole_simdiff.SequentialModel or from RecBole's SequentialRecommender",
            keys=("model",),
        )


def _run(path: Path, reference: str) -> ModuleType:
    """The module of a file, which may import others beside it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise UserError(
            f"model={reference}: {path} cannot be read: {reason}", keys=("model",)
        ) from None
    if path in _FILES and _FILES[path][0] == text:
        return _FILES[path][1]
    name = f"{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    cached, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # two texts within a second
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(
            f"model={reference}: {path}, line {_line(error, path)}: {type(error).__name__}: "
            f"{error.msg if isinstance(error, SyntaxError) else error}",
            keys=("model",),
        ) from error
    finally:
        sys.dont_write_bytecode = cached
        sys.path.remove(str(path.parent))
    _FILES[path] = text, module
    return module


def _line(error: BaseException, path: Path) -> int | None:
    """The line of a file where an error came up."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
