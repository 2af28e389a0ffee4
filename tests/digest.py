"""Print a digest of what every model computes on toy data, to compare two states of the code.

    python -m tests.digest                  all models and presets, about two minutes
    python -m tests.digest SASRec official  only lines that contain one of these words

Each line is a training of two epochs on 60 users and 150 items: model, preset or backbone, and
checksums of its weights, its metrics (all splits and protocols) and its recommendations. A change
of structure leaves every line as it was; one machine and one version of torch are assumed. What is
called is the command line, so that the script does not depend on where the code is.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import random
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
PROPERTIES = ROOT / "properties"
COMMAND = str(ROOT / "run_recbole_simdiff.py")
SMALL = ["--epochs=2", "--train_batch_size=64", "--MAX_ITEM_LIST_LENGTH=8", "--topk=[2,5]"]
SMALL += ["--valid_metric=NDCG@5", "--use_gpu=False", "--show_progress=False", "--seed=7"]
FEATURES = "--load_col={inter: [user_id, item_id, timestamp, label], item: [item_id, brand]}"
WITH_FEATURES = {"DIN", "FDSA", "GRU4RecF", "S3Rec", "SASRecF"}
# What a model of toy size needs besides.
NEEDS = {
    "DiffuASR": ["--diffuasr_epochs=2", "--n_pseudo=2", "--diffuasr_windows=all"],
    "FDSA": ["--selected_features=[brand]"],
    "GRU4RecF": ["--selected_features=[brand]"],
    "S3Rec": ["--item_attribute=brand", "--pretrain_epochs=1"],
    "SASRecF": ["--selected_features=[brand]"],
    "SimDiffRec": ["--k_noise=5"],
}
BACKBONES = ("SimDiffRec", "GRU4Rec", "BERT4Rec")


def main(words: list[str]) -> None:
    """Print a line a training."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data" / "toy")
        os.chdir(folder)
        for label, arguments in trainings():
            if not words or any(word in label for word in words):
                print(f"{label:<32}", *digest(folder, arguments), flush=True)


def trainings() -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of every training."""
    spaces = {path.stem for path in PROPERTIES.glob("*/*.hyper")} | {"Pop"}  # nothing to search
    for model in sorted(spaces):
        yield model, [f"--model={model}"]
    for preset in sorted((PROPERTIES / "preset").glob("*/*.yaml")):
        model = preset.parent.name
        values = [f"--model={model}", f"--preset={preset.stem}", "--epochs=2"]
        yield f"{model} {preset.stem}", values
    for backbone in BACKBONES:
        yield f"DiffuASR on {backbone}", ["--model=DiffuASR", f"--backbone={backbone}"]
    for guidance in ("none", "classifier"):
        yield f"DiffuASR {guidance}", ["--model=DiffuASR", f"--diffuasr_guidance={guidance}"]


def digest(folder: Path, arguments: list[str]) -> list[str]:
    """Checksums of one training's weights, metrics and recommendations."""
    model = arguments[0].removeprefix("--model=")
    saved = folder / "saved" / str(len(list(folder.glob("saved/*"))))
    values = [*arguments, "--dataset=toy", f"--data_path={folder / 'data'}", *NEEDS.get(model, [])]
    given = {value.partition("=")[0] for value in values}
    values += [value for value in SMALL if value.partition("=")[0] not in given]
    if model in WITH_FEATURES:
        values.append(FEATURES)
    output = command(*values, f"--checkpoint_dir={saved}")
    results = sorted(saved.glob("*/result.json"))
    if not results:
        return [f"failed: {output.strip().splitlines()[-1]}"]
    run = results[-1].parent
    tensors = load_file(run / "best.safetensors")
    weights = hashlib.blake2b(digest_size=6)
    for key in sorted(tensors):
        if key.startswith("model."):
            weights.update(key.encode() + tensors[key].numpy().tobytes())
    result = json.loads(results[-1].read_text())
    metrics = json.dumps([result["valid"], result["test"], result["best_epoch"]], sort_keys=True)
    lists = command("recommend", f"--checkpoint={run}", "--all_users", "--k=5", "--format=csv")
    rows = list(csv.reader(io.StringIO(lists)))
    # Models that read more of the data set than its size are not built from a checkpoint alone.
    found = short(json.dumps(rows)) if len(rows) > 1 else "no list"
    return [weights.hexdigest(), short(metrics), found]


def command(*arguments: str) -> str:
    """Run the program in this process; what it printed."""
    before, sys.argv = sys.argv, [COMMAND, *arguments]
    with io.StringIO() as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_path(COMMAND, run_name="__main__")
        except SystemExit:
            pass
        except Exception as error:  # of a model that toy data are too small for
            print(f"{type(error).__name__}: {error}")
        sys.argv = before
        return out.getvalue()


def short(text: str) -> str:
    """Twelve hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def write_data(folder: Path) -> None:
    """60 users with 6 to 14 of 150 items; every item has one of 4 brands."""
    draw = random.Random(5)
    folder.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float\tlabel:float"]
    for user in range(60):
        for time, item in enumerate(draw.sample(range(150), draw.randint(6, 14))):
            lines.append(f"u{user}\ti{item}\t{time}\t{draw.randint(0, 1)}")
    (folder / "toy.inter").write_text("\n".join(lines) + "\n")
    brands = [f"i{item}\tb{item % 4}" for item in range(150)]
    (folder / "toy.item").write_text("\n".join(["item_id:token\tbrand:token", *brands]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
