"""Who may import whom, what no module may do, and what every model and every name must have."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import recbole_simdiff
from recbole_simdiff.config import layers
from recbole_simdiff.config.layers import properties_dir
from recbole_simdiff.models.registry import WRAPPERS, available_models, plugin_models

PACKAGE = Path(recbole_simdiff.__file__).parent
TESTS = Path(__file__).parent
# Room (a folder, or a module beside them) -> its level. A room imports lower levels and itself.
LEVELS = {
    room: level
    for level, rooms in enumerate(
        (
            ("compat", "errors", "version"),
            ("diffusion", "distributed", "files", "log"),
            ("checkpoint", "modules"),
            ("models",),
            ("config",),
            ("data",),
            ("evaluation",),
            ("training",),
            ("runs",),
            ("pipelines", "serving"),
            ("experiments",),
            ("tuning",),
            ("api",),
            ("",),
            ("cli",),
            ("__main__",),
        )
    )
    for room in rooms
}
# Pure torch, no host.
WITHOUT_RECBOLE = (
    "errors",
    "files",
    "log",
    "distributed",
    "checkpoint",
    "diffusion",
    "modules.augmentations",
    "modules.batch",
    "modules.losses",
    "modules.plan",
    "modules.random_state",
    "modules.rules",
    "config.limits",
    "cli",
)


def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file; the package itself is ''."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imported(source: str) -> Iterator[str]:
    """Full dotted name of everything imported, anywhere in the source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(source: str) -> set[str]:
    """Modules of this package that the source imports."""
    found = set()
    for name in imported(source):
        package, _, rest = name.partition(".")
        if package != "recbole_simdiff":
            continue
        # The longest prefix that is a module; what is left is a name in it.
        while rest and rest not in MODULES:
            rest = rest.rpartition(".")[0]
        found.add(rest)
    return found


def room(module: str) -> str:
    """The folder of a module, or the module itself."""
    return module.partition(".")[0]


def family(module: str) -> str:
    """What of ``models`` belongs together: a file, or a folder such as ``models.diffuasr``."""
    return ".".join(module.split(".")[:2])


def upward(module: str, source: str) -> set[str]:
    """Arrows that ``module`` may not have: to its own or a higher level, and between models."""
    found = set()
    for arrow in arrows(source):
        same = room(arrow) == room(module)
        if same and room(module) == "models" and "." in arrow:
            same = family(arrow) == family(module) or module == "models.registry"
        if not same and LEVELS[room(arrow)] >= LEVELS[room(module)]:
            found.add(arrow)
    return found


def test_every_room_has_a_level() -> None:
    assert len(MODULES) >= 60
    assert {room(module) for module in MODULES} == LEVELS.keys()


@pytest.mark.parametrize("module", MODULES)
def test_no_import_points_upward(module: str) -> None:
    assert upward(module, MODULES[module].read_text()) == set()


@pytest.mark.parametrize(
    ("module", "line", "arrow"),
    [
        ("models.newcomer", "from recbole_simdiff.models.simdiffrec import SimDiffRec", "models.s"),
        ("models.newcomer", "from recbole_simdiff.models import simdiffrec", "models.simdiffrec"),
        ("models.newcomer", "import recbole_simdiff.training.trainer", "training"),
        ("models.newcomer", "from recbole_simdiff.config import config", "config"),
        ("models.newcomer", "from recbole_simdiff.models.registry import get_model", "models"),
        ("modules.losses", "def f():\n    from recbole_simdiff.config import config", "config"),
        ("training.trainer", "from recbole_simdiff.runs.run import run", "runs"),
        ("runs.run", "from recbole_simdiff.cli.main import main", "cli"),
        ("serving.recommender", "from recbole_simdiff.pipelines import diffuasr", "pipelines"),
    ],
)
def test_upward_arrows_would_be_seen(module: str, line: str, arrow: str) -> None:
    (found,) = upward(module, line)
    assert found.startswith(arrow)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, the first one again at the end; or none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for arrow in sorted(graph[module]):
            if found := walk(arrow, [*path, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (walk(module, []) for module in graph)), [])


def test_no_modules_import_one_another_in_a_circle() -> None:
    graph = {module: arrows(path.read_text()) - {module} for module, path in MODULES.items()}
    assert circle(graph) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_the_lowest_modules_do_not_know_the_host() -> None:
    low = [m for m in MODULES if m in WITHOUT_RECBOLE or room(m) in WITHOUT_RECBOLE]
    assert len(low) >= 15
    for module in low:
        roots = {name.split(".")[0] for name in imported(MODULES[module].read_text())}
        assert "recbole" not in roots, module


def test_nobody_imports_what_needs_ray() -> None:
    """``recbole.quick_start`` imports ray, which has no build for today's Python."""
    for module, path in MODULES.items():
        for name in imported(path.read_text()):
            assert not name.startswith(("recbole.quick_start", "ray")), module


def test_a_folder_that_imports_recbole_mends_it_first() -> None:
    """Also where a module of it is imported before anything else of the package."""
    for module, path in MODULES.items():
        names = {name.partition(".")[0] for name in imported(path.read_text())}
        if "recbole" in names:
            first, *_ = (n for n in ast.parse(MODULES[room(module)].read_text()).body[1:])
            assert ast.unparse(first) == "from recbole_simdiff import compat", module
            assert "\ncompat.apply()\n" in MODULES[room(module)].read_text(), module


# ---------------------------------------------------------------- what no module may do


def dangers(source: str) -> list[str]:
    """Ways to run foreign code: pickles, evaluation, unsafe YAML, shells."""
    found = []
    for name in imported(source):
        root = name.split(".")[0]
        if root in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}:
            found.append(f"import {name}")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        loader = keywords.get("Loader", ast.unparse(node.args[1]) if len(node.args) > 1 else "")
        if (
            called in {"eval", "exec", "compile", "__import__", "torch.load", "torch.save"}
            or called in {"os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"}
            or called.endswith((".read_pickle", ".to_pickle"))
            or (called in {"yaml.load", "yaml.load_all"} and loader not in {"PlainLoader"})
            or keywords.get("shell", "False") != "False"
            or keywords.get("allow_pickle", "False") != "False"
        ):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_module_can_run_foreign_code(module: str) -> None:
    assert dangers(MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "yaml.load(text, yaml.FullLoader)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "pd.read_pickle(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_dangers_would_be_seen(source: str) -> None:
    assert len(dangers(source)) == 1
    assert dangers("model.eval()\nyaml.load(text, Loader=PlainLoader)\nre.compile(rule)") == []


def test_the_yaml_loader_is_a_safe_one() -> None:
    assert issubclass(layers.PlainLoader, yaml.constructor.SafeConstructor)
    assert not issubclass(layers.PlainLoader, yaml.constructor.FullConstructor)  # derived from it
    unsafe = [tag for tag in layers.PlainLoader.yaml_constructors if tag and "python" in tag]
    assert unsafe == []


def test_only_the_configuration_reads_yaml() -> None:
    readers = [
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("yaml.")
    ]
    assert set(readers) == {"config.layers"}


# ---------------------------------------------------------------- models and names


def test_each_model_has_its_yaml_and_its_test() -> None:
    models = plugin_models()
    files = {m for m in MODULES if m.startswith("models.")}
    files -= {"models.own", "models.recbole", "models.registry"}
    files = {m for m in files if family(m) != "models.diffuasr"}
    # A variant of a model lives in the model's file and is tested with it.
    homes = {
        name: model.__module__.removeprefix("recbole_simdiff.") for name, model in models.items()
    }
    assert set(homes.values()) == files
    assert {f"models.{name.lower()}" for name in models} >= files
    for name, home in homes.items():
        assert (properties_dir() / "model" / f"{name}.yaml").is_file(), name
        assert (TESTS / "models" / f"test_{home.removeprefix('models.')}.py").is_file(), name
    written = {path.stem for path in (properties_dir() / "model").iterdir()}
    shared = {"EncoderRecommender"}  # what all models around the encoder share
    assert written <= {*available_models(), *WRAPPERS} | shared  # RecBole's may have one, too


def undocumented(tree: ast.AST, prefix: str) -> Iterator[str]:
    """Public classes, functions and methods without a docstring."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{prefix}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node, f"{prefix}.{node.name}")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_documented(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree) or module == "__main__", f"{module} has no docstring"
    assert list(undocumented(tree, module)) == []


def test_missing_docstrings_would_be_seen() -> None:
    source = 'class A:\n    """Doc."""\n    def b(self): ...\n    def _c(self): ...\ndef d(): ...'
    assert list(undocumented(ast.parse(source), "m")) == ["m.A.b", "m.d"]


def too_long(source: str) -> set[str]:
    """Functions of more than 60 lines and classes of more than 300, with their decorators."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(part.lineno for part in node.decorator_list)])
            limit = 300 if isinstance(node, ast.ClassDef) else 60
            if (node.end_lineno or first) - first + 1 > limit:
                found.add(node.name)
    return found


def test_no_function_or_class_is_too_long() -> None:
    """Models may be longer: one paper is one file."""
    too_long_ones = {
        f"{module}.{name}"
        for module, path in MODULES.items()
        for name in too_long(path.read_text())
        if room(module) != "models"
    }
    assert too_long_ones == set()


@pytest.mark.parametrize(("limit", "head"), [(60, "def f():"), (300, "class A:")])
def test_too_long_ones_would_be_seen(limit: int, head: str) -> None:
    body = "    x = 1\n"
    assert too_long(f"{head}\n{body * (limit - 1)}") == set()
    assert too_long(f"{head}\n{body * limit}") == {head[:-1].split()[1].removesuffix("()")}
    assert too_long(f"@d\n{head}\n{body * (limit - 1)}") != set()


def test_importing_the_package_imports_next_to_nothing() -> None:
    code = "import sys, recbole_simdiff; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "recbole", "numpy", "yaml"} & set(done.stdout.split())


def test_the_public_names_exist() -> None:
    assert set(recbole_simdiff.__all__) <= set(dir(recbole_simdiff))
    with pytest.raises(AttributeError, match="module 'recbole_simdiff' has no attribute 'runn'"):
        recbole_simdiff.runn  # noqa: B018
    assert recbole_simdiff.__all__ == sorted(recbole_simdiff.__all__)
    for name in recbole_simdiff.__all__:
        assert getattr(recbole_simdiff, name).__doc__
