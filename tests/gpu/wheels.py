"""Collect the wheels that ``tests.gpu`` needs on a machine with torch and no package index.

    python -m tests.gpu.wheels --output=.whl --without=numpy,scipy

They are the needs of this package and of RecBole, as this environment has them, for Linux on
x86-64; torch is none of them. There, with the repository's folder as the working directory:

    python3 -m pip install --no-index --no-deps --target site .whl/*.whl
    PYTHONPATH=site python3 -m tests.gpu --data_path=dataset --output=gpu
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import requires, version
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
# From Python 3.12 on no dependency of this package, see pyproject.toml. Its own needs are ours.
WITHOUT_NEEDS = "recbole"


def needed(without: Iterable[str]) -> list[str]:
    """Names of what must travel, in alphabetical order.

    Args:
        without (Iterable): what the machine has; its needs are left out, too.
    """
    environment = {**default_environment(), "python_version": PYTHON, "extra": ""}
    environment["python_full_version"] = f"{PYTHON}.0"
    left_out = {canonicalize_name(name) for name in ("torch", *without)}
    found, waiting = {WITHOUT_NEEDS}, ["recbole_simdiff"]
    while waiting:
        for text in requires(waiting.pop()) or ():
            need = Requirement(text)
            name = canonicalize_name(need.name)
            if need.marker and not need.marker.evaluate(environment):
                continue
            if name not in left_out | found:
                found.add(name)
                waiting.append(name)
    return sorted(found - left_out)


def main(arguments: list[str] | None = None) -> int:
    """Download them; pip's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path, help="folder of the wheels")
    parser.add_argument("--without", default="", help="what the machine has, besides torch")
    given = parser.parse_args(arguments)
    names = needed(filter(None, given.without.split(",")))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", "--dest", str(given.output)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    code = subprocess.run([*command, *(f"{name}=={version(name)}" for name in names)]).returncode
    size = sum(path.stat().st_size for path in given.output.glob("*.whl")) / 2**20
    print(f"{len(names)} wheels, {size:.0f} MiB: {', '.join(names)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
