"""Every documented command line and block of Python runs, on a part of ml-100k.

    python -m pytest tests/test_docs_run.py -m slow

The data sets that the pages name are made of 80 users of ml-100k, which RecBole ships. Trainings
end after an epoch. ``saved/<run>`` is a run of SASRecCE, ``saved/RUN`` the last one of the page.
"""

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import recbole
import yaml

import recbole_simdiff
from recbole_simdiff.cli.main import main
from recbole_simdiff.cli.parser import split
from tests.test_docs import ROOT, python_blocks

SCRIPT = ROOT / "run_recbole_simdiff.py"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Beginning of a line that cannot run here -> why.
CANNOT_RUN = {
    "checkpoint push": "needs the Hugging Face Hub and a login",
    "checkpoint pull": "needs the Hugging Face Hub",
    "tune --dataset=amazon-beauty --trials=100": "needs a PostgreSQL server that machines share",
    "tune --engine=ray --jobs=8": "needs a Ray cluster",
}
SHORT = {"epochs": 1, "use_gpu": False, "show_progress": False}
# What an option of a page is here: the same with less work.
LESS = {"--trials": "2", "--nproc": "2", "--epochs": "1", "--seeds": "1"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and the files that the pages name, and two runs."""
    folder = tmp_path_factory.mktemp("docs")
    table = interactions()
    for name in ("ml-100k", "amazon-beauty", "ml-1m", "shop"):
        target = folder / "dataset" / name
        target.mkdir(parents=True)
        table.to_csv(target / f"{name}.inter", sep="\t", index=False)
    table.columns = [column.partition(":")[0] for column in table.columns]
    log = table.rename(columns={"user_id": "customer", "item_id": "sku", "timestamp": "bought_at"})
    log.to_csv(folder / "log.csv", index=False)
    table[["user_id", "item_id", "rating", "timestamp"]].to_csv(
        folder / "ratings.dat", sep=":", index=False, header=False
    )
    text = (folder / "ratings.dat").read_text().replace(":", "::")
    (folder / "ratings.dat").write_text(text)
    histories = (f'{{"user": "u{n}", "items": ["50", "181"]}}\n' for n in range(3))
    (folder / "histories.jsonl").write_text("".join(histories))
    (folder / "sold_out.txt").write_text("50\n")
    (folder / "licensed.txt").write_text("\n".join(table["item_id"].unique()))
    (folder / "a.yaml").write_text("hidden_dropout_prob: 0.2\n")
    (folder / "b.yaml").write_text("attn_dropout_prob: 0.2\n")
    (folder / "model.hyper").write_text("learning_rate choice [0.001, 0.003]\n")
    page = (ROOT / "docs" / "your-model.md").read_text()
    (code,) = re.findall(r"<!-- example: mine\.py -->\n```python\n(.*?)```", page, re.DOTALL)
    (folder / "mine.py").write_text(code)
    items = np.array(sorted(table["item_id"].unique()))
    vectors = np.random.default_rng(0).normal(size=(len(items), 384)).astype(np.float32)
    np.savez(folder / "text.npz", ids=items, vectors=vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for model, place in (("SASRecCE", "base"), ("Pop", "other")):
            line = f"--model={model} --dataset=amazon-beauty --save_rankings=True"
            assert main([*shlex.split(line), *short(), f"--checkpoint_dir={place}"]) == 0
    lists = pd.read_csv(first_run(folder / "base") / "ranks.csv", dtype=str)[["user", "item"]]
    lists.assign(rank=1).to_csv(folder / "lists.csv", index=False)
    return folder


def interactions() -> pd.DataFrame:
    """The newest 30 interactions of 80 users of ml-100k, among them those that pages name."""
    path = Path(recbole.__file__).parent / "dataset_example" / "ml-100k" / "ml-100k.inter"
    table = pd.read_csv(path, sep="\t", dtype=str)
    table = table.sort_values("timestamp:float", kind="stable")
    users = ["1", "2", "186", "196"]
    users += [user for user in table["user_id:token"].unique() if user not in users][:76]
    chosen = table[table["user_id:token"].isin(users)]
    return chosen.groupby("user_id:token").tail(30)


def short() -> list[str]:
    """``SHORT`` as arguments."""
    return [f"--{key}={value}" for key, value in SHORT.items()]


def lines_of(text: str) -> list[str]:
    """Arguments of every command of the package on a page, ``$R`` resolved, in order."""
    text = text.replace("\\\n", " ")
    script = r"(?:python run_recbole_simdiff\.py|recbole-simdiff)"
    found, prefix = [], ""
    cells = rf"\| `(?:[A-Z_]+=\S+ )?{script} ([^`]*)` \|$"
    plain = rf"^ *(?:[A-Z_]+=\S+ )?{script} (.*)$"
    for line in text.splitlines():
        if match := re.match(r' *R="(.*)"$', line):
            value = match[1].replace("$R", prefix)
            prefix = re.sub(rf"^{script} ", "", value)
        elif match := re.match(r" *\$R (.*)$", line):
            found.append(f"{prefix} {match[1]}")
        elif match := re.match(plain, line) or re.search(cells, line):
            found.append(match[1])
    return [line.partition("   #")[0].partition("  # ")[0].strip() for line in found]


def first_run(folder: Path) -> Path:
    """The oldest run of a folder: `replay` writes another one beside it."""
    return min(folder.glob("*-amazon-beauty-*"))


def arguments_of(line: str, folder: Path) -> list[str]:
    """What is run in place of a documented line."""
    base, other = first_run(folder / "base"), first_run(folder / "other")
    line = line.replace("<run of the encoder>", str(base))
    line = line.replace("saved/<run>", str(base)).replace("saved/<other>", str(other))
    if "saved/RUN" in line:
        newest = max((folder / "saved").glob("MyRec-*"), key=lambda run: run.stat().st_mtime)
        line = line.replace("saved/RUN", str(newest))
    words = shlex.split(line)
    words = [word for word in words if not word.startswith("--diffuasr_epochs")]
    names = [word.partition("=")[0] for word in words]
    words = [
        f"{name}={LESS[name]}" if name in LESS else word
        for name, word in zip(names, words, strict=True)
    ]
    if split(words)[0] in ("train", "benchmark", "ablate", "tune") and "--resume" not in names:
        words += [word for word in short() if word.partition("=")[0] not in names]
        if words[0] in ("benchmark", "ablate") and "--seeds" not in names:
            words.append("--seeds=1")
        if "table2" in words:  # DiffuASR's generator takes minutes; README.md has a line of it
            spec = yaml.safe_load((ROOT / "properties/experiment/table2.yaml").read_text())
            words.append(f"--models={','.join(row for row in spec['rows'] if row != 'DiffuASR')}")
        words += ["--diffuasr_epochs=1"] * ("--model=DiffuASR" in words)
    return words


def test_every_page_with_a_command_is_read() -> None:
    found = {page.name: len(lines_of(page.read_text())) for page in PAGES}
    typed = {page.name: page.read_text().count("python run_recbole_simdiff.py ") for page in PAGES}
    for name, number in typed.items():
        assert found[name] >= number - 2 * (name == "results.md"), name  # its two lines R=
    assert sum(found.values()) >= 70


def test_lines_that_cannot_run_are_still_there() -> None:
    lines = [line for page in PAGES for line in lines_of(page.read_text())]
    for start in CANNOT_RUN:
        assert any(line.startswith(start) for line in lines), start


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(
    page: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(workspace)
    for name in ("WANDB_MODE", "WANDB_SILENT"):
        monkeypatch.setenv(name, "offline" if name == "WANDB_MODE" else "true")
    for line in lines_of(page.read_text()):
        if line.startswith(tuple(CANNOT_RUN)):
            continue
        words = arguments_of(line, workspace)
        if "prepare" in words:  # it does not overwrite
            (output,) = (word.partition("=")[2] for word in words if word.startswith("--output"))
            shutil.rmtree(workspace / output, ignore_errors=True)
        begun = time.monotonic()
        if words[0] == "serve":
            code = serve(words, workspace)
        elif "--nproc=2" in words:  # starts the program again
            code = subprocess.run([sys.executable, str(SCRIPT), *words]).returncode
        else:
            code = main(words)
        out, err = capsys.readouterr()
        assert code == 0, f"{page.name}: {line}\n{shlex.join(words)}\n{out[-3000:]}\n{err[-3000:]}"
        with capsys.disabled():
            print(f"{time.monotonic() - begun:7.1f} s  {page.name}: {line}")


def serve(words: list[str], folder: Path) -> int:
    """Start the server, ask whether it is healthy, stop it; its exit code."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [f"--port={port}" if word.startswith("--port") else word for word in words]
    server = subprocess.Popen([sys.executable, str(SCRIPT), *words], cwd=folder)
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert json.load(answer)["model"] == "SASRecCE"
                break
            except OSError:
                assert server.poll() is None
                time.sleep(1)
        else:
            raise AssertionError("the server does not answer")
        server.send_signal(signal.SIGTERM)
        return server.wait(60)
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.syspath_prepend(str(workspace))
    for name in ("run", "benchmark"):
        whole = getattr(recbole_simdiff, name)
        monkeypatch.setattr(recbole_simdiff, name, lambda *a, _f=whole, **k: _f(*a, **k | SHORT))
    base = first_run(workspace / "base")
    times = {"session": "user_id", "sku": "item_id", "ts": "timestamp"}
    table = interactions().rename(columns=lambda column: column.partition(":")[0])
    names = {"df": pd.DataFrame({new: table[old] for new, old in times.items()})}
    names["df"]["ts"] = names["df"]["ts"].astype(float)
    for block in python_blocks(page.read_text()):
        exec(compile(block.replace("saved/<run>", str(base)), page.name, "exec"), names)
