"""The noise of 8 bits in closed form, beside what quantization really adds; and what is left in float for it."""

import numpy as np
import pytest
import torch
from torch import nn

import cpd
from cpd.deploy.export import export_bytes, open_session, run_session
from cpd.deploy.int8 import quantized_onnx, samples_of
from cpd.deploy.latency import LatencyProbe
from cpd.deploy.noise import MOST_NOISE, noise_of, noisy_nodes
from cpd.model.inputs import as_call


def net(outlier):
    """Convolutions of which the second reads a channel that is so many times as large as the others."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1, groups=4), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(),
        nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[0] *= outlier
        model[0].bias[0] *= outlier
        model[2].weight[:4, 0] /= outlier
    return model.eval()


def exported(outlier):
    call = as_call(torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    content = export_bytes(net(outlier), call)
    images = as_call(torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(2)))
    return content, samples_of(open_session(content), [images])


def error(content, samples, exclude):
    """Of the outputs in 8 bits, by the variance of each of the float ones."""
    float_model, int8 = open_session(content), open_session(quantized_onnx(content, samples, exclude=exclude))
    pairs = [(run_session(float_model, item)[0], run_session(int8, item)[0]) for item in samples]
    expected, found = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    return float(np.square(found - expected).mean() / expected.var(0).mean())


def test_the_noise_of_all_nodes_adds_up_to_about_the_error_of_the_outputs():
    content, samples = exported(1.0)
    found = noise_of(content, samples)
    assert len(found) == 5
    assert 0.2 < sum(found.values()) / error(content, samples, []) < 5
    assert noisy_nodes(content, samples) == []


def test_the_node_that_8_bits_cost_most_stays_in_float():
    content, samples = exported(200.0)
    found = noise_of(content, samples)
    assert sum(found.values()) > MOST_NOISE
    left = noisy_nodes(content, samples)
    assert left[0] == max(found, key=found.get)
    assert set(left) >= set(list(found)[:2])  # with it what gives it its input, which would be rounded
    assert len(set(left) & set(found)) == 2
    assert error(content, samples, left) < 0.2 * error(content, samples, [])


def test_an_int8_runtime_leaves_it_in_float_where_there_is_data(tmp_path):
    model, data = net(200.0), [(torch.randn(32, 3, 8, 8), torch.zeros(32, dtype=torch.long))]
    with_data, without = (
        LatencyProbe(model, torch.randn(1, 3, 8, 8), runtime="onnxruntime:int8", calibration=calibration).original
        for calibration in (data, None)
    )
    assert len(with_data.in_float) == 3  # two convolutions, and the ReLU between them
    assert without.in_float == []
    made = [
        cpd.quantize_onnx(with_data.content, data, tmp_path / "a.onnx", seconds=0.01, exclude=exclude)
        for exclude in ("auto", ())
    ]
    assert made[0].parity < 0.5 * made[1].parity
    with pytest.raises(cpd.InputError, match="names of ONNX nodes in a list, or 'auto'"):
        cpd.quantize_onnx(with_data.content, data, tmp_path / "a.onnx", exclude="noisy")
