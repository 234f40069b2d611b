"""Optimal Brain Surgeon over channels: what removal would cost after the others have been refitted.

The output of a layer is W x. If positions go and the remaining weights are refitted to the old output by least
squares, the output changes by an error of covariance W_j (inverse(S)_jj)^-1 W_j^T, S the covariance of x over
calibration data and j the position's columns (Hassibi and Stork 1993, "Second order derivatives for network
pruning", eq. 5; Frantar and Alistarh 2022, arXiv 2208.11580). Errors at different layers are made comparable by G,
the covariance of the gradient of the model's output at the layer's output, as in K-FAC (Martens and Grosse 2015,
arXiv 1503.05671):

    score_j = trace(G W_j (inverse(S)_jj)^-1 W_j^T)

which is the expected squared change of the model's logits. The gradient is that of the logits in a random direction,
so no target is needed, and it does not vanish on data that the model was trained on. Positions are removed one after
the other, the weights and inverse(S) updated each time, so that of two positions that replace each other only one is
cheap. What no layer reads (q and k) cannot be refitted: there the change is that of removal alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cpd.criteria.activation_gates import CallSites, sample_gradients
from cpd.criteria.context import SETTING, Setting
from cpd.criteria.gates import Site
from cpd.model.inputs import logits
from cpd.options import checked
from cpd.trace.layer_calls import LayerCall, matrix

#: How far a covariance is drawn towards its diagonal: as far as tells best what was held out.
SHRINKAGES = (1e-3, 1e-2, 0.1, 0.3, 0.6, 0.9, 0.99)
#: A group of more channels than so many times the rows seen of it is left whole.
TRUSTED = 8
#: One sample of so many is held out.
HELD_OUT = 4
#: Rows of a layer's input per batch: so many a feature.
ROWS_A_FEATURE = 16
#: Added to the variances, relative to their mean, so that none is 0.
LEAST_VARIANCE = 1e-3
#: With more features than this, kernel positions share one covariance of the channels.
MOST_FEATURES = 2304
#: Layers with more inputs than this are not refitted: their covariance takes too long to invert.
MOST_INPUTS = 8192
#: Rows of a layer's input per batch.
ROWS = 4096
#: Layers with more features than this go in float32 from the inverse on.
EXACT = 256
#: A group is emptied in about this many steps.
STEPS = 64


@checked(setting=SETTING)
def obs(setting: Setting) -> dict[str, Tensor]:
    """The expected squared change of the logits when a position goes after all that cost less, the rest refitted."""
    sites = CallSites.of(setting)
    moments: dict[str, Moments] = {}
    generator = torch.Generator().manual_seed(setting.seed)
    alone: dict[str, Tensor] | None = None  # of the groups that no layer can be refitted for
    count = 0

    def after(layer: LayerCall) -> None:
        if layer.weight in sites.read:
            along = sites.samples_along.get((layer.weight, 0), (0, 0))[0]
            found = moments.setdefault(layer.weight, Moments(layer, setting.place[1]))
            found.add(layer, batch.call.samples, along, generator)

    for batch in setting.batches():

        def direction(batch: object = batch) -> Tensor:
            output = logits(setting.comb.read(setting.output(batch)))  # type: ignore[arg-type]
            return (output * setting.own(output.shape, generator).to(output)).sum()

        every = sample_gradients(setting, sites, batch, direction, after, alone)
        if alone is None:
            usable = [weight for weight, moment in moments.items() if moment.usable]
            refitted = {site.group for weight in usable for site in sites.read[weight]}
            alone = {name: torch.zeros_like(found[0]) for name, found in every.items() if name not in refitted}
        for name, sums in alone.items():
            sums += every[name].square().sum(0)
        count += batch.call.samples
    assert alone is not None
    count, result, ordered = setting.sum_of(count), dict[str, Tensor](), dict[str, list[Site]]()
    for moment in moments.values():
        moment.pool(setting.total)
    for group in setting.comb.open:
        readable = [site for along in sites.read.values() for site in along if site.group == group.name]
        rows = min((sum(moments[site.tensor].rows) for site in readable), default=group.size)
        if group.size > TRUSTED * rows:
            setting.untrusted[group.name] = (
                f"it has {group.size} channels, and what they hold was seen only {rows} times; "
                f"from {math.ceil(group.size / TRUSTED)} on it can be told which of them stand in for others"
            )
        ordered[group.name] = [site for site in readable if moments[site.tensor].usable]
        if not ordered[group.name]:
            result[group.name] = (setting.total(alone[group.name]) / count).cpu()
    result |= _shared_out(setting, {name: sites for name, sites in ordered.items() if sites}, moments, count)
    return {name: result[name] for name in ordered}


def _shared_out(
    setting: Setting, groups: dict[str, list[Site]], moments: dict[str, Moments], samples: int
) -> dict[str, Tensor]:
    """The scores of groups by the layers that read them; each process does some of the groups.

    Args:
        setting: what is scored, and by which processes.
        groups: {group: where layers read it}.
        moments: of those layers, over all processes.
        samples: that those are sums over.
    """
    rank, count = setting.place
    cost = {name: sum(moments[site.tensor].work for site in sites) for name, sites in groups.items()}
    loads, own = [0] * count, set[str]()
    for name in sorted(groups, key=lambda name: (-cost[name], name)):  # the longest first, to who has done least
        least = loads.index(min(loads))
        loads[least] += cost[name]
        own |= {name} if least == rank else set()
    found = {}
    for name, sites in groups.items():
        if name in own:
            found[name] = _in_order(sites[0].size, [_Reader(moments[site.tensor], site, samples) for site in sites])
        else:
            found[name] = torch.zeros(sites[0].size, dtype=torch.double)
    return {name: setting.total(scores) for name, scores in found.items()} if count > 1 else found


class Moments:
    """Covariance of a layer's input and of the gradient at its output, over batches.

    Args:
        layer: a call of it.
        processes: that each batch is shared out to.
    """

    def __init__(self, layer: LayerCall, processes: int = 1) -> None:
        self.weight: Tensor = layer.given["weight"].detach()
        self.kind, self.groups = layer.kind, layer.groups
        weights = matrix(layer.kind, self.weight, layer.groups)
        kernel = self.weight[0, 0].numel()
        inputs = weights.shape[-1] // (kernel if layer.kind == "conv" else 1)
        self.usable = inputs <= MOST_INPUTS and not (layer.kind == "transposed" and layer.groups > 1)
        #: Kernel positions are treated as further outputs rather than as further inputs.
        self.folded = layer.kind == "transposed" or (layer.kind == "conv" and weights.shape[-1] > MOST_FEATURES)
        self.repeats = 1 if self.folded else weights.shape[-1] // inputs
        if self.folded and layer.kind == "conv":
            weights = weights.unflatten(-1, (inputs, kernel)).movedim(-1, 2).flatten(1, 2)
        self.matrix = weights.double()
        self.kernel = kernel if self.folded else 1
        features, outputs = weights.shape[-1], weights.shape[1] // self.kernel
        like = {"device": self.weight.device, "dtype": torch.float32}
        #: Of the samples that are fitted, and of those that are held out.
        self.second = torch.zeros(2, layer.groups, features, features, **like)
        self.first = torch.zeros(2, layer.groups, features, **like)
        self.gradient = torch.zeros(layer.groups, outputs, outputs, **like)
        self.rows = [0, 0]
        self.wanted = min(ROWS, ROWS_A_FEATURE * features) // processes

    @property
    def work(self) -> int:
        """How long a layer takes that reads a group while its channels go, in no unit."""
        return int(self.second.shape[1] * self.second.shape[2] ** 3)

    def add(self, layer: LayerCall, samples: int, along: int, generator: torch.Generator) -> None:
        """Add one call, and its gradient once that is known."""
        if not self.usable:
            return
        index = layer.spread(self.wanted, samples, along, generator)
        with torch.no_grad():
            x = layer.features(index).float()
            held = torch.arange(x.shape[1], device=x.device) * samples // x.shape[1] % HELD_OUT == HELD_OUT - 1
            for which, rows in enumerate((x[:, ~held], x[:, held])):
                if self.folded and layer.kind == "conv":
                    rows = rows.unflatten(-1, (self.second.shape[-1], self.kernel)).transpose(2, 3).flatten(1, 2)
                self.second[which] += rows.transpose(1, 2) @ rows
                self.first[which] += rows.sum(1)
                self.rows[which] += rows.shape[1]
        share = 1.0 if layer.kind == "transposed" else layer.rows / x.shape[1]
        shape = layer.without_data()

        def at_output(gradient: Tensor) -> None:
            if shape.kind == "transposed":
                rows = gradient.flatten(2).transpose(1, 2).flatten(0, 1).unsqueeze(0).float()
            else:
                rows = shape.outputs(index, gradient).float()
            self.gradient.add_(rows.transpose(1, 2) @ rows, alpha=share)

        layer.output.register_hook(at_output)

    def pool(self, total: Callable[[Tensor], Tensor]) -> None:
        """Sum over processes."""
        self.second, self.first, self.gradient = map(total, (self.second, self.first, self.gradient))
        self.rows = [int(rows) for rows in total(torch.tensor(self.rows))]

    def covariance(self) -> Tensor:
        """Of the input, [groups, features, features], drawn towards its diagonal.

        From fewer rows than features some seem to follow from the others that do not; so what is held out decides.
        """
        second, first = self.second.double(), self.first.double()
        both = _about(second.sum(0), first.sum(0), first.sum(0) / sum(self.rows), sum(self.rows))
        if not all(self.rows):
            return _shrunk(both, SHRINKAGES[-1])
        mean = first[0] / self.rows[0]
        fit, held = (_about(second[part], first[part], mean, self.rows[part]) for part in (0, 1))
        return _shrunk(both, _least(SHRINKAGES, lambda share: _surprise(_shrunk(fit, share), held)))


def _least(shares: Sequence[float], of: Callable[[float], float]) -> float:
    """The share at the first minimum: with enough rows that is an early one, and those after it are not tried."""
    best, value = shares[0], of(shares[0])
    for share in shares[1:]:
        if (found := of(share)) >= value:
            break
        best, value = share, found
    return best


def _about(second: Tensor, first: Tensor, mean: Tensor, rows: int) -> Tensor:
    """The mean product of deviations from `mean`, of sums over rows, [groups, features, features]."""
    average = first / rows
    cross = average[:, :, None] * mean[:, None, :]
    return second / rows - cross - cross.transpose(1, 2) + mean[:, :, None] * mean[:, None, :]


def _shrunk(covariance: Tensor, share: float) -> Tensor:
    """A covariance drawn to its diagonal (Schaefer and Strimmer 2005, "A shrinkage approach", target D)."""
    variances = covariance.diagonal(dim1=1, dim2=2).clamp_min(0)
    least = LEAST_VARIANCE * variances.mean(1, keepdim=True).clamp_min(1e-12)
    return (1 - share) * covariance + torch.diag_embed(share * variances + least)


def _surprise(covariance: Tensor, held: Tensor) -> float:
    """How badly a covariance tells each feature of rows held out from the others: minus their log pseudo-likelihood.

    The sum over features of log v + e / v, v the variance that it leaves to a feature given the others and e the mean
    squared error on the rows (Besag 1975, "Statistical analysis of non-lattice data").
    """
    precision = inverse_of(covariance)
    left = 1 / precision.diagonal(dim1=1, dim2=2)
    errors = ((precision @ held) * precision).sum(2) * left.square()
    return float((left.clamp_min(1e-30).log() + errors / left).sum())


def inverse_of(covariance: Tensor) -> Tensor:
    """Of a positive matrix, or of one that rounding has left a little short of it."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    return torch.linalg.inv(covariance) if bool(failed.any()) else torch.cholesky_inverse(factor)


class _Reader:
    """One layer that reads a group, while the group's positions go one by one.

    Attributes:
        inverse: of the covariance of the input, [groups, features, features].
        outputs: square root of G, times the weights: [groups, outputs, features].
        columns: the features of each position, [size, features of one].
    """

    def __init__(self, moments: Moments, site: Site, samples: int) -> None:
        labels = site.labels.repeat_interleave(moments.repeats)
        self.columns = torch.argsort(labels, stable=True)[int((labels < 0).sum()) :].view(site.size, -1)
        covariance = moments.covariance()
        dtype = torch.double if len(covariance[0]) <= EXACT else torch.float
        self.inverse = inverse_of(covariance).to("cpu", dtype)
        root = _root(moments.gradient.double() / samples)
        folded = moments.matrix.unflatten(1, (-1, moments.kernel)).flatten(2)
        self.outputs = (root @ folded).unflatten(2, (moments.kernel, -1)).flatten(1, 2).to("cpu", dtype)

    def errors(self, positions: Tensor) -> Tensor:
        """trace(G W_j (inverse(S)_jj)^-1 W_j^T) of each position alone."""
        columns = self.columns[positions]
        blocks = self.inverse[:, columns[:, :, None], columns[:, None, :]]
        if columns.shape[1] == 1:  # what follows is the same for blocks of one, but slow for many of them
            return torch.div(self.outputs.square().sum(1)[:, columns[:, 0]], blocks[:, :, 0, 0]).sum(0).double()
        weights = self.outputs.transpose(1, 2)[:, columns]
        return torch.mul(torch.linalg.inv(blocks), weights @ weights.transpose(2, 3)).sum((0, 2, 3)).double()

    def remove(self, positions: Tensor) -> None:
        """Refit what is left to the old output, and leave out the features of these positions."""
        gone = self.columns[positions].flatten()
        stays = torch.ones(self.inverse.shape[1], dtype=torch.bool)
        stays[gone] = False
        kept = stays.nonzero()[:, 0]
        step = torch.linalg.solve(self.inverse[:, gone][:, :, gone], self.inverse[:, gone][:, :, kept])
        self.outputs = self.outputs[:, :, kept] - self.outputs[:, :, gone] @ step
        self.inverse = self.inverse[:, kept][:, :, kept] - self.inverse[:, kept][:, :, gone] @ step
        self.columns = (stays.cumsum(0) - 1)[self.columns]


def _root(covariance: Tensor) -> Tensor:
    """R with R^T R = the covariance, which float32 sums may have left a little short of positive."""
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30)[:, None, None]
    identity = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
    for power in range(-7, 1):
        factor, failed = torch.linalg.cholesky_ex(covariance + 10.0**power * trace * identity)
        if not failed.any():
            break
    root: Tensor = factor.transpose(1, 2)
    return root


def _in_order(size: int, readers: list[_Reader]) -> Tensor:
    """The error of each position at the time when it is the next to go; never less than that of one gone before."""
    left, scores, highest = torch.arange(size), torch.zeros(size, dtype=torch.double), 0.0
    at_once = math.ceil(size / STEPS)
    while len(left) > 1:
        errors = sum((reader.errors(left) for reader in readers), torch.zeros(len(left), dtype=torch.double))
        order = torch.argsort(errors, stable=True)[: min(at_once, len(left) - 1)]
        for place in order.tolist():
            highest = max(highest * (1 + 1e-9), float(errors[place]))
            scores[left[place]] = highest
        for reader in readers:
            reader.remove(left[order])
        left = left[torch.isin(torch.arange(len(left)), order, invert=True)]
    scores[left] = highest * (1 + 1e-6) + 1e-30
    return scores
