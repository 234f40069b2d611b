"""How far scores are noise: channels that are all alike, channels that differ, and samples enough to tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cpd
from cpd.criteria import Setting
from cpd.criteria.reliability import ALONE, PARTS, Means, drawn
from helpers.zoo import comb

CHANNELS = 256
AVERAGED = ("fisher", "taylor", "snip", "hessian", "hessian-trace", "apoz")
#: Whose values are above 0, so that enough samples tell even channels that are nearly alike.
ABOVE = ("fisher", "taylor", "hessian", "apoz")


def net() -> nn.Module:
    """The channels are the inputs; what reads them has weights of one size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, 10))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(CHANNELS))
        model[0].bias.zero_()
        for column in model[1].weight.T:  # as many classes for it as against it
            column[torch.randperm(10)] = torch.tensor([1.0, -1.0] * 5) / CHANNELS
    return model


def data(spread: float, batches: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of 16 samples: independent channels of one size, the first ones larger, and positive more often."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16 * batches, CHANNELS, generator=generator)
    x = (x + torch.linspace(spread, -spread, CHANNELS)) * torch.logspace(0, -spread, CHANNELS)
    return list(zip(x.split(16), torch.randint(10, (len(x),), generator=generator).split(16), strict=True))


def scored(criterion: str, spread: float, batches: int) -> cpd.criteria.score.Scores:
    model, given = net(), data(spread, batches)
    return cpd.score(model, comb(model, given[0][0][:1]), given, criterion=criterion, limit=batches)


@pytest.mark.parametrize("criterion", AVERAGED)
def test_channels_that_are_alike_are_told_from_channels_that_differ(criterion: str) -> None:
    noise, signal = scored(criterion, 0, 8), scored(criterion, 2, 8)
    unit = "128 samples" if criterion in ("fisher", "apoz") else "8 batches"
    assert f"half of the {unit} seen and the other half order its 256 channels differently" in noise.untrusted["0"]
    assert noise.reliability["0"] < 0.3
    assert not signal.untrusted
    assert signal.reliability["0"] > 0.6
    found = signal.drawn()["0"]
    assert torch.equal(found.argsort(stable=True), signal["0"].argsort(stable=True))
    assert float(found[:64].mean()) > 4 * float(found[-64:].mean())


@pytest.mark.parametrize("criterion", ABOVE)
def test_more_samples_are_trusted_more(criterion: str) -> None:
    few, many = scored(criterion, 0.1, 2), scored(criterion, 0.1, 64)
    assert "0" in few.untrusted
    assert not many.untrusted
    assert many.reliability["0"] > few.reliability["0"] + 0.3
    more = scored(criterion, 1, 64)  # with plenty of them scores stay what they were
    assert more.reliability["0"] > 0.97
    assert float((more.drawn()["0"] / more["0"]).log().abs().median()) < 0.1


def test_one_batch_tells_nothing_of_its_noise() -> None:
    scores = scored("taylor", 0, 1)
    assert scores.reliability == {"0": pytest.approx(ALONE)}
    assert not scores.untrusted


def test_drawn_scores_keep_their_mean_their_order_and_their_zeros() -> None:
    scores = torch.tensor([0.0, 1e-6, 1.0, 3.0, 20.0], dtype=torch.double)
    for reliability in (0.1, 0.5, 0.9, 1.0):
        found = drawn(scores, reliability)
        assert float(found.mean()) == pytest.approx(float(scores.mean()))
        assert float(found[0]) == 0
        assert torch.equal(found.argsort(), scores.argsort())
        ratio = float((found[4] / found[2]).log() / (scores[4] / scores[2]).log())
        assert ratio == pytest.approx(reliability)
    assert torch.equal(drawn(scores, 1.0), scores)
    assert drawn(scores[1:], 0.0).tolist() == pytest.approx([6.0] * 4, rel=1e-3)


def reliability(values: Tensor, **given: object) -> Setting:
    """What is said of the means of values [samples, size]."""
    setting, means = Setting(net(), None, **given), Means("samples")  # type: ignore[arg-type]
    for part in values.split(5):
        means.add([part], len(part))
    means.pool(setting)
    found = means.scores(setting, lambda means: {"a": means[0]})["a"]
    torch.testing.assert_close(found, values.mean(0))
    return setting


def test_reliability_is_that_of_the_model_of_noise() -> None:
    """Logarithms of a true size and of noise of equal spread: half of what is seen is true."""
    torch.manual_seed(0)
    true, size = torch.randn(4000), 64
    noise = (torch.randn(size, 4000) * 0.1 * size**0.5).exp()
    found = reliability((0.1 * true).exp() * noise / noise.mean()).reliability["a"]
    seen = (noise.mean(0) / noise.mean()).log()
    assert found == pytest.approx(0.01 / (0.01 + float(seen.var())), abs=0.05)


def test_what_is_alike_throughout_is_no_noise() -> None:
    assert reliability(torch.ones(16, 5)).reliability == {"a": 1.0}
    assert reliability(torch.zeros(16, 5)).reliability == {"a": 1.0}
    assert reliability(torch.rand(3, 1)).reliability == {"a": 1.0}


@pytest.mark.parametrize("samples", [2, 3, 7, PARTS, 9])
def test_few_samples_are_cut_in_halves_as_they_can(samples: int) -> None:
    values = torch.logspace(0, 2, 40) * (1 + 0.01 * torch.rand(samples, 40))
    assert reliability(values).reliability["a"] > 0.99


def test_sums_go_over_processes() -> None:
    values = torch.rand(20, 300, generator=torch.Generator().manual_seed(0))
    one, two = reliability(values), reliability(values, total=lambda tensor: 2 * tensor)
    assert one.reliability == pytest.approx(two.reliability)
    assert "half of the 20 samples" in one.untrusted["a"]
    assert "half of the 40 samples" in two.untrusted["a"]


class Two(nn.Module):
    """A group whose channels differ, and one whose channels are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.alike = net(), net()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x[:, :CHANNELS]) + self.alike(x[:, CHANNELS:])


def test_a_group_of_noise_is_left_whole_where_the_target_allows_it() -> None:
    for target, told in (
        (0.8, "not pruned, because their scores are not reliable"),
        (0.3, "were used, because the target"),
    ):
        both = zip(data(2, 4), data(0, 4), strict=True)
        model, given = Two(), [(torch.cat([x, other], 1), y) for (x, y), (other, _) in both]
        pruner = cpd.Pruner(
            model, given[0][0][:1], steps=0, data=given, criterion="fisher", target_macs=target, compensation=False,
            scope="global",
        )  # fmt: skip
        pruner.prune()
        (note,) = [note for note in pruner.notes if "not reliable" in note]
        assert told in note
        assert "alike.0: half of the 64 samples" in note
        assert "first.0" not in note
        assert (model.alike[0].out_features == CHANNELS) == (target == 0.8)
