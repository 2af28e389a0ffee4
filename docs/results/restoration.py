"""How often SimDiffRec's denoiser finds the original item, by number of reverse steps.

    python docs/results/restoration.py saved/<run> ... --data_path=<folder>

Prints, for 512 training rows of each run's best epoch, from the fully noised sequence: how often
the first choice is the original item, the mean confidence, how often the choice is that of one
step, and the mean length of the estimate, with and without the clamp inside the chain.
"""

import argparse

import torch

from recbole_simdiff.modules.transformer import TokenLayout
from recbole_simdiff.runs.restore import restore

STEPS = (1, 2, 5, 10, 50)
ROWS_A_BATCH, BATCHES = 64, 8


def main() -> None:
    """A Markdown table for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--data_path")
    arguments = parser.parse_args()
    changes = {"data_path": arguments.data_path} if arguments.data_path else {}
    for run in arguments.runs:
        restored = restore(run, changes)
        model, train = restored.model.eval(), restored.loaders[0]
        train.set_epoch(0)
        batches = [train.collate(index[:ROWS_A_BATCH]) for index in train.batches()[:BATCHES]]
        norm = model.item_embedding.weight[1:].norm(dim=1).mean().item()
        print(f"\n{run}: mean length of the items {norm:.2f}\n")
        print("| clamp | steps | original item | confidence | as one step | length of estimate |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for clamp in ("none", "nearest"):
            one_step: list[torch.Tensor] = []
            for steps in STEPS:
                model.reverse_steps, model.reverse_clamp = steps, clamp
                found = [of_batch(model, batch) for batch in batches]
                choices = [item for item, *_ in found]
                one_step = one_step or choices
                same = torch.cat([a == b for a, b in zip(choices, one_step, strict=True)])
                right, confidence, length = (
                    torch.cat(part) for part in list(zip(*found, strict=True))[1:]
                )
                values = (right, confidence, same, length)
                cells = " | ".join(f"{value.float().mean():.3f}" for value in values)
                print(f"| {clamp} | {steps} | {cells} |")


@torch.no_grad()
def of_batch(model, batch):
    """Choice, whether it is the original item, confidence and length of each token's estimate."""
    layout = TokenLayout(batch["item_length"], batch["item_id_list"].shape[1])
    items = layout.pack(batch["item_id_list"])
    start = torch.full((layout.batch,), model.process.n_steps)
    z_hat = model.restore(items, model.noise(items), start, layout)
    choices = model.choices(z_hat, 1)
    choice, confidence = choices.items.squeeze(1), choices.confidence
    return choice, choice == items, confidence, z_hat.norm(dim=1)


if __name__ == "__main__":
    main()
