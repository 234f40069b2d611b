"""Distillation losses against their formulas by hand, and what they are taken of."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpd.distillation.config import KD_LOSSES
from cpd.distillation.distiller import DistillConfig, distill
from cpd.distillation.kd import Distillation, last_layer
from cpd.distillation.losses import channel_wise, cross_image, feature_error, to_memory
from cpd.errors import InputError
from cpd.model.inputs import Call
from cpd.model.outputs import reader
from cpd.pruner import Pruner
from cpd.selection.schedule import Schedule
from helpers.teaching import CLASSES, Net, images, make


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Dense(nn.Module):
    """Class logits of every pixel."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.mid = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.head(self.mid(self.conv(x).relu()).relu())}


def dense_images(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(CLASSES + 1, (count, 4, 6, 6), generator=g)
    return [(torch.randn(4, 3, 6, 6, generator=g), t.where(t < CLASSES, -100)) for t in targets]


# ---------------------------------------------------------------- formulas


def test_channel_wise_equals_the_formula() -> None:
    student, teacher, heat = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1), 4.0
    total = 0.0
    for n in range(2):
        for c in range(3):
            ours = [math.exp(v / heat) for v in student[n, c].flatten().tolist()]
            theirs = [math.exp(v / heat) for v in teacher[n, c].flatten().tolist()]
            p, q = [v / sum(theirs) for v in theirs], [v / sum(ours) for v in ours]
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(channel_wise(student, teacher, heat)) == pytest.approx(heat**2 / 3 * total / 2)
    assert float(channel_wise(teacher, teacher, heat)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match="kd='kl'"):
        channel_wise(maps(2, 3), maps(2, 3))


def test_parts_that_were_chosen_beside_the_first_are_mimicked_by_their_error() -> None:
    parts = [{"logits": maps(4, 3, seed=n), "boxes": maps(4, 5, seed=n + 2), "mask": maps(4, 2 + n)} for n in (0, 1)]
    config = DistillConfig(kd="kl")
    model = nn.Linear(1, 1)
    alone, both, whole = (
        Distillation(config, model, model, read=reader(chosen))(*parts)
        for chosen in ("logits", ("logits", "boxes", "mask"), None)
    )
    assert float(whole) == float(alone)
    assert float(both - alone) == pytest.approx(float(feature_error(parts[0]["boxes"], parts[1]["boxes"])))


def test_cross_image_equals_the_formula() -> None:
    student, teacher = (F.normalize(maps(2, 3, 5, seed=seed), dim=-1) for seed in (0, 1))
    total = 0.0
    for i in range(2):
        for j in range(2):
            ours, theirs = ((e[i] @ e[j].T / 0.1).softmax(-1) for e in (student, teacher))
            total += float((theirs * (theirs / ours).log()).sum(-1).mean())
    assert float(cross_image(student, teacher, 0.1)) == pytest.approx(total / 4)


def test_relations_to_a_memory_equal_the_formula() -> None:
    student, teacher, memory = (F.normalize(maps(n, 5, seed=n), dim=-1) for n in (6, 7, 9))
    student = student[:4]
    ours, theirs = ((e @ memory.T / 0.1).softmax(-1) for e in (student, teacher[:4]))
    expected = 0.01 * (theirs * (theirs / ours).log()).sum(-1).mean()
    assert float(to_memory(student, teacher[:4], memory, 0.1)) == pytest.approx(float(expected))


def test_the_error_of_features_is_relative() -> None:
    student, teacher = maps(3, 4), maps(3, 4, seed=1)
    expected = float((student - teacher).square().sum() / teacher.square().sum())
    assert float(feature_error(student, teacher)) == pytest.approx(expected)
    assert float(feature_error(100 * student, 100 * teacher)) == pytest.approx(expected)


# ---------------------------------------------------------------- what they are taken of


def run(kind: str, student: nn.Module, teacher: nn.Module, batch: tuple[Tensor, Tensor], **options):
    found = Distillation(DistillConfig(kd=kind, **options), student, teacher, Call((batch[0][:1],), {}))
    with found.watching():
        outputs = teacher(batch[0]), student(batch[0])
    return found, found(outputs[1], outputs[0], batch[1])


@pytest.mark.parametrize("kind", ["kl", "cwd", "cirkd", "mse"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind: str) -> None:
    torch.manual_seed(0)
    teacher, batch = Dense(), dense_images()[0]
    _, same = run(kind, copy.deepcopy(teacher), teacher, batch)
    torch.manual_seed(1)
    _, other = run(kind, Dense(), teacher, batch)
    assert same.item() == pytest.approx(0, abs=1e-6)
    assert other.item() > 1e-3
    other.backward()


@pytest.mark.parametrize("labels", [True, False])
def test_relations_of_vectors_are_those_between_images(labels: bool) -> None:
    torch.manual_seed(0)
    teacher, (x, y) = make(1), images()[0]
    batch = (x, y) if labels else (x, F.one_hot(y, 6).float())
    found, same = run("cirkd", copy.deepcopy(teacher), teacher, batch)
    assert same.item() == pytest.approx(0, abs=1e-6)
    assert {int(name.split(".")[1]) for name in found.memory} == (set(y.tolist()) if labels else set())
    _, other = run("cirkd", make(2), teacher, batch)
    assert other.item() > 1e-3
    distill(make(2), teacher, images(), config=DistillConfig(epochs=1, kd="cirkd", mixup=0.0 if labels else 0.4))


def test_the_usual_temperature_and_weight_follow_the_loss() -> None:
    found = {name: (DistillConfig(kd=name).kd_temperature, DistillConfig(kd=name).weight_of_kd) for name in KD_LOSSES}
    assert found == KD_LOSSES
    given = DistillConfig(kd="cwd", temperature=1.5, kd_weight=0.5)
    assert (given.kd_temperature, given.weight_of_kd) == (1.5, 0.5)


class Staged(nn.Module):
    """Two stages of a residual block each, the second narrower in its inner layer as a student's may be."""

    def __init__(self, wide: int = 8, inner: int = 8) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, wide, 3), nn.Conv2d(wide, 2 * wide, 2, stride=2)
        self.stages = nn.ModuleList([Residual(wide, inner), Residual(2 * wide, inner)])
        self.head = nn.Linear(2 * wide, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[1](self.down(self.stages[0](self.stem(x))))
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.last(torch.relu(self.first(x))))


def test_features_are_the_streams_at_the_end_of_each_stage_if_not_named() -> None:
    torch.manual_seed(0)
    teacher, student = Staged(), Staged(6, 4)
    batch = torch.randn(4, 3, 9, 9), torch.arange(4)
    found, loss = run("mse", student, teacher, batch)
    assert found.pairs == {"stages.0": "stages.0", "stages.1": "stages.1"}
    assert {name: tuple(value.shape) for name, value in found.projections.items()} == {
        "stages/0": (8, 6), "stages/1": (16, 12),
    }  # fmt: skip
    again = Distillation(DistillConfig(kd="mse"), student, teacher)
    again.load(found.state())
    with again.watching():
        outputs = teacher(batch[0]), student(batch[0])
    assert again(outputs[1], outputs[0], batch[1]).item() == pytest.approx(loss.item())
    student.stages[1] = nn.Identity()  # what is left of a removed branch gives the stream
    assert run("mse", student, teacher, batch)[0].pairs == found.pairs
    other = nn.Sequential(
        nn.Conv2d(3, 6, 3), Residual(6, 2), nn.Conv2d(6, 4, 2, stride=2), Residual(4, 2), nn.Flatten()
    )
    assert run("mse", other, teacher, batch)[0].pairs == {"1": "stages.0", "3": "stages.1"}
    shallow = nn.Sequential(nn.Conv2d(3, 6, 3), Residual(6, 2), nn.Flatten(), nn.Linear(294, 16))
    assert run("mse", shallow, teacher, batch)[0].pairs == {"3": "head"}  # what the last layer reads


def test_narrower_features_are_projected_first_by_least_squares() -> None:
    """A student whose features are a linear image of the teacher's loses nothing by it."""
    torch.manual_seed(0)
    teacher, student, batch = Dense(8), Dense(6), dense_images()[0]
    with torch.no_grad():  # channels 6 and 7 of the teacher's are sums of others
        teacher.mid.weight[6:], teacher.mid.bias[6:] = teacher.mid.weight[:2] + teacher.mid.weight[2:4], 0
        teacher.mid.bias[:] = 0
        student.conv.weight[:], student.conv.bias[:] = teacher.conv.weight[:6], teacher.conv.bias[:6]
    _, loss = run("mse", student, teacher, batch, features={"conv": "conv"})
    assert loss.item() < 0.5
    found, loss = run("mse", student, teacher, batch, features=["mid"])
    (projection,) = found.projections.values()
    assert projection.shape == (8, 6)
    loss.backward()
    assert projection.grad is not None
    with pytest.raises(InputError, match="no module 'nothing'"):
        run("mse", student, teacher, batch, features=["nothing"])
    with pytest.raises(InputError, match="only differ in channels"):
        run("mse", nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 4, 1)), batch, features=["0"])


def test_the_memory_holds_embeddings_of_the_classes_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    teacher, data = Dense(), dense_images()
    found, _ = run("cirkd", Dense(6), teacher, data[0])
    assert found.pairs == {"head": "head"}
    assert {name.split(".")[0] for name in found.memory} == {"pixels", "regions"}
    assert {int(name.split(".")[1]) for name in found.memory} == set(data[0][1].unique().tolist()) - {-100}
    assert all(torch.allclose(queue.norm(dim=-1), torch.ones(len(queue))) for queue in found.memory.values())
    monkeypatch.setattr("cpd.distillation.kd.REGIONS", (5, 3))
    for x, y in data * 3:
        with found.watching():
            outputs = teacher(x), found.models[0](x)
        found(outputs[1], outputs[0], y)
    assert {len(queue) for name, queue in found.memory.items() if name.startswith("regions")} == {5}
    assert max(len(queue) for name, queue in found.memory.items() if name.startswith("pixels")) > 30


def test_the_last_layer_is_the_last_that_runs() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    assert last_layer(Backwards(), Call((torch.zeros(1, 3),), {})) == "last"
    with pytest.raises(InputError, match="features="):
        last_layer(nn.ReLU(), Call((torch.zeros(1, 3),), {}))


@pytest.mark.parametrize("kind", ["none", "kl", "cwd", "cirkd", "mse"])
def test_every_loss_trains_a_model_of_maps_while_it_shrinks(kind: str) -> None:
    torch.manual_seed(0)
    teacher, x = Dense(), dense_images()[0][0]
    student = copy.deepcopy(teacher)
    pruner = Pruner(
        student, x, target_params=0.6, steps=8, schedule=Schedule("linear", end=0.5, interval=2), round_to=1
    )
    features = ["conv", "mid"] if kind == "mse" else ()
    records = distill(
        student, teacher, dense_images(), config=DistillConfig(epochs=2, kd=kind, lr=1e-3, features=features),
        pruner=pruner,
    )  # fmt: skip
    assert pruner.done
    assert all(math.isfinite(record.loss) for record in records)
    assert (records[0].kd_loss is None) == (kind == "none")


@pytest.mark.parametrize("kind", ["kl", "cwd", "cirkd", "mse"])
def test_losses_in_mixed_precision(kind: str) -> None:
    torch.manual_seed(0)
    config = DistillConfig(epochs=1, kd=kind, mixed_precision="bf16", features=["mid"] if kind == "mse" else ())
    student = Dense(5)
    (record,) = distill(student, Dense(8), dense_images(), config=config)
    assert math.isfinite(record.kd_loss)
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())


def test_a_trained_projection_helps() -> None:
    torch.manual_seed(0)
    teacher, student = Dense(8), Dense(5)
    config = DistillConfig(epochs=8, lr=0.05, kd="mse", features=["mid"], kd_weight=10.0)
    records = distill(student, teacher, dense_images(), config=config)
    assert records[-1].kd_loss < 0.8 * records[0].kd_loss


# ---------------------------------------------------------------- averages and mixtures


def test_an_average_takes_the_students_place() -> None:
    """With a decay near 1 the student ends where it began; what is evaluated is the average."""
    seen = []
    student, data = make(), images()
    before = {name: value.clone() for name, value in student.named_parameters()}
    distill(student, make(1), data, config=DistillConfig(epochs=1, lr=0.5, ema=0.999999),
            evaluate=lambda model: seen.append(model) or 1.0)  # fmt: skip
    assert seen[0] is not student
    assert all(torch.allclose(value, before[name], atol=1e-3) for name, value in student.named_parameters())
    moved = make()
    distill(moved, make(1), data, config=DistillConfig(epochs=1, lr=0.5))
    assert not all(torch.allclose(value, before[name], atol=1e-3) for name, value in moved.named_parameters())


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_images_are_mixed_and_the_loaders_stay_as_they_were(options: dict) -> None:
    data = [(F.interpolate(x, 64), y) for x, y in images()]  # so large that no patch of CutMix is empty
    before = [x.clone() for x, _ in data]
    seen = []

    class Watched(Net):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    torch.manual_seed(0)
    records = distill(Watched(), make(1), data, config=DistillConfig(epochs=1, lr=0.01, **options))
    assert math.isfinite(records[0].loss)
    assert all(torch.equal(x, old) for (x, _), old in zip(data, before, strict=True))
    assert not any(torch.equal(x, old) for x, old in zip(seen[-6:], before, strict=True))


def test_a_last_batch_of_one_image_is_not_mixed() -> None:
    data = images()
    x, y = data[0]
    records = distill(Net(), make(1), [*data, (x[:1], y[:1])], config=DistillConfig(epochs=1, lr=0.01, mixup=0.4))
    assert math.isfinite(records[0].loss)


def test_mixing_needs_class_targets() -> None:
    with pytest.raises(InputError, match="class indices"):
        distill(Dense(), Dense(), dense_images(), config=DistillConfig(epochs=1, mixup=1.0))


@pytest.mark.parametrize(
    "options",
    [{"scheduler": "plateau"}, {"ema": 1.0}, {"mixup": -1}, {"features": "layer"}, {"kd": "at"}, {"temperature": 0}],
)
def test_settings_are_checked(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        DistillConfig(**options)


@pytest.mark.parametrize("scheduler", ["cosine", "poly", "tanh", "step"])
def test_schedulers_of_timm(scheduler: str) -> None:
    config = DistillConfig(epochs=2, lr=0.1, scheduler=scheduler, warmup=0.25)
    rates = [record.lr for record in distill(make(), make(1), images(), config=config)]
    assert rates[0] <= 0.1
    assert rates[1] < rates[0]


def test_the_teacher_alone_may_teach() -> None:
    """Wrong labels change nothing then, but for the task's loss that is told."""
    data = images(3)
    wrong = [(x, (y + 1) % CLASSES) for x, y in data]
    students = []
    for batches in (data, wrong):
        students.append(make())
        records = distill(students[-1], make(1), batches, config=DistillConfig(epochs=1, lr=0.1, task_weight=0.0))
        assert records[0].loss == pytest.approx(records[0].kd_loss)
    assert all(torch.equal(a, b) for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True))
