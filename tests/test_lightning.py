"""Pruning inside a Lightning training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cpd.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Lightning's advice on workers, logging and devices
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_a_part_of_a_module_shrinks_on_schedule(tmp_path: Path) -> None:
    import lightning

    import cpd
    from cpd.lightning import PrunerCallback

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(3, 16, 3),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(16, 2),
            )

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    images = torch.randn(32, 3, 8, 8)
    loader = DataLoader(TensorDataset(images, torch.randint(0, 2, (32,))), batch_size=4)
    module = Classifier()
    callback = PrunerCallback(
        images[:1], part="net", target_macs=0.5, round_to=1, schedule=cpd.Schedule("linear", end=0.5, interval=2)
    )
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(
        max_epochs=2, accumulate_grad_batches=2, callbacks=[callback], default_root_dir=tmp_path,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, loader)
    assert callback.pruner is not None
    assert [shrink.step for shrink in callback.pruner.shrinks] == [2, 4]
    assert callback.pruner.done
    assert callback.pruner.shrinks[-1].macs <= 0.5 * callback.pruner.comb.cost({}).macs
    narrow = module.net[0].out_channels
    assert narrow < 16
    state = trainer.optimizers[0].state[module.net[0].weight]
    assert state["exp_avg"].shape[0] == narrow
    assert int(state["step"]) == 8  # it went on to the end


def test_several_optimizers_are_refused() -> None:
    from types import SimpleNamespace

    from cpd.lightning import PrunerCallback

    callback = PrunerCallback(torch.randn(1, 3, 8, 8), target_macs=0.5)
    with pytest.raises(InputError, match="one optimizer"):
        callback.on_train_start(SimpleNamespace(world_size=1, optimizers=[1, 2]), nn.Identity())  # type: ignore[arg-type]
