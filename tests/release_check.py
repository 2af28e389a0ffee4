"""Build wheel and sdist, install them in a fresh environment of every Python given, train a model.

    make release-check
    python -m tests.release_check PYTHON [PYTHON ...]

Every Python that is not there is named, and is no error; none at all is one. ``test_wheel.py``
looks into the wheel; here its dependencies are resolved, as a user's ``pip install`` does.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOWEST = (3, 11)
TRAINING = ("--model=SASRecCE", "--dataset=ml-100k", "--epochs=1", "--use_gpu=False")


def main(pythons: Sequence[str]) -> int:
    """Check all; the exit code is 1 if something failed or nothing could be checked."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "dist"
        run([sys.executable, "-m", "hatchling", "build", "-d", str(built)], ROOT)
        packages = [next(built.glob("*.whl")), next(built.glob("*.tar.gz"))]
        print("built", ", ".join(path.name for path in packages), flush=True)
        outcomes = [
            check(python, version, packages, Path(folder) / version)
            for python, version in usable(pythons)
        ]
    return 0 if outcomes and all(outcomes) else 1


def usable(pythons: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each Python that starts and is not too old, with its version; the others are named."""
    ask = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
    for python in pythons:
        try:
            done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            print(f"{python}: not on this machine")
            continue
        version = done.stdout.strip()
        if tuple(map(int, version.split(".")[:2])) < LOWEST:
            print(f"{python}: {version} is too old")
            continue
        yield python, version


def check(python: str, version: str, packages: Sequence[Path], folder: Path) -> bool:
    """Install the wheel in a fresh environment, train away from the checkout; then the sdist."""
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    try:
        run([python, "-m", "venv", str(folder)], ROOT)
        (folder / "work").mkdir()
        for package in packages:
            reinstalled = ("--force-reinstall", "--no-deps") * (package is not packages[0])
            run([*pip, *reinstalled, "-c", str(ROOT / "constraints.txt"), str(package)], ROOT)
            run([*pip, "--no-deps", "recbole==1.2.1"], ROOT)
            printed = run([str(folder / "bin" / "recbole-simdiff"), *TRAINING], folder / "work")
            lines = [line for line in printed.splitlines() if line.split()[:1] == ["test"]]
            print(f"Python {version}, {package.name}:", *lines, sep="\n    ", flush=True)
            if not lines:
                return False
    except subprocess.CalledProcessError as error:
        print(f"Python {version}: failed: {error}\n{error.stdout}{error.stderr}", flush=True)
        return False
    return True


def run(command: Sequence[str], folder: Path) -> str:
    """What a command printed; CalledProcessError if it failed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
