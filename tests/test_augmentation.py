"""DiffuASR from data to result: what each stage may read, what is kept, and that it repeats."""

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.data.dataset import SequentialDataset
from torch import Tensor
from torch.nn import functional as F

from recbole_simdiff import checkpoint, evaluate, files, load
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.config.config import Config
from recbole_simdiff.config.layers import properties_dir, read_yaml
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.data.recbole_fixes import RecBoleFixes
from recbole_simdiff.errors import Interrupted, TrainingDiverged, UserError
from recbole_simdiff.evaluation.protocols import KEPT
from recbole_simdiff.models.diffuasr.generator import GENERATION_KEYS, DiffuASR, training_pairs
from recbole_simdiff.models.diffuasr.guide import Guide
from recbole_simdiff.models.diffuasr.random_items import random_from_history, random_items
from recbole_simdiff.pipelines import diffuasr as augmentation
from recbole_simdiff.pipelines import generation, pairs, report
from recbole_simdiff.pipelines.diffuasr import augment, export, run_stages
from recbole_simdiff.pipelines.report import quality
from recbole_simdiff.runs.build import build_run
from recbole_simdiff.runs.identity import fingerprint
from recbole_simdiff.runs.restore import stored_config
from recbole_simdiff.runs.result import RESULT, read_result
from recbole_simdiff.runs.run import run_one as run
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import write_inter

N_ITEMS = 20


def histories() -> dict[str, list[str]]:
    """16 users of 2 to 24 items. The first meets i1, i2, ... in training: their numbers are 1, 2,
    ... whatever the others do."""
    draw = random.Random(0)
    lengths = [2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 5, 6, 7, 8, 4]
    items = range(1, N_ITEMS + 1)
    others = {f"u{k}": draw.choices(items, k=n) for k, n in enumerate(lengths)}
    every = {"all": [*items, 1, 2, 3, 4], **others}
    return {user: [f"i{number}" for number in items] for user, items in every.items()}


HISTORIES = histories()
TINY: dict[str, Any] = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": 8,
    "train_batch_size": 16,
    "topk": [1, 5],
    "valid_metric": "NDCG@5",
    "length_groups": [3, 6],
    "show_progress": False,
    "use_gpu": False,
    "epochs": 1,
    "n_pseudo": 2,
    "diffuasr_diffusion_steps": 25,
    "diffuasr_sample_steps": 3,
    "diffuasr_epochs": 2,
    "diffuasr_monitor": "train_loss",
    "sunet_channel_mult": [1, 2],
    "sunet_base_channels": 8,
    "hidden_size": 16,
}
BACKBONES: dict[str, dict[str, Any]] = {
    "SimDiffRec": {"inner_size": 16, "cl_weight": 0.0, "diff_weight": 0.0, "k_noise": 3},
    "SASRec": {"inner_size": 16},
    "GRU4Rec": {"embedding_size": 16},
    "BERT4Rec": {"inner_size": 16, "mask_ratio": 0.6},
}
Configure = Callable[..., Config]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """configure(backbone, key=value, ...): of DiffuASR on toy, in folders of its own."""
    write_inter(tmp_path / "dataset", "toy", HISTORIES)

    def make(backbone: str = "GRU4Rec", dataset: str = "toy", **changes: Any) -> Config:
        folders = {"data_path": "dataset", "checkpoint_dir": "saved", "augmentation_cache": "cache"}
        places = {key: str(tmp_path / name) for key, name in folders.items()}
        values = TINY | BACKBONES[backbone] | places | {"backbone": backbone} | changes
        return Config("DiffuASR", dataset, overrides=values)

    return make


def training_part(config: Config) -> Any:
    """The training part, as the baseline has it."""
    return create_dataset(config).build()[0]


def flat(histories: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(items, ends) of user 0 (padding, without items), user 1, ..."""
    counts = torch.tensor([0, *map(len, histories)])
    return torch.tensor([item for items in histories for item in items]), counts.cumsum(0)


def pseudo_file(config: Config) -> Path:
    (path,) = Path(config["augmentation_cache"]).glob("*.safetensors")
    return path


def generator_file(config: Config) -> Path:
    (path,) = Path(config["augmentation_cache"]).glob(f"diffuser-*/{LAST}")
    return path


def assert_equal_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Bit for bit; NaN equals NaN."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def n_held(items: list[str]) -> int:
    """How many of a user's items are held out for validation and test."""
    return {1: 0, 2: 0, 3: 1}.get(len(items), 2)


def training_histories() -> list[list[int]]:
    """Numbers of the training items of user 1, user 2, ..."""
    return [
        [int(item[1:]) for item in items[: len(items) - n_held(items)]]
        for items in HISTORIES.values()
    ]


def rows_of(batch: Any) -> list[tuple[int, tuple[int, ...], int]]:
    """(user, history, target) of each row."""
    return [
        (user, tuple(seq[:n]), target)
        for user, seq, n, target in zip(
            *(batch[key].tolist() for key in ("user_id", "item_id_list", "item_length", "item_id")),
            strict=True,
        )
    ]


def assert_same(found: Any, wanted: Any, but: Sequence[str] = ()) -> None:
    """What two runs found, wherever and however long they ran."""
    for part in ("valid", "test", "by_length", "best_epoch", "epochs", "augmentation"):
        if part not in but:
            assert getattr(found, part) == getattr(wanted, part), part


class Crash(Exception):
    """Stands for a power cut: nothing is saved."""


def interrupt() -> None:
    """Ctrl-C, as the operating system delivers it."""
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    """What a batch system sends."""
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise Crash


def stopping(stock: Any, at: int, act: Callable[[], None] = terminate) -> Any:
    """``stock``, but ``act`` is called before call number ``at``, counted from 1."""
    calls = 0

    def call(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            act()
        return stock(*given)

    return call


# ---------------------------------------------------------------------- the whole road


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        ("SimDiffRec", {"diffuasr_guidance": "classifier_free"}),
        ("SASRec", {"diffuasr_guidance": "classifier"}),
        ("GRU4Rec", {"diffuasr_guidance": "classifier", "pseudo_mix": "replace"}),
        ("BERT4Rec", {"diffuasr_guidance": "none", "pseudo_at_evaluation": True}),
        ("SASRec", {"preset": "official", "sunet_channel_mult": [1]}),
        ("SimDiffRec", {"augmenter": "random_seq", "train_sampling": "prefix_last"}),
        ("BERT4Rec", {"augmenter": "random"}),
        ("GRU4Rec", {"augmenter": "random_seq", "loss_type": "BPR", "n_pseudo": 30}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value.values())),
)
def test_a_backbone_on_augmented_data(
    configure: Configure, backbone: str, changes: dict[str, Any]
) -> None:
    """Trained, told apart from the backbone alone, evaluated again and used from its checkpoint."""
    config = configure(backbone, **changes)
    result = run_stages(config)
    run_dir = Path(result.run_dir)
    assert run_dir.parent == Path(config["checkpoint_dir"])
    assert run_dir.name.startswith("DiffuASR-toy-")
    assert read_result(run_dir) == result
    assert result.config["model"] == "DiffuASR"
    notes = result.augmentation
    assert (notes["backbone"], notes["augmenter"]) == (backbone, config["augmenter"])
    assert Path(notes["pseudo"]) == pseudo_file(config)
    assert set(notes["quality"]) == {"this augmenter", "random", "random_seq"}
    assert result.statistics == {
        "users": 16,
        "items": 20,
        "actions": sum(map(len, HISTORIES.values())),
        "pairs": sum(len(set(items)) for items in HISTORIES.values()),
        "ties": 0,
    }

    tensors, content = checkpoint.load(run_dir / BEST)
    pseudo = checkpoint.load(pseudo_file(config))[0]["pseudo"]
    made = tensors["data.pseudo"]
    assert torch.equal(made[1:], pseudo[1:])
    assert made.shape == (17, config["n_pseudo"])
    assert made[0].eq(0).all()
    assert made[1:].min() >= 1
    assert made.max() <= N_ITEMS
    assert content["augmentation"] == notes

    again = evaluate(run_dir)
    for part in ("valid", "test", "by_length", "augmentation", "best_epoch"):
        assert getattr(again, part) == getattr(result, part), part
    alone = run(config.backbone())
    assert notes["baseline"]["test"] == alone.test
    assert notes["baseline"]["by_length"] == alone.by_length

    if config["pseudo_at_evaluation"]:
        with pytest.raises(UserError, match="was trained with pseudo_at_evaluation=True"):
            load(run_dir)
    else:
        (found,) = load(run_dir, use_gpu=False).recommend([["i1", "i2"]], k=5)
        assert len(set(found.items)) == 5


@pytest.mark.parametrize("backbone", ["SimDiffRec", "BERT4Rec"])
def test_the_last_stage_is_resumed(
    configure: Configure, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happened to the cache; with both kinds of training loader."""
    config = configure(backbone, augmenter="random", epochs=2)
    wanted = run_stages(config)
    with monkeypatch.context() as patch:
        patch.setattr(PlanTrainer, "_step", stopping(PlanTrainer._step, 2))
        with pytest.raises(Interrupted) as stopped:
            run_stages(config)
    assert not stopped.value.same_command
    assert stopped.value.run_dir.parent == Path(config["checkpoint_dir"])
    pseudo_file(config).unlink()
    last = stopped.value.run_dir / LAST
    found = run(stored_config(checkpoint.load(last)[1], {}, ()), last)
    assert_same(found, wanted)
    weights, others = (
        checkpoint.subset(checkpoint.load(Path(r.run_dir) / LAST)[0], "model")
        for r in (found, wanted)
    )
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("mix", ["both", "replace"])
@pytest.mark.parametrize("backbone", ["GRU4Rec", "SimDiffRec"])
def test_the_last_stage_trains_on_the_pseudo_items(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, backbone: str, mix: str
) -> None:
    """T22, T23: real histories and targets in full, pseudo-items only where there is room."""
    styles = {} if backbone == "GRU4Rec" else {"train_sampling": "prefix_last"}
    config = configure(backbone, augmenter="random", pseudo_mix=mix, **styles)
    expected: Counter[Any] = Counter()
    pseudo = augment(config).pseudo.tolist()
    for user, items in enumerate(training_histories(), start=1):
        for place in range(1, len(items)):
            seq = items[max(0, place - 8) : place]
            room = min(2, 8 - place) if place < 8 else 0
            rows = [pseudo[user][2 - room :] + seq] if room else []
            rows += [seq] if mix == "both" or not room else []
            expected.update((user, tuple(row), items[place]) for row in rows)

    batches: list[Any] = []
    stock = PlanTrainer._step

    def record(self: Any, batch: Any, *rest: Any) -> Any:
        batches.append(batch)
        return stock(self, batch, *rest)

    monkeypatch.setattr(PlanTrainer, "_step", record)
    run_stages(config)
    assert Counter(row for batch in batches for row in rows_of(batch)) == expected


def test_one_item_one_pair_at_a_time(configure: Configure) -> None:
    """T34."""
    config = configure(n_pseudo=1, diffuasr_batch_size=1, diffuasr_epochs=1, train_batch_size=1)
    result = run_stages(config)
    assert result.augmentation["log"]["pairs"] > 1
    assert checkpoint.load(pseudo_file(config))[0]["pseudo"].shape == (17, 1)


def test_groups_by_length_hold_the_same_rows_with_and_without(configure: Configure) -> None:
    """Pseudo-items before a history make no long history of it."""
    for at_evaluation in (False, True):
        config = configure(augmenter="random", pseudo_at_evaluation=at_evaluation)
        result = run_stages(config)
        rows = {group: values["rows"] for group, values in result.by_length.items()}
        without = result.augmentation["baseline"]["by_length"]
        assert rows == {group: values["rows"] for group, values in without.items()}
        assert rows == {"1-3": 3, "4-6": 6, "7+": 6}


def test_pre_split_sequences_are_refused(configure: Configure, tmp_path: Path) -> None:
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    for part in ("train", "valid", "test"):
        text = header + "".join(f"u{k}\ti1 i{k + 2}\ti{k + 1}\n" for k in range(6))
        (tmp_path / "dataset" / "toy" / f"toy.{part}.inter").write_text(text)
    config = configure(
        load_col={"inter": ["user_id", "item_id_list", "item_id"]},
        alias_of_item_id=["item_id_list"],
        benchmark_filename=["train", "valid", "test"],
    )
    with pytest.raises(
        UserError, match="DiffuASR needs one interaction a line; benchmark_filename"
    ):
        augment(config)


# ---------------------------------------------------------------------- what may be read


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        (
            "SimDiffRec",
            {
                "diffuasr_guidance": "classifier",
                "diffuasr_guide_in_training": True,
                "diffuasr_cg_label": "seq",
            },
        ),
        ("GRU4Rec", {"diffuasr_guidance": "classifier", "diffuasr_windows": "all"}),
        ("BERT4Rec", {"diffuasr_condition": "sum"}),
        ("BERT4Rec", {"augmenter": "random"}),
        ("BERT4Rec", {"augmenter": "random_seq"}),
    ],
    ids=["classifier in training", "classifier", "classifier-free", "random", "random_seq"],
)
def test_no_stage_reads_what_is_held_out(
    configure: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backbone: str,
    changes: dict[str, Any],
) -> None:
    """T17: every validation and test item occurs nowhere else, turns up in no tensor that a stage
    is given, and is never written."""
    secret = {
        user: items[:-held] + [f"{user}-{k}" for k in range(held)]
        if (held := n_held(items))
        else items
        for user, items in HISTORIES.items()
    }
    write_inter(tmp_path / "dataset", "secret", secret)
    config = configure(backbone, "secret", diffuasr_monitor="heldout", **changes)
    part, valid, test = create_dataset(config).build()
    held_out = set(valid.inter_feat["item_id"].tolist()) | set(test.inter_feat["item_id"].tolist())
    assert len(held_out) == 14 + 15
    allowed = set(part.training_items()[0].tolist())
    assert allowed == set(range(1, N_ITEMS + 1))

    seen: dict[str, set[int]] = {}

    def watch(owner: type, name: str, take: Callable[..., list[Tensor]]) -> None:
        stock = getattr(owner, name)

        def call(self: Any, *given: Any) -> Any:
            for tensor in take(*given):
                seen.setdefault(name, set()).update(tensor.unique().tolist())
            return stock(self, *given)

        monkeypatch.setattr(owner, name, call)

    watch(DiffuASR, "loss", lambda target, condition: [target, condition])
    watch(DiffuASR, "fixed_noise_loss", lambda target, condition, seed: [target, condition])
    watch(DiffuASR, "generate", lambda condition, users, labels, seed: [condition, labels])
    watch(Guide, "log_prob", lambda x, label, kind: [label])
    columns = ("item_id", "item_id_list", "target", "condition")
    watch(PlanTrainer, "_step", lambda batch, *rest: [batch[c] for c in columns if c in batch])
    monkeypatch.setattr(pairs, "HELD_OUT", 3)
    written = set(augment(config).pseudo.unique().tolist())
    assert len(written) > 3
    assert written <= allowed | {0}

    expected = {"_step"}
    if config["augmenter"] == "diffuasr":
        expected |= {"loss", "fixed_noise_loss", "generate"}
        if config["diffuasr_guidance"] == "classifier":
            expected.add("log_prob")
    assert seen.keys() == expected
    for name, items in seen.items():
        assert len(items) > 3, name
        assert items <= allowed | {0}, name


def held_out_replaced() -> dict[str, list[str]]:
    """The same training parts, other validation and test items."""
    changed = {}
    for user, items in HISTORIES.items():
        n = n_held(items)
        kept, held = items[: len(items) - n], items[len(items) - n :]
        changed[user] = kept + [f"i{int(item[1:]) % N_ITEMS + 1}" for item in held]
    return changed


@pytest.mark.parametrize("guidance", ["classifier", "classifier_free"])
def test_held_out_items_change_nothing(configure: Configure, tmp_path: Path, guidance: str) -> None:
    """T18: with all of them replaced, generator, pseudo-items and training rows are bit-identical.

    With one epoch, validation has no epoch to choose.
    """
    found = []
    for number, sequences in enumerate((HISTORIES, held_out_replaced())):
        write_inter(tmp_path / "dataset", "toy", sequences)
        config = configure(
            diffuasr_guidance=guidance, augmentation_cache=str(tmp_path / f"{number}")
        )
        augmented = augment(config)
        dataset = create_dataset(config)
        train, valid, test = create_loaders(config, dataset, augmented.pseudo)
        found.append(
            {
                "name": pseudo_file(config).name,
                "generator": checkpoint.load(generator_file(config))[0],
                "log": {k: v for k, v in augmented.notes["log"].items() if "seconds" not in k},
                "quality": augmented.notes["quality"],
                "rows": [sorted(rows_of(batch)) for batch in train],
                "pseudo": augmented.pseudo,
                "held out": [d._dataset.inter_feat["item_id"].tolist() for d in (valid, test)],
            }
        )
    first, second = found
    assert all(
        a != b
        for part, other in zip(first.pop("held out"), second.pop("held out"), strict=True)
        for a, b in zip(part, other, strict=True)
    )
    assert torch.equal(first.pop("pseudo"), second.pop("pseudo"))
    assert_equal_tensors(first.pop("generator"), second.pop("generator"))
    assert first == second


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What generator and training get: filled by ``generate``, which then makes up its result."""
    seen: dict[str, Any] = {}

    def train(config: Any, model: Any, pairs: Any, held_out: Any, place: Path) -> Any:
        rows = torch.cat([torch.cat(part, 1) for part in (pairs, held_out)])
        seen["pairs"] = sorted(row[row > 0].tolist() for row in rows)
        return model, {}

    def write(self: Any, condition: Tensor, users: Tensor, labels: Tensor, seed: int) -> Tensor:
        seen["condition"], seen["users"], seen["labels"] = condition, users, labels
        return torch.ones(len(users), self.n_pseudo, dtype=torch.long)

    monkeypatch.setattr(generation, "train_generator", train)
    monkeypatch.setattr(DiffuASR, "generate", write)
    return seen


@pytest.mark.parametrize("n_pseudo", [1, 5, 10])
def test_the_condition_is_the_training_sequence(
    configure: Configure, tmp_path: Path, given: dict[str, Any], n_pseudo: int
) -> None:
    """T19, T20: whatever M is, of n interactions the first n - 2, oldest first; the label is the
    oldest. Users too short to learn from are conditions all the same, and no more than that."""
    lengths = [5, 12, 13, 14, 30, 30]
    sequences = {f"u{u}": [f"{u}-{k}" for k in range(n)] for u, n in enumerate(lengths)}
    write_inter(tmp_path / "dataset", "d1", sequences)
    config = configure("SASRec", "d1", n_pseudo=n_pseudo, MAX_ITEM_LIST_LENGTH=30)
    dataset, train, *_, model = build_run(config.backbone())
    items, ends = train._dataset.training_items()
    generation.generate(config, items, ends, dataset.item_num, model, tmp_path / "generator")
    assert given["users"].tolist() == [1, 2, 3, 4, 5, 6]
    tokens = dataset.field2id_token["item_id"]
    for row, label, whole in zip(
        given["condition"], given["labels"], sequences.values(), strict=True
    ):
        n = len(whole) - 2
        assert [tokens[i] for i in row[:n]] == whole[:n]
        assert not row[n:].any()
        assert tokens[label] == whole[0]
    learnt = [[tokens[i] for i in pair] for pair in given["pairs"]]
    assert learnt == [s[:-2] for s in sequences.values() if len(s) - 2 >= n_pseudo + 3]


def test_of_a_long_history_the_newest_items_are_the_condition(
    configure: Configure, tmp_path: Path, given: dict[str, Any]
) -> None:
    """The label stays the first item: it is what the pseudo-items precede."""
    config = configure("SASRec")
    dataset, train, *_, model = build_run(config.backbone())
    items, ends = train._dataset.training_items()
    generation.generate(config, items, ends, dataset.item_num, model, tmp_path / "generator")
    for row, label, history in zip(
        given["condition"], given["labels"], training_histories(), strict=True
    ):
        assert row[row > 0].tolist() == history[-8:]
        assert label == history[0]


def test_users_without_training_items_get_none(
    configure: Configure, tmp_path: Path, given: dict[str, Any]
) -> None:
    """One interaction makes no training row."""
    write_inter(tmp_path / "dataset", "toy", {"lonely": ["i1"], **HISTORIES, "alone": ["i2"]})
    augmented = augment(configure("SASRec"))
    assert given["users"].tolist() == list(range(2, 18))
    assert augmented.pseudo.eq(0).all(1).nonzero().squeeze(1).tolist() == [0, 1, 18]


def test_too_few_long_histories_are_refused(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"n_pseudo=8: 1 users have the 11 training items it takes to learn from \(the "
        r"longest history has 22\); choose a smaller n_pseudo",
    ):
        augment(configure(n_pseudo=8))
    assert not list((tmp_path / "cache").glob("*.safetensors"))


# ---------------------------------------------------------------------- the cache


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry a training: the class of what is trained."""
    done: list[str] = []
    fit = PlanTrainer.fit

    def fitted(self: Any, *rest: Any, **more: Any) -> Any:
        done.append(type(self.model).__name__)
        return fit(self, *rest, **more)

    monkeypatch.setattr(PlanTrainer, "fit", fitted)
    return done


def test_a_second_command_trains_the_last_stage_only(
    configure: Configure, trained: list[str]
) -> None:
    """T26: and ends with the same numbers."""
    first = run_stages(configure())
    assert trained == ["GRU4Rec", "GeneratorTraining", "GRU4Rec"]
    trained.clear()
    second = run_stages(configure(train_batch_size=16, checkpoint_dir="elsewhere"))
    assert trained == ["GRU4Rec"]
    assert_same(second, first)


def test_the_augmenters_share_one_baseline(configure: Configure, trained: list[str]) -> None:
    notes = [
        augment(configure(augmenter=augmenter)).notes
        for augmenter in ("random", "diffuasr", "random_seq")
    ]
    assert trained == ["GRU4Rec", "GeneratorTraining"]
    assert len({part["baseline"]["run_dir"] for part in notes}) == 1
    assert len({part["pseudo"] for part in notes}) == 3


def test_backbones_have_baselines_of_their_own(configure: Configure, trained: list[str]) -> None:
    for backbone in ("GRU4Rec", "SASRec", "GRU4Rec"):
        augment(configure(backbone, augmenter="random"))
    augment(configure(augmenter="random", learning_rate=0.1))
    assert trained == ["GRU4Rec", "SASRec", "GRU4Rec"]


OTHER_VALUES = {
    "augmenter": "random",
    "n_pseudo": 3,
    "seed": 7,
    "MAX_ITEM_LIST_LENGTH": 7,
    "diffuasr_embeddings": "pretrained_trainable",
    "diffuasr_scale": "none",
    "diffuasr_condition": "sum",
    "diffuasr_guidance": "none",
    "diffuasr_strength": 0.2,
    "diffuasr_p_uncond": 0.2,
    "diffuasr_cf_training": "combined",
    "diffuasr_cg_log_prob": "bce",
    "diffuasr_cg_label": "seq",
    "diffuasr_cg_scale": "const_first",
    "diffuasr_cg_sign": "flipped",
    "diffuasr_guide_in_training": True,
    "diffuasr_diffusion_steps": 30,
    "diffuasr_schedule": "cosine",
    "diffuasr_sample_steps": 4,
    "diffuasr_windows": "all",
    "diffuasr_epochs": 3,
    "diffuasr_patience": 7,
    "diffuasr_batch_size": 8,
    "diffuasr_learning_rate": 0.1,
    "diffuasr_monitor": "heldout",
    "diffuasr_ema_decay": 0.5,
    "sunet_base_channels": 16,
    "sunet_channel_mult": [1, 1],
    "sunet_res_blocks": 1,
    "sunet_groups": 4,
    "sunet_attn_resolutions": [2],
    "sunet_dropout": 0.2,
}


def test_whatever_shapes_the_generator_is_in_its_key(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T26: every setting of the generator changes the name of the file."""
    own = read_yaml(properties_dir() / "model" / "DiffuASR.yaml")
    shaping = {key for key in own if key.startswith(("diffuasr_", "sunet_"))}
    assert set(GENERATION_KEYS) == {"n_pseudo", "MAX_ITEM_LIST_LENGTH"} | shaping
    assert OTHER_VALUES.keys() == {"augmenter", "seed", *GENERATION_KEYS}
    config = configure()
    baseline = run(config.backbone())
    model = build_run(config.backbone())[-1]
    monkeypatch.setattr(augmentation, "train_baseline", lambda *_: baseline)
    monkeypatch.setattr(augmentation, "_recommender", lambda *_: model)
    monkeypatch.setattr(augmentation, "compared_quality", lambda *_: {"this augmenter": {}})
    monkeypatch.setattr(
        augmentation,
        "generate",
        lambda config, items, ends, *_: (torch.ones(len(ends), config["n_pseudo"]), {}),
    )
    paths = [augment(config).notes["pseudo"]]
    for key, value in OTHER_VALUES.items():
        assert config[key] != value
        paths.append(augment(configure(**{key: value})).notes["pseudo"])
    assert len(set(paths)) == 1 + len(OTHER_VALUES)
    # What the augmented rows are used for is another matter.
    for key, value in (
        ("pseudo_mix", "replace"),
        ("pseudo_at_evaluation", True),
        ("eval_batch_size", 7),
        ("show_users", 1),
    ):
        assert augment(configure(**{key: value})).notes["pseudo"] == paths[0], key


def test_sampling_settings_keep_the_trained_generator(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is trained with the guidance that they describe."""
    places: list[Path] = []
    stock = generation.generate

    def note(*arguments: Any) -> Any:
        places.append(arguments[-1])
        return stock(*arguments)

    monkeypatch.setattr(augmentation, "generate", note)
    for changes in ({}, {"diffuasr_strength": 0.7}, {"diffuasr_sample_steps": 2}):
        augment(configure(**changes))
    assert len(set(places)) == 1
    made = Path(configure()["augmentation_cache"]).glob("diffuasr-*.safetensors")
    assert len(list(made)) == 3
    in_training = {"diffuasr_guidance": "classifier", "diffuasr_guide_in_training": True}
    for guided in ({"diffuasr_cf_training": "combined"}, in_training):
        for changes in ({}, {"diffuasr_strength": 0.7}):
            augment(configure(**guided, **changes))
    augment(configure(diffuasr_learning_rate=0.02))
    assert len(set(places)) == 6


def test_a_cache_that_was_moved_is_found(configure: Configure, tmp_path: Path) -> None:
    """Results remember where they were written; what counts is where they are."""
    before = augment(configure())
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    after = augment(configure(augmentation_cache=str(tmp_path / "elsewhere")))
    assert torch.equal(after.pseudo, before.pseudo)
    run_dir = Path(after.notes["baseline"]["run_dir"])
    assert run_dir.parent == tmp_path / "elsewhere"
    assert not (tmp_path / "cache").exists()


def test_a_generator_that_diverges_stops_the_run(configure: Configure) -> None:
    with pytest.raises(
        TrainingDiverged, match=r"loss part 'noise' is nan .* A smaller diffuasr_lea"
    ):
        augment(configure(diffuasr_learning_rate=1e30, diffuasr_epochs=5))
    assert not list(Path(configure()["augmentation_cache"]).glob("diffuasr-*.safetensors"))


def test_the_stages_cannot_be_left_out(configure: Configure) -> None:
    with pytest.raises(UserError, match=r"has runs before this one, which pipelines.start makes"):
        run(configure())


def test_one_process_at_a_time_is_in_a_stage(tmp_path: Path) -> None:
    """Another one waits; it does not write into the same folder."""
    path = tmp_path / "cache" / "stage"
    code = (
        "import sys; from pathlib import Path; from recbole_simdiff import files\n"
        "print('ready', flush=True)\n"
        "with files.exclusive(Path(sys.argv[1])): print('in', flush=True)"
    )
    with files.exclusive(path):
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1)
    assert other.communicate(timeout=60)[0] == "in\n"
    assert other.returncode == 0


def test_random_items_depend_on_their_number_and_the_seed(configure: Configure) -> None:
    """Not on the generator's settings, nor on the baseline."""

    def made(**changes: Any) -> Any:
        found = augment(configure(augmenter="random", **changes))
        return found.notes["pseudo"], found.pseudo

    path, pseudo = made()
    for changes in ({"diffuasr_epochs": 9}, {"learning_rate": 0.5}):
        other_path, other = made(**changes)
        assert other_path == path
        assert torch.equal(other, pseudo)
    assert made(n_pseudo=3)[0] != path
    other_path, other = made(seed=1)
    assert other_path != path
    assert not torch.equal(other, pseudo)


def test_one_training_interaction_changes_every_stage(
    configure: Configure, tmp_path: Path, trained: list[str]
) -> None:
    """T26."""
    config = configure()
    notes = augment(config).notes
    before = notes["baseline"]["run_dir"], notes["pseudo"]
    own = augment(configure(augmenter="random_seq")).notes["pseudo"]
    changed = HISTORIES | {"u9": ["i1", *HISTORIES["u9"][1:]]}
    assert changed != HISTORIES
    write_inter(tmp_path / "dataset", "toy", changed)
    notes = augment(config).notes
    assert trained == ["GRU4Rec", "GeneratorTraining"] * 2
    assert notes["baseline"]["run_dir"] != before[0]
    assert notes["pseudo"] != before[1]
    assert augment(configure(augmenter="random_seq")).notes["pseudo"] != own


def test_the_recommenders_weights_are_in_the_key(configure: Configure) -> None:
    """T26: one number of its checkpoint."""
    config = configure(diffuasr_epochs=1)
    notes = augment(config).notes
    best = Path(notes["baseline"]["run_dir"]) / BEST
    tensors, content = checkpoint.load(best)
    tensors["model.item_embedding.weight"][3, 3] += 1e-6
    checkpoint.save(best, tensors, content)
    assert augment(config).notes["pseudo"] != notes["pseudo"]


def test_other_code_makes_another_generator(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T26: what an older version made is not taken for this one's."""
    config = configure(diffuasr_epochs=1)
    before = augment(config).notes["pseudo"]
    monkeypatch.setattr(augmentation, "source_checksum", lambda: "another version")
    assert augment(config).notes["pseudo"] != before
    assert len(list(Path(config["augmentation_cache"]).glob("diffuser-*"))) == 2


def test_loading_equals_making_again(configure: Configure, trained: list[str]) -> None:
    """T25, T26: from nothing, and from the trained generator alone."""
    config = configure()
    cache = Path(config["augmentation_cache"])
    wanted = augment(config)
    path = pseudo_file(config)
    assert torch.equal(augment(config).pseudo, wanted.pseudo)
    path.unlink()
    trained.clear()
    assert torch.equal(augment(config).pseudo, wanted.pseudo)
    assert trained == [
        "GeneratorTraining"
    ]  # looked up, see test_a_trained_generator_is_not_trained_again
    for file in cache.rglob("*"):
        if file.is_file():
            file.unlink()
    again = augment(config)
    assert torch.equal(again.pseudo, wanted.pseudo)
    assert again.notes["quality"] == wanted.notes["quality"]
    other = augment(configure(seed=8)).pseudo
    assert not torch.equal(other, wanted.pseudo)


def test_a_trained_generator_is_not_trained_again(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ended while it was writing."""
    config = configure()

    def crash(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(DiffuASR, "generate", crash)
        with pytest.raises(OSError, match="no space"):
            augment(config)
    with monkeypatch.context() as patch:
        patch.setattr(DiffuASR, "loss", crash)
        found = augment(config)
    clean = augment(configure(augmentation_cache="clean"))
    assert torch.equal(found.pseudo, clean.pseudo)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damaged_files_are_refused(configure: Configure) -> None:
    """T26: whichever stage they hold."""
    config = configure()
    notes = augment(config).notes
    pseudo, baseline = Path(notes["pseudo"]), Path(notes["baseline"]["run_dir"])
    generator = generator_file(config)
    for path in (pseudo, baseline / BEST):
        damage(path)
        with pytest.raises(UserError, match=rf"{path} is damaged: its checksum does not match"):
            augment(config)
        damage(path)
    damage(generator)
    augment(config)  # what it made is there
    pseudo.unlink()
    with pytest.raises(UserError, match=rf"{generator} is damaged"):
        augment(config)
    (baseline / RESULT).write_text('{"valid": ')
    with pytest.raises(UserError, match=r"result\.json is not the result of a finished run"):
        augment(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("topk", [2, 5]),
        ("metrics", ["NDCG", "Recall"]),
        ("length_groups", [4]),
        ("valid_metric", "Hit@1"),
    ],
)
def test_the_baseline_is_measured_as_the_augmented_run_is(
    configure: Configure, key: str, value: Any
) -> None:
    """A cached one may have been made when something else was asked for."""
    run_stages(configure(augmenter="random", epochs=2))
    config = configure(augmenter="random", epochs=2, **{key: value})
    result = run_stages(config)
    alone = run(config.backbone())
    baseline = result.augmentation["baseline"]
    assert baseline["test"][KEPT].keys() == result.test[KEPT].keys()
    assert baseline["test"] == alone.test
    assert baseline["valid"] == alone.valid
    assert baseline["by_length"] == alone.by_length
    if key == "valid_metric":  # it has a say in which epoch is the best
        assert read_result(Path(baseline["run_dir"])).config["values"][key] == value
    report.format_report(result)


def test_a_baseline_of_other_held_out_items_is_not_the_baseline(
    configure: Configure, tmp_path: Path
) -> None:
    """Its epoch was chosen on them, and its metrics are of them."""
    config = configure(augmenter="random", epochs=2)
    augment(config)
    write_inter(tmp_path / "dataset", "toy", held_out_replaced())
    notes = augment(config).notes
    alone = run(config.backbone())
    assert notes["baseline"]["test"] == alone.test
    assert notes["baseline"]["valid"] == alone.valid


# ---------------------------------------------------------------------- a baseline from elsewhere


def test_a_given_baseline_is_used(configure: Configure, trained: list[str]) -> None:
    """With the same weights everything that follows is the same as with one from the cache."""
    own = augment(configure())
    baseline = run(configure().backbone())
    trained.clear()
    for place in (baseline.run_dir, str(Path(baseline.run_dir) / BEST)):
        found = augment(configure(baseline_checkpoint=place))
        assert found.notes["pseudo"] == own.notes["pseudo"]
        assert found.notes["baseline"] == own.notes["baseline"] | {"run_dir": baseline.run_dir}
    assert trained == []


def test_the_content_of_a_given_baseline_names_the_result(configure: Configure) -> None:
    """Another checkpoint under the same path gives another result."""
    place = Path(run(configure().backbone()).run_dir)
    config = configure(baseline_checkpoint=str(place))
    names = {fingerprint(config, "data")}
    assert names == {fingerprint(config, "data")}
    tensors, content = checkpoint.load(place / BEST)
    name = next(n for n in tensors if n.startswith("model."))
    checkpoint.save(place / BEST, tensors | {name: tensors[name] + 1}, content)
    names.add(fingerprint(config, "data"))
    content["config"]["values"]["dropout_prob"] = 0.125
    checkpoint.save(place / BEST, tensors, content)
    names.add(fingerprint(config, "data"))
    assert len(names) == 3
    (place / BEST).unlink()
    with pytest.raises(UserError, match="no checkpoint at"):
        fingerprint(config, "data")


def test_a_given_baseline_may_be_another_model(configure: Configure) -> None:
    """Its item table and its judgement guide the generator; the backbone is still GRU4Rec."""
    baseline = run(configure("SASRec").backbone())
    result = run_stages(configure(baseline_checkpoint=baseline.run_dir))
    assert result.augmentation["backbone"] == "GRU4Rec"
    assert result.augmentation["baseline"]["test"] == baseline.test
    assert (Path(result.run_dir) / BEST).is_file()


def test_a_given_baseline_is_of_the_same_data(configure: Configure, tmp_path: Path) -> None:
    """What it was trained on must be the training part of this run: it guides the generator."""
    (tmp_path / "elsewhere").mkdir()
    baseline = run(configure().backbone())
    with pytest.raises(UserError, match=r"no checkpoint at .*elsewhere"):
        augment(configure(baseline_checkpoint=str(tmp_path / "elsewhere")))
    write_inter(tmp_path / "dataset", "other", HISTORIES | {"u3": HISTORIES["u4"]})
    with pytest.raises(UserError, match="is not the one"):
        augment(configure(dataset="other", baseline_checkpoint=baseline.run_dir))
    fewer = configure(user_inter_num_interval="[5,inf)", baseline_checkpoint=baseline.run_dir)
    with pytest.raises(UserError, match="is not the one"):
        augment(fewer)
    write_inter(tmp_path / "dataset", "toy", held_out_replaced())
    with pytest.raises(UserError, match="is not the one"):
        augment(configure(baseline_checkpoint=baseline.run_dir))


BY_RATIO = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "mode": "full"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            {"split": {"LS": "test_only"}, "order": "TO", "group_by": "user", "mode": "full"},
            {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        ),
        (BY_RATIO | {"group_by": "none"}, BY_RATIO | {"group_by": "user"}),
    ],
    ids=["split", "group_by"],
)
def test_a_given_baseline_has_held_out_the_same(
    configure: Configure, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    """Trained on this run's validation items, it would carry them into the pseudo-items."""
    baseline = run(configure(eval_args=theirs).backbone())
    with pytest.raises(UserError, match="eval_args"):
        augment(configure(eval_args=ours, baseline_checkpoint=baseline.run_dir))


def test_a_given_baseline_was_ranked_the_same_way_and_on_raw_data(configure: Configure) -> None:
    """Ranked among few, it could not be compared; augmented itself, it is no baseline."""
    sampled = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user"}
    baseline = run(configure(eval_args=sampled | {"mode": "uni5"}).backbone())
    with pytest.raises(UserError, match="cannot be compared"):
        augment(configure(baseline_checkpoint=baseline.run_dir))
    augmented = run_stages(configure(augmenter="random"))
    with pytest.raises(UserError, match="was trained on augmented data; a baseline must not be"):
        augment(configure(baseline_checkpoint=augmented.run_dir))


@pytest.mark.parametrize(
    "changes",
    [
        {"n_pseudo": 20},
        {"backbone": "DreamRec", "diffuasr_guidance": "classifier"},
        {"backbone": "FPMC", "augmenter": "random", "loss_type": "BPR"},
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(PlanTrainer, "fit", lambda *_: pytest.fail("trained"))
    config = configure()
    values = config.plain()["values"] | changes
    known = set(Config("DiffuASR", "toy", overrides=changes).final_config_dict)
    values = {k: v for k, v in values.items() if k in known and k != "train_neg_sample_args"}
    with pytest.raises(UserError):
        augment(Config("DiffuASR", "toy", overrides=values))


# ---------------------------------------------------------------------- stopped and continued


@pytest.mark.parametrize("backbone", ["SimDiffRec", "GRU4Rec"])
def test_stopped_in_the_baseline(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, backbone: str
) -> None:
    """The same command takes it up where it was, and ends as if nothing had been."""
    changes = {"epochs": 2, "diffuasr_epochs": 1}
    wanted = run_stages(configure(backbone, augmentation_cache="unbroken", **changes))
    config = configure(backbone, **changes)
    steps = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(PlanTrainer, "_step", stopping(PlanTrainer._step, 1))
            with pytest.raises(Interrupted) as stopped:
                run_stages(config)
        assert stopped.value.same_command
        assert stopped.value.signum == signal.SIGTERM
        place = stopped.value.run_dir
        assert place.parent == Path(config["augmentation_cache"])
        assert not (place / RESULT).exists()
        progress = checkpoint.load(place / LAST)[1]["progress"]
        steps.append((progress["epoch"], progress["step"]))
    assert steps == [(0, 1), (0, 2)]
    assert_same(run_stages(config), wanted, but=["augmentation"])


def generator(config: Config, place: Path) -> Any:
    """generate() with an untrained recommender; (pseudo, log, tensors of the checkpoint)."""
    dataset, train, *_, model = build_run(config.backbone())
    items, ends = train._dataset.training_items()
    pseudo, log = generation.generate(config, items, ends, dataset.item_num, model, place)
    return pseudo, log, checkpoint.load(place / LAST)[0]


LEARNING = {
    "frozen": {
        "diffuasr_monitor": "heldout",
        "diffuasr_windows": "all",
        "diffuasr_batch_size": 32,
    },
    "averaged": {
        "diffuasr_embeddings": "pretrained_trainable",
        "diffuasr_ema_decay": 0.5,
        "diffuasr_batch_size": 4,
    },
}


@pytest.mark.parametrize("changes", LEARNING.values(), ids=LEARNING)
@pytest.mark.parametrize("saves", [True, False], ids=["stopped", "crashed"])
def test_stopped_in_the_generator(
    configure: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    saves: bool,
) -> None:
    """A signal loses nothing, within an epoch either; a crash loses the steps of its epoch.

    The seconds are those of all parts: they do not shrink.
    """
    config = configure("SASRec", diffuasr_epochs=4, **changes)
    wanted = generator(config, tmp_path / "unbroken")
    steps = -(-wanted[1]["pairs"] // config["diffuasr_batch_size"])
    assert steps > 1
    place, seconds = tmp_path / "stopped", 0.0
    places = ((steps + 1, (1, 1)), (steps, (2, 1))) if saves else ((steps + 1, (1, 0)), (2, (1, 0)))
    for at, reached in places:
        with monkeypatch.context() as patch:
            act = interrupt if saves else crash
            patch.setattr(DiffuASR, "loss", stopping(DiffuASR.loss, at, act))
            with pytest.raises(Interrupted if saves else Crash):
                generator(config, place)
        progress = checkpoint.load(place / LAST)[1]["progress"]
        assert (progress["epoch"], progress["step"]) == reached
        assert progress["seconds"] >= seconds
        seconds = progress["seconds"]
    found = generator(config, place)
    assert found[1]["training_seconds"] > seconds
    assert torch.equal(found[0], wanted[0])
    for log in (found[1], wanted[1]):
        del log["training_seconds"], log["generation_seconds"]
    assert found[1] == wanted[1]
    assert_equal_tensors(found[2], wanted[2])


def test_stopped_in_the_generator_the_same_command_goes_on(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = run_stages(configure(augmentation_cache="unbroken"))
    config = configure()
    with monkeypatch.context() as patch:
        patch.setattr(DiffuASR, "loss", stopping(DiffuASR.loss, 1, interrupt))
        with pytest.raises(Interrupted) as stopped:
            run_stages(config)
    assert stopped.value.same_command
    assert stopped.value.signum == signal.SIGINT
    assert (stopped.value.run_dir / LAST).is_file()
    assert not list(Path(config["augmentation_cache"]).glob("*.safetensors"))
    assert_same(run_stages(config), wanted, but=["augmentation"])


# ---------------------------------------------------------------------- the generator's training


class Learner:
    """``train_generator`` on pairs of its own, with the monitored losses given."""

    def __init__(
        self, config: Config, monkeypatch: pytest.MonkeyPatch, n_pairs: int, n_held: int
    ) -> None:
        self.config = config
        model = build_run(config.backbone())[-1]
        torch.manual_seed(0)
        self.model = DiffuASR(config, N_ITEMS + 1, Guide(model, "cpu"))
        number = torch.arange(n_pairs)
        target = torch.stack([number // N_ITEMS + 1, number % N_ITEMS + 1], 1)
        condition = torch.full((n_pairs, 3), 1)
        self.pairs = target[n_held:], condition[n_held:]
        self.held_out = target[:n_held], condition[:n_held]
        self.trained: list[list[int]] = []  # pairs, by step
        self.losses: list[float] = []  # by step
        self.held: list[list[int]] = []  # pairs, by epoch
        self.weights: list[dict[str, Tensor]] = []  # before each step
        self.script: list[float] = []
        loss, fixed = DiffuASR.loss, DiffuASR.fixed_noise_loss

        def stepped(model: Any, target: Tensor, condition: Tensor) -> Tensor:
            self.trained.append(self._pairs(target))
            self.weights.append({k: v.detach().clone() for k, v in model.state_dict().items()})
            value = loss(model, target, condition)
            self.losses.append(value.item())
            return value

        def held(model: Any, target: Tensor, condition: Tensor, seed: int) -> float:
            self.held.append(self._pairs(target))
            found = fixed(model, target, condition, seed)
            return self.script[len(self.held) - 1] if self.script else found

        monkeypatch.setattr(DiffuASR, "loss", stepped)
        monkeypatch.setattr(DiffuASR, "fixed_noise_loss", held)

    @staticmethod
    def _pairs(target: Tensor) -> list[int]:
        return ((target[:, 0] - 1) * N_ITEMS + target[:, 1] - 1).tolist()

    def train(self, place: Path) -> dict[str, Any]:
        given = self.config, self.model, self.pairs, self.held_out, place
        self.best, log = generation.train_generator(*given)
        return log


@pytest.mark.parametrize("windows", ["first", "all"])
def test_one_user_in_twenty_is_held_out(configure: Configure, windows: str) -> None:
    """All pairs of a user are on one side; every pair is on one."""
    config = configure("SASRec", n_pseudo=2, diffuasr_monitor="heldout", diffuasr_windows=windows)
    lengths = torch.tensor([0, *([4] * 5), *([5, 6, 7, 8] * 10)])
    ends = lengths.cumsum(0)
    items = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # the item is the user
    found, held_out = pairs.learning_pairs(config, items, ends)
    learnt, held = (set(part[0][:, 0].tolist()) for part in (found, held_out))
    assert len(held) == 2
    assert learnt | held == set(range(6, 46))
    assert not learnt & held
    every = training_pairs(items, ends, 2, config["MAX_ITEM_LIST_LENGTH"], windows)
    assert len(found[0]) + len(held_out[0]) == len(every[0]) == (40 if windows == "first" else 100)
    watched = configure("SASRec", n_pseudo=2, diffuasr_monitor="train_loss")
    assert len(pairs.learning_pairs(watched, items, ends)[1][0]) == 0


def test_who_is_held_out_depends_on_the_seed_alone(configure: Configure) -> None:
    """A stopped training goes on with the same pairs."""
    lengths = torch.tensor([0, *([8] * 40)])
    ends, items = lengths.cumsum(0), torch.repeat_interleave(torch.arange(41), lengths)

    def held(drawn_before: int, **changes: Any) -> list[int]:
        torch.manual_seed(drawn_before)
        config = configure("SASRec", diffuasr_monitor="heldout", **changes)
        return pairs.learning_pairs(config, items, ends)[1][0][:, 0].tolist()

    assert held(1) == held(2)
    assert held(1) != held(1, seed=7)


def test_the_generator_depends_on_the_seed_alone(configure: Configure, tmp_path: Path) -> None:
    """Not on what drew random numbers before it: its initial weights, its steps, its items."""
    config = configure("SASRec")
    dataset, train, *_, model = build_run(config.backbone())
    items, ends = train._dataset.training_items()
    made, weights = [], []
    for number in (1, 2):
        torch.manual_seed(number)
        place = tmp_path / f"{number}"
        made.append(generation.generate(config, items, ends, dataset.item_num, model, place)[0])
        weights.append(checkpoint.subset(checkpoint.load(place / LAST)[0], "model"))
    assert torch.equal(made[0], made[1])
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor), name


def test_each_epoch_trains_on_every_pair_that_is_not_held_out(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = configure(
        "SASRec", diffuasr_monitor="heldout", diffuasr_epochs=3, diffuasr_batch_size=16
    )
    learner = Learner(config, monkeypatch, 60, 3)
    log = learner.train(tmp_path)
    assert (log["pairs"], log["held_out_pairs"], log["epoch"]) == (57, 3, 3)
    assert len(log["train"]) == len(log["held_out"]) == 3
    epochs = [[p for step in learner.trained[4 * e : 4 * e + 4] for p in step] for e in range(3)]
    assert [len(step) for step in learner.trained] == [16, 16, 16, 9] * 3
    (held,) = {tuple(pairs) for pairs in learner.held}
    for epoch, found in enumerate(log["train"]):
        assert found == pytest.approx(sum(learner.losses[4 * epoch : 4 * epoch + 4]) / 4)
    for seen in epochs:
        assert sorted([*seen, *held]) == list(range(60))
    assert epochs[0] != epochs[1]


def test_without_held_out_pairs_the_training_loss_is_watched(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = configure("SASRec", diffuasr_epochs=3)
    learner = Learner(config, monkeypatch, 19, 0)
    log = learner.train(tmp_path)
    assert (log["pairs"], log["held_out_pairs"], log["held_out"]) == (19, 0, [])
    assert learner.held == []
    assert log["best"] == min(log["train"])
    assert log["best_epoch"] == log["train"].index(log["best"]) + 1


def test_the_best_epoch_writes_the_items(
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "recbole_simdiff")
    config = configure("SASRec", diffuasr_monitor="heldout", diffuasr_epochs=4)
    learner = Learner(config, monkeypatch, 40, 2)
    learner.script = [0.9, 0.4, 0.4, 0.5]
    log = learner.train(tmp_path)
    assert (log["best"], log["best_epoch"], log["epoch"]) == (0.4, 2, 4)
    after_two = learner.weights[2]  # one step an epoch
    for name, tensor in learner.best.state_dict().items():
        assert torch.equal(tensor, after_two[name]), name
    name = next(name for name, _ in learner.model.network.named_parameters())
    assert not torch.equal(after_two[f"network.{name}"], learner.weights[3][f"network.{name}"])
    lines = [line for line in caplog.messages if line.startswith("diffuser epoch")]
    assert len(lines) == 4
    assert lines[3].endswith("| valid held_out 0.50000 (best 0.40000, epoch 1)")


def test_the_backbones_settings_are_not_the_generators(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its optimiser, patience and validation have keys of their own."""
    changes = {"learner": "sgd", "learning_rate": 9.0, "weight_decay": 0.5, "eval_step": 2}
    changes |= {"clip_grad_norm": {"max_norm": 1e-6}, "stopping_step": 1, "enable_amp": True}
    changes |= {"valid_metric": "MRR@1", "stopping_updates": 1}
    found = []
    for name, given in (("plain", {}), ("changed", changes)):
        config = configure("SASRec", diffuasr_monitor="heldout", diffuasr_epochs=4, **given)
        with monkeypatch.context() as patch:
            learner = Learner(config, patch, 40, 2)
            learner.script = [0.4, 0.9, 0.9, 0.3]
            log = learner.train(tmp_path / name)
        del log["training_seconds"]
        found.append((log, learner.best.state_dict()))
    assert found[0][0] == found[1][0]
    assert_equal_tensors(found[0][1], found[1][1])


def test_the_best_epoch_survives_a_stop(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It may be one before the stop; what came after it was no better."""
    config = configure("SASRec", diffuasr_monitor="heldout", diffuasr_epochs=4)
    with monkeypatch.context() as patch:
        learner = Learner(config, patch, 40, 2)
        learner.script = [0.9, 0.4, 0.5, 0.6]
        patch.setattr(DiffuASR, "loss", stopping(DiffuASR.loss, 3, interrupt))
        with pytest.raises(Interrupted):
            learner.train(tmp_path)
    with monkeypatch.context() as patch:
        resumed = Learner(config, patch, 40, 2)
        resumed.script = [0.5, 0.6]  # stopped before the third epoch was validated
        log = resumed.train(tmp_path)
    assert (log["best"], log["best_epoch"], log["epoch"]) == (0.4, 2, 4)
    assert log["held_out"] == [0.9, 0.4, 0.5, 0.6]
    assert len(resumed.trained) == 1
    for name, tensor in resumed.best.state_dict().items():
        assert torch.equal(tensor, learner.weights[2][name]), name


def test_training_ends_when_nothing_improves(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = configure(
        "SASRec", diffuasr_monitor="heldout", diffuasr_epochs=30, diffuasr_patience=3
    )
    learner = Learner(config, monkeypatch, 40, 2)
    learner.script = [0.9, 0.8, *[0.8] * 28]
    log = learner.train(tmp_path)
    assert log["best_epoch"] == 2
    assert log["epoch"] == 2 + 3


def test_averaged_weights_write_the_items(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """T31: the first update copies, every later one moves half of the way."""
    config = configure(
        "SASRec", diffuasr_monitor="heldout", diffuasr_epochs=3, diffuasr_ema_decay=0.5
    )
    learner = Learner(config, monkeypatch, 40, 2)
    learner.script = [0.9, 0.4, 0.5]
    learner.train(tmp_path)
    saved = checkpoint.subset(checkpoint.load(tmp_path / BEST)[0], "model.average.module")
    for name, value in learner.best.named_parameters():
        average = (learner.weights[1][name] + learner.weights[2][name]) / 2
        torch.testing.assert_close(value, average, msg=name)
        assert torch.equal(saved[name], value), name


# ---------------------------------------------------------------------- quality and reports


def test_quality_by_hand() -> None:
    """Of three users, the second without pseudo-items; an own item counts once for each time."""
    items, ends = flat([[1, 2, 2], [3], [4]])
    table = torch.tensor([[9.0, 9], [2, 0], [0, 3], [1, 1], [-1, 0], [5, 5]])
    pseudo = torch.tensor([[0, 0], [1, 5], [0, 0], [4, 4]])
    found = quality(pseudo, items, ends, table)
    mean = F.normalize(torch.tensor([1.0, 2]), dim=0)  # of unit vectors (1, 0), (0, 1), (0, 1)
    cosines = [mean[0], (mean[0] + mean[1]) / 2**0.5, 1, 1]
    assert found == {
        "similarity": pytest.approx(float(sum(cosines)) / 4),
        "popularity": pytest.approx((1 + 0 + 1 + 1) / 4),  # 1 of 5 interactions, times 5 items
        "never generated": pytest.approx(2 / 5),
        "own item": pytest.approx(3 / 4),
    }


def test_quality_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [3, 0, 1, 12, 7, 2, 5]
    histories = [torch.randint(1, 31, (n,), generator=generator).tolist() for n in sizes]
    items, ends = flat(histories)
    table = torch.randn(31, 4, generator=generator)
    pseudo = random_items(items, ends, 6, 3)
    pseudo[[0, 2, 5]] = 0
    unit = F.normalize(table, dim=1).double()
    cosines, shares, own, made = [], [], [], set()
    for user, history in enumerate(histories, start=1):
        for item in pseudo[user].tolist():
            if item:
                mean = unit[history].mean(0)
                cosines.append(float(unit[item] @ mean / mean.norm()))
                shares.append(items.tolist().count(item) / len(items) * 30)
                own.append(item in history)
                made.add(item)
    found = quality(pseudo, items, ends, table)
    assert found["similarity"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    assert found["popularity"] == pytest.approx(sum(shares) / len(shares))
    assert found["never generated"] == pytest.approx(1 - len(made) / 30)
    assert found["own item"] == pytest.approx(sum(own) / len(own))


def test_quality_of_the_random_augmenters() -> None:
    """What the two rows of comparison must show."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(1, 51, (4000,), generator=generator).square() // 51 + 1
    items[:51] = torch.arange(1, 52)  # every item occurs
    ends = torch.arange(0, 4001, 10)
    table = torch.randn(52, 8, generator=generator)
    uniform = quality(random_items(items, ends, 10, 0), items, ends, table)
    own = quality(random_from_history(items, ends, 10, 0), items, ends, table)
    assert own["own item"] == 1
    assert uniform["own item"] < 0.3
    assert uniform["popularity"] == pytest.approx(1, abs=0.05)
    assert own["popularity"] > 1.1
    assert own["similarity"] > uniform["similarity"] + 0.2
    assert uniform["never generated"] == 0


def test_the_other_augmenters_are_compared_for_the_same_users(configure: Configure) -> None:
    """With their own draws: the random augmenter is not compared with itself."""
    config = configure(augmenter="random")
    compared = augment(config).notes["quality"]
    assert compared["random_seq"]["own item"] == 1
    assert compared["this augmenter"] != compared["random"]
    items, ends = training_part(config).training_items()
    other = random_from_history(items, ends, 2, config["seed"] + 1)
    other[0] = 0
    expected = quality(other, items, ends, torch.eye(N_ITEMS + 1))
    for name in ("popularity", "never generated"):
        assert compared["random_seq"][name] == expected[name]


def test_the_quality_table() -> None:
    compared = {
        "this augmenter": {"similarity": 0.25, "own item": 1 / 3},
        "random": {"similarity": -0.1239, "own item": 0.0},
    }
    assert report.format_quality(compared).splitlines() == [
        "pseudo-items    similarity  own item",
        "this augmenter       0.250     0.333",
        "random              -0.124     0.000",
    ]


def test_the_report(configure: Configure) -> None:
    """Both runs, all rows and each group, with the number of rows of the group."""
    result = run_stages(configure(augmenter="random"))
    lines = [line.split() for line in report.format_report(result).splitlines()]
    metrics = list(result.test[KEPT])
    assert lines[0] == ["input", "length", "augmentation", *metrics]
    baseline = result.augmentation["baseline"]
    expected = [
        ["all", "without", *baseline["test"][KEPT].values()],
        ["all", "with", *result.test[KEPT].values()],
    ]
    for group, values in result.by_length.items():
        for name, part in (("without", baseline["by_length"][group]), ("with", values)):
            expected.append([group, f"({values['rows']})", name, *(part[m] for m in metrics)])
    assert len(expected) == 8
    assert lines[1:] == [
        [cell if isinstance(cell, str) else f"{cell:.4f}" for cell in row] for row in expected
    ]


# ---------------------------------------------------------------------- export


class RecBoleRows(RecBoleFixes, SequentialDataset):
    """RecBole's own rows; only the faults that stop it on today's pandas are mended."""


def held_out(config: Config) -> list[dict[str, str]]:
    """User -> validation item, and user -> test item, by RecBole's split."""
    parts = RecBoleRows(config).build()
    found = []
    for part in parts[1:]:
        users, items = (part.field2id_token[key] for key in ("user_id", "item_id"))
        rows = part.inter_feat
        found.append(
            {
                str(users[u]): str(items[i])
                for u, i in zip(rows["user_id"], rows["item_id"], strict=True)
            }
        )
    return found


def test_the_exported_file(configure: Configure, tmp_path: Path) -> None:
    """RecBole reads it: pseudo-items first, the real ones after them, all in their own ids."""
    config = configure(augmenter="random")
    augmented = augment(config)
    path = tmp_path / "dataset" / "longer" / "longer.inter"
    export(augmented, path)
    header, *lines = path.read_text().splitlines()
    assert header == "user_id:token\titem_id:token\ttimestamp:float"
    found: dict[str, list[tuple[float, str]]] = {}
    for line in lines:
        user, item, time = line.split("\t")
        found.setdefault(user, []).append((float(time), item))
    assert found.keys() == HISTORIES.keys()
    for number, (user, items) in enumerate(HISTORIES.items(), start=1):
        times, written = zip(*found[user], strict=True)
        assert list(times) == list(range(len(times)))
        made = [f"i{item}" for item in augmented.pseudo[number].tolist() if item]
        assert len(made) == 2
        n_real = len(items)
        assert list(written[-n_real:]) == items
        if n_real >= 4:
            assert list(written[:-n_real]) == made
    dataset = create_dataset(configure(dataset="longer"))
    dataset.build()
    assert dataset.statistics.actions == len(lines)


def test_the_exported_file_holds_out_the_same_items(configure: Configure, tmp_path: Path) -> None:
    """Else a real item that the generator was given would be a test item of short users."""
    config = configure(augmenter="random")
    export(augment(config), tmp_path / "dataset" / "longer" / "longer.inter")
    before, after = (held_out(configure(dataset=name)) for name in ("toy", "longer"))
    assert len(before[1]) == 15
    assert after == before
