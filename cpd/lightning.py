"""Pruning inside a Lightning training: `pip install "cpd[lightning]"`.

trainer = lightning.Trainer(callbacks=[PrunerCallback(images, target_macs=0.5, schedule="cubic")])
trainer.fit(module)                       # an ordinary LightningModule
"""

from __future__ import annotations

from typing import Any

from cpd.errors import InputError, needs_extra
from cpd.model.arguments import INPUTS
from cpd.options import checked, text
from cpd.pruner import Pruner

with needs_extra("lightning", "cpd.lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class PrunerCallback(Callback):
    """Shrinks a LightningModule, or a part of it, on a schedule, and its optimizer's state with it.

    Args:
        example_inputs: as for `cpd.Pruner`.
        part: the attribute of the module that is pruned, such as "model"; None: the module itself.
        options: all other arguments of `cpd.Pruner` (target, schedule, criterion, …) but `steps` and `optimizer`.

    Attributes:
        pruner: the `cpd.Pruner`, once the training has begun.

    Raises:
        InputError: several processes or several optimizers: use `cpd.compress` or a loop of your own.
    """

    @checked(example_inputs=INPUTS, part=text("the name of a part of the module, as 'model'"))
    def __init__(self, example_inputs: Any, part: str | None = None, **options: Any) -> None:
        self.example_inputs, self.part, self.options = example_inputs, part, options
        self.pruner: Pruner | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Comb the model."""
        if trainer.world_size > 1 or len(trainer.optimizers) != 1:
            raise InputError("PrunerCallback supports one process and one optimizer: for others, use cpd.compress.")
        model = pl_module if self.part is None else pl_module.get_submodule(self.part)
        steps = int(trainer.estimated_stepping_batches)
        self.pruner = Pruner(model, self.example_inputs, steps=steps, optimizer=trainer.optimizers[0], **self.options)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, while its gradients are there: shrink if it is time."""
        if self.pruner is not None and trainer.global_step > self.pruner.steps_taken:
            self.pruner.step()
