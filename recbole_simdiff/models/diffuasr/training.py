"""How DiffuASR's generator is trained: one phase, one loss, an average of its weights."""

from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from recbole_simdiff.models.diffuasr.generator import DiffuASR
from recbole_simdiff.modules.base import Trainable
from recbole_simdiff.modules.plan import Phase, Update

TARGET, CONDITION = "target", "condition"  # columns of a batch of pairs


class GeneratorLoss(NamedTuple):
    """The parts of the generator's loss.

    Attributes:
        noise (Tensor): mean squared error of the predicted noise, scalar.
    """

    noise: Tensor


class GeneratorTraining(Trainable, nn.Module):
    """The generator as the trainer sees it.

    Its checkpoints hold the weights that are trained and, with ``diffuasr_ema_decay``, their moving
    average. Code accumulates such an average and never uses it. Here it is validated and generates.

    Args:
        config (Config): resolved configuration.
        generator (DiffuASR): on its device.

    Attributes:
        generator (DiffuASR): the one that is trained.
        average (AveragedModel | None): of its weights, a copy of them after the first step.
    """

    def __init__(self, config: Any, generator: DiffuASR) -> None:
        super().__init__()
        self.epochs: int = config["diffuasr_epochs"]
        self.generator = generator
        decay: float = config["diffuasr_ema_decay"]
        self.average = averaged(generator, decay) if decay else None

    @property
    def result(self) -> DiffuASR:
        """The generator to validate and to generate with."""
        if self.average is None:
            return self.generator
        return cast(DiffuASR, self.average.module)

    def training_plan(self) -> list[Phase]:
        """One phase that moves what the generator learns."""
        learnt = [p for p in self.generator.parameters() if p.requires_grad]
        return [Phase("diffuser", self.epochs, updates=(Update("", learnt, self.calculate_loss),))]

    def calculate_loss(self, batch: Any) -> GeneratorLoss:
        """The loss of a batch of pairs.

        Args:
            batch (Interaction): ``target`` [B, M] and ``condition`` [B, L].
        """
        return GeneratorLoss(self.generator.loss(batch[TARGET], batch[CONDITION]))

    def end_step(self) -> None:
        """Move the average."""
        if self.average is not None:
            self.average.update_parameters(self.generator)


def averaged(generator: DiffuASR, decay: float) -> AveragedModel:
    """Moving average of a generator's weights; ``update_parameters(generator)`` after every step.

    Args:
        generator (DiffuASR): the generator that is trained.
        decay (float): weight of the old average, in (0, 1).

    Returns:
        AveragedModel: starts as a copy of the weights at the first update; nothing else moves it.
    """
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return average.requires_grad_(False)
