"""Seconds, memory and ratios against RecBole; ends with 1 if a figure is not within its limit.

    python -m tests.benchmarks --data_path=DIR [--parts=plain,simdiffrec,...] [--threads=N]
    python -m tests.benchmarks --data_path=DIR --short

DIR holds amazon-beauty/amazon-beauty.inter. Nothing else should run meanwhile. Peak memory is the
kernel's high-water mark of the resident set, reset before each part; parts run from small to large.
A machine's speed drifts, so the ratios to RecBole come from rounds in which both run in turn.
``inference``, ``growth`` and ``peers`` use processes of their own, the others this one. The limits
are in ``figures.py``; --short takes less than three minutes, for every day.
"""

import argparse
import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.dataloader import FullSortEvalDataLoader, TrainDataLoader
from recbole.data.dataset import SequentialDataset
from recbole.evaluator import Collector
from recbole.trainer import Trainer
from recbole.utils import init_seed
from torch.nn import functional as F

from recbole_simdiff.config.config import Config
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.data.recbole_fixes import RecBoleFixes
from recbole_simdiff.evaluation.protocols import PROTOCOLS
from recbole_simdiff.models.diffuasr.generator import DiffuASR
from recbole_simdiff.modules.losses import full_softmax_loss
from recbole_simdiff.modules.transformer import PackedTransformer
from recbole_simdiff.training.trainer import PlanTrainer
from tests.benchmarks import growth, inference, peers
from tests.benchmarks.figures import Figures, Limit
from tests.benchmarks.measure import measured, timed

PLAIN = {"cl_weight": 0.0, "diff_weight": 0.0}

ENCODER, SIMDIFFREC = "(b) both weights 0", "(c) SimDiffRec"

# Models whose ratio to RecBole's SASRec has a limit -> name of the figure.
TO_RECBOLE = {ENCODER: "encoder to RecBole", SIMDIFFREC: "simdiffrec to RecBole"}

SHORT = ("loss", "overhead", "evaluation", "inference", "growth")  # parts of --short


class StockDataset(RecBoleFixes, SequentialDataset):
    """RecBole's own padded rows; only the faults that stop it on today's pandas are closed."""


class Bench:
    """Runs the parts and keeps what they measured."""

    def __init__(self, data_path: str, dataset: str) -> None:
        self.data_path, self.dataset, self.figures = data_path, dataset, Figures()
        self.epochs: dict[str, Callable[[], Callable[[], Any]]] = {}
        self.folder = tempfile.mkdtemp()

    def config(self, model: str, **overrides: Any) -> Config:
        """Configuration on the CPU, quiet."""
        fixed = {"data_path": self.data_path, "use_gpu": False, "show_progress": False}
        fixed["checkpoint_dir"] = self.folder
        return Config(model, self.dataset, overrides={**fixed, **overrides})

    def ready(self, model_name: str, **overrides: Any) -> Callable[[], Any]:
        """What trains one epoch of a model of this package, after a few warm-up steps."""
        config = self.config(model_name, **overrides)
        train, _, _ = create_loaders(config, create_dataset(config))
        init_seed(config["seed"], True)
        model = config.model_class(config, train._dataset)
        trainer = PlanTrainer(config, model, Path(self.folder))
        for batch in list(train)[:3]:
            trainer._step(batch, trainer._updates())

        def epoch() -> None:
            trainer.progress.step = 0  # else it goes on where the last one ended
            trainer._train_epoch(train, 0)

        return epoch

    def ours(self, name: str, model_name: str = "SimDiffRec", **overrides: Any) -> None:
        """One epoch of a model of this package."""
        self.epochs[name] = lambda: self.ready(model_name, **overrides)
        with measured() as memory:
            seconds = timed(self.epochs[name]())
        print(f"{name:<40} {seconds:7.1f} s an epoch, peak {memory.peak:.2f} GiB", flush=True)

    def overhead(self, n_batches: int = 12, rounds: int = 5) -> None:
        """SimDiffRec and CaDiRec beside the encoder: some batches of the default rows, in turn."""
        models = {"encoder": ("SASRecCE", {}), "simdiffrec": ("SimDiffRec", {})}
        models["cadirec"] = ("CaDiRec", {"sr_loss": "CE"})
        work: dict[str, Callable[[], None]] = {}
        for name, (model_name, values) in models.items():
            config = self.config(model_name, train_batch_size=256, **values)
            train, _, _ = create_loaders(config, create_dataset(config))
            init_seed(config["seed"], True)
            model = config.model_class(config, train._dataset)
            trainer = PlanTrainer(config, model, Path(self.folder))
            order = sorted(train.batches(), key=train.n_tokens)
            step = max(1, len(order) // n_batches)
            batches = [train.collate(rows) for rows in order[step // 2 :: step]]
            work[name] = partial(steps_of, trainer, batches)
            work[name]()  # to warm up
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(rounds):
            for name, steps in work.items():
                seconds[name].append(timed(steps))
        print(f"beside the encoder, evenly spaced batches, medians of {rounds} rounds in turn:")
        for name in ("simdiffrec", "cadirec"):
            pairs = zip(seconds[name], seconds["encoder"], strict=True)
            ratio = median(a / b for a, b in pairs)
            print(f"    {name:<36} {ratio:.2f} x the encoder", flush=True)
            self.figures.keep(name, ratio)

    def contrastive(self, plain: str, n_batches: int = 40, rounds: int = 5) -> None:
        """The contrastive models beside the plain encoder, all on the same batches, in turn.

        One encoder pass is the tokens x layers that the plain encoder's Transformer runs on for
        these batches. Every run of a Transformer counts by its own tokens x layers: of encoder,
        generator or discriminator, on any view, with gradient or without; nothing else counts. The
        limit is 1.3 x those passes, or the passes that the method needs where those are fewer.
        """
        models = {plain: "SimDiffRec", "(f) CL4SRec": "CL4SRec", "(g) DuoRec": "DuoRec"}
        models |= {"(h) MCLRec": "MCLRec", "(i) ECLSR": "ECLSR"}
        # The sequence and two views; those five times in two steps; generator and discriminator.
        needed = {"(f) CL4SRec": 3, "(g) DuoRec": 3, "(h) MCLRec": 5, "(i) ECLSR": 4}
        trainers: dict[str, PlanTrainer] = {}
        for name, model_name in models.items():
            weights = PLAIN if name == plain else {}
            config = self.config(model_name, train_sampling="prefix_last", **weights)
            if not trainers:
                train, _, _ = create_loaders(config, create_dataset(config))
            init_seed(config["seed"], True)
            model = config.model_class(config, train._dataset)
            trainers[name] = PlanTrainer(config, model, Path(self.folder))
        order = sorted(train.batches(), key=train.n_tokens)
        step = len(order) // n_batches
        batches = [train.collate(rows) for rows in order[step // 2 :: step]]

        work: dict[str, Counter[bool]] = {}
        for name, trainer in trainers.items():
            with token_layers(trainer.model) as work[name]:
                steps_of(trainer, batches)  # and to warm up
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(rounds):
            for name, trainer in trainers.items():
                seconds[name].append(timed(partial(steps_of, trainer, batches)))

        print(
            f"contrastive models: {len(batches)} of {len(order)} batches of prefix_last, "
            f"evenly spaced by size, scaled to an epoch; medians of {rounds} rounds in turn"
        )
        one = work[plain].total()
        for name, each in seconds.items():
            text = f"    {name:<36} {median(each) * len(order) / len(batches):7.1f} s an epoch"
            if name != plain:
                ratio = median(a / b for a, b in zip(each, seconds[plain], strict=True))
                passes, free = work[name].total() / one, work[name][False] / one
                least = min(passes, needed[name])
                text += f", {ratio:.2f} x {plain[:3]}, limit {1.3 * least:.2f} = 1.3 x {least:.2f} "
                text += f"encoder passes; {passes:.2f} made, {free:.2f} without gradient"
                limit = Limit(1.3 * least, None, f"an epoch : that of {plain[:3]}")
                self.figures.keep(f"contrastive, {name}", ratio, limit)
            print(text, flush=True)

    def stock(self, n_batches: int = 4, rounds: int = 3) -> None:
        """RecBole's SASRec with its own data set, loader, model and trainer: (a).

        After a whole epoch, each model of this package that was measured before runs an epoch in
        turn with some batches of (a), which are all of one shape, scaled to an epoch.
        """
        config = self.config("SASRec", train_batch_size=2048)
        assert not torch.is_anomaly_enabled()
        with measured() as memory:
            train = StockDataset(config).build()[0]
            loader = TrainDataLoader(config, train, None, shuffle=True)
            init_seed(config["seed"], True)
            model = config.model_class(config, train)
            trainer = Trainer(config, model)
            seconds = timed(lambda: trainer._train_epoch(loader, 0))
        name = "(a) RecBole SASRec, CE, batch 2048"
        print(f"{name:<40} {seconds:7.1f} s an epoch, peak {memory.peak:.2f} GiB", flush=True)
        for name, ready in self.epochs.items():
            epoch, ratios = ready(), []
            for _ in range(rounds):
                few = timed(lambda: trainer._train_epoch(islice(loader, n_batches), 0))
                ratios.append(few * len(loader) / n_batches / timed(epoch))
            print(
                f"{name} : (a) = 1 : {median(ratios):.1f} (median of {rounds} rounds in turn, "
                f"{min(ratios):.1f} to {max(ratios):.1f})",
                flush=True,
            )
            if name in TO_RECBOLE:
                self.figures.keep(TO_RECBOLE[name], median(ratios))

    def evaluation(self) -> None:
        """Full ranking of the test part by RecBole's loop and by ours, same kind of model."""
        config = self.config("SASRec", eval_batch_size=4096)
        test = StockDataset(config).build()[2]
        model = config.model_class(config, test)
        stock = Trainer(config, model)
        stock.eval_collector = Collector(config)
        loader = FullSortEvalDataLoader(config, test, None)
        theirs = timed(lambda: stock.evaluate(loader, load_best_model=False))
        ours_config = self.config("SimDiffRec", **PLAIN)
        train, _, test_data = create_loaders(ours_config, create_dataset(ours_config))
        ours_model = ours_config.model_class(ours_config, train._dataset)
        trainer = PlanTrainer(ours_config, ours_model, Path(self.folder))
        one = timed(lambda: trainer.evaluator.evaluate(test_data, PROTOCOLS[:1]))
        both = timed(lambda: trainer.evaluator.evaluate(test_data, PROTOCOLS))
        print(
            f"full evaluation: RecBole {theirs:.2f} s, ours {one:.2f} s ({one / theirs:.2f}), "
            f"both protocols {both:.2f} s ({both / theirs:.2f})",
            flush=True,
        )
        self.figures.keep("evaluation", one / theirs)

    def generation(self, users: int = 30_000, n_items: int = 20_000) -> None:
        """DiffuASR's default generation for a set of users of Yelp's size, histories of 8 items."""
        config = self.config(
            "DiffuASR", backbone="SimDiffRec", diffuasr_embeddings="scratch_trainable"
        )
        generator = torch.Generator().manual_seed(0)
        history = torch.randint(1, n_items, (users, 8), generator=generator)
        model = DiffuASR(config, n_items, None)
        ids = torch.arange(1, users + 1)
        with measured() as memory:
            seconds = timed(lambda: model.generate(history, ids, history[:, 0], 0))
        print(
            f"generation: {users:,} users, M = {config['n_pseudo']}, "
            f"{config['diffuasr_sample_steps']} steps, {config['diffuasr_guidance']}: "
            f"{seconds:.0f} s, peak {memory.peak:.2f} GiB",
            flush=True,
        )

    def raw(self, lines: int = 2_023_070) -> None:
        """The settings' filters on a file as long as Amazon's raw one: they must lead back.

        The prepared lines lie scattered between others that no 5-core holds: rare items of known
        users, known items of rare users, and users with eight lines, half of them of rare items.
        """
        rng = np.random.default_rng(0)
        source = Path(self.data_path, self.dataset, f"{self.dataset}.inter")
        core = pd.read_csv(source, sep="\t", dtype=str)
        user, item = core.columns[:2]
        extra = rng.choice(core.to_numpy(), lines - len(core))
        kind, k = np.divmod(np.arange(len(extra)), len(extra) // 3 + 1)
        extra[kind == 0, 1] = [f"rare-{n}" for n in k[kind == 0] // 4]
        extra[kind == 1, 0] = [f"rare-{n}" for n in k[kind == 1] // 4]
        extra[kind == 2, 0] = [f"eight-{n}" for n in k[kind == 2] // 8]
        half = (kind == 2) & (k % 2 == 0)
        extra[half, 1] = [f"half-{n}" for n in k[half] // 8]
        everything = pd.concat([core, pd.DataFrame(extra, columns=core.columns)])
        folder = Path(self.folder, "raw", self.dataset)
        folder.mkdir(parents=True)
        everything = everything.iloc[rng.permutation(lines)]
        everything.to_csv(folder / source.name, sep="\t", index=False)

        def actions(data_path: str | Path) -> set[tuple[str, str]]:
            dataset = create_dataset(self.config("SimDiffRec", data_path=str(data_path)))
            dataset.build()
            ids = [name.partition(":")[0] for name in (user, item)]
            columns = (dataset.id2token(name, dataset.flat[name].numpy()) for name in ids)
            return set(zip(*columns, strict=True))

        prepared, found = actions(self.data_path), set[tuple[str, str]]()
        with measured() as memory:
            seconds = timed(lambda: found.update(actions(folder.parent)))
        assert found == prepared
        print(
            f"5-core of {everything[user].nunique():,} users, {everything[item].nunique():,} "
            f"items, {lines:,} lines: the {len(found):,} lines of the prepared file, "
            f"{seconds:.0f} s, peak {memory.peak:.2f} GiB",
            flush=True,
        )

    def softmax_loss(self, tokens: int = 1466, n_items: int = 12_102) -> None:
        """Forward and backward of the full-softmax loss: dense, torch's chunked one, ours."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, 64, generator=generator, requires_grad=True)
        table = torch.randn(n_items, 64, generator=generator, requires_grad=True)
        label = torch.randint(1, n_items, (tokens,), generator=generator)

        candidates: dict[str, Callable[[], torch.Tensor]] = {
            "dense": lambda: F.cross_entropy(hidden @ table.t(), label, reduction="sum"),
            "ours": lambda: full_softmax_loss(hidden, table, label),
        }
        if hasattr(F, "linear_cross_entropy"):
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
            candidates["F.linear_cross_entropy, 256 rows"] = lambda: F.linear_cross_entropy(
                hidden, table, label, reduction="sum", options=options
            )
        print(f"full-softmax loss, {tokens} tokens x {n_items} items, forward and backward:")
        seconds = {}
        for name, loss in candidates.items():
            loss().backward()
            seconds[name] = min(timed(lambda loss=loss: loss().backward()) for _ in range(7))
            print(f"    {name:<36} {seconds[name] * 1e3:6.1f} ms", flush=True)
        self.figures.keep("softmax", seconds["ours"] / seconds["dense"])


def steps_of(trainer: PlanTrainer, batches: Sequence[Any]) -> None:
    """A step on each batch."""
    for batch in batches:
        trainer._step(batch, trainer._updates())


@contextlib.contextmanager
def token_layers(model: torch.nn.Module) -> Iterator[Counter[bool]]:
    """Tokens x layers that a model's Transformers run on in the block; True: with gradient."""
    found: Counter[bool] = Counter()

    def count(transformer: Any, inputs: Any) -> None:
        found[torch.is_grad_enabled()] += len(inputs[0]) * len(transformer.layer)

    transformers = [m for m in model.modules() if isinstance(m, PackedTransformer)]
    hooks = [transformer.register_forward_pre_hook(count) for transformer in transformers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def parts_of(bench: Bench, short: bool, python: str) -> dict[str, Callable[[], Any]]:
    """Every part by its name, in their order: from small to large."""
    return {
        "loss": bench.softmax_loss,
        "overhead": partial(bench.overhead, rounds=3) if short else bench.overhead,
        "plain": lambda: bench.ours(ENCODER, **PLAIN),
        "simdiffrec": lambda: bench.ours(SIMDIFFREC),
        "cadirec": lambda: bench.ours("(d) CaDiRec", "CaDiRec"),
        "dreamrec": lambda: bench.ours("(e) DreamRec", "DreamRec"),
        "bf16": lambda: (
            bench.ours(f"{ENCODER}, bf16", **PLAIN, enable_amp=True),
            bench.ours(f"{SIMDIFFREC}, bf16", enable_amp=True),
        ),
        "contrastive": lambda: bench.contrastive(f"{ENCODER}, prefix_last"),
        "raw": bench.raw,
        "generation": bench.generation,
        "inference": lambda: inference.run(bench.figures, short),
        "growth": lambda: growth.run(bench.figures, short),
        "evaluation": bench.evaluation,
        "stock": bench.stock,
        "peers": lambda: peers.run(bench.data_path, bench.ready, python),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for; 1 if a figure is not within its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="dataset")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="less than three minutes")
    parser.add_argument("--parts", help="names, separated by commas; by default all, or of --short")
    parser.add_argument("--peers", default=sys.executable, help="a Python that has RecTools")
    given = parser.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    bench = Bench(given.data_path, "amazon-beauty")
    parts = parts_of(bench, given.short, given.peers)
    names = given.parts.split(",") if given.parts else SHORT if given.short else tuple(parts)
    for name in names:
        if name not in parts:
            parser.error(f"--parts: {name} must be of {', '.join(parts)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, amazon-beauty")
    for name in names:
        parts[name]()
    if bench.figures.values:
        print(f"figures with a limit:\n{bench.figures.table()}", flush=True)
    return int(bool(bench.figures.missed()))


if __name__ == "__main__":
    sys.exit(main())
