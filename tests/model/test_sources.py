"""Models by name: what is resolved, identified, built, and what one input of it looks like."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves

from cpd.errors import ArtifactError, InputError
from cpd.model.inputs import as_call
from cpd.model.sources import ModelSource, default_inputs, identify, image_inputs, resolve


@pytest.mark.parametrize(
    "name",
    [
        "timm:resnet18",
        "timm:resnet18.a1_in1k,num_classes=10",
        "timm:vit_tiny_patch16_224,img_size=[96,96],num_classes=10",
        "torchvision:swin_t",
        "torchvision:resnet18,num_classes=3",
        "torch.nn:Identity",
        'torch.nn:Identity,note="10"',
    ],
)
def test_names_round_trip(name: str) -> None:
    source = resolve(name)
    assert str(source) == name
    assert ModelSource.from_dict(json.loads(json.dumps(source.to_dict()))) == source


def test_arguments_are_json_or_text() -> None:
    source = resolve("timm:resnet18,num_classes=10,global_pool=max,norm=null")
    assert source.kwargs == {"num_classes": 10, "global_pool": "max", "norm": None}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet81", "timm has no model 'resnet81'.*resnet18"),
        ("timm:regnetx_oo2", r"Did you mean regnetx_032, regnetx_002, "),
        ("timm:resnet18.a9_in1k", "resnet18.a1_in1k"),
        ("torchvision:shufflenet_v2_x1", "shufflenet_v2_x1_0"),
        ("resnet18", "timm:resnet18 or torchvision:resnet18"),
        ("timm:", "timm:NAME"),
        ("", "timm:NAME"),
        ("a b:c", "timm:NAME"),
        ("../x:y", "timm:NAME"),
        ("cpd_no_such_package.models:build", "no module"),
        ("torchvisio:build", "torchvision"),
        ("torch.nn:Identiti", "Identity"),
        ("torch:__version__", "not a callable"),
    ],
)
def test_unknown_names_suggest(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(name)


def test_factory_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models_here.py").write_text(
        "import torch\ndef build(width=4):\n    return torch.nn.Linear(width, 2)\ndef number():\n    return 3\n"
    )
    (tmp_path / "needs_more_here.py").write_text("import cpd_no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    model = resolve("my_models_here:build,width=6").build()
    assert isinstance(model, nn.Linear)
    assert model.in_features == 6
    with pytest.raises(InputError, match="got int"):
        resolve("my_models_here:number").build()
    with pytest.raises(InputError, match="cpd_no_such_dependency"):
        resolve("needs_more_here:build")
    assert sys.path == path


def test_build_failure_is_an_input_error() -> None:
    with pytest.raises(InputError, match="Could not build timm:resnet18,no_such_argument=1"):
        resolve("timm:resnet18,no_such_argument=1").build()
    with pytest.raises(InputError, match="num_classes"):
        resolve("torchvision:resnet18,num_classes=3").build(pretrained=True)


def test_build_takes_arguments() -> None:
    model = resolve("timm:resnet18,num_classes=10").build(num_classes=4)
    assert model.fc.out_features == 4


def test_foreign_source_dict() -> None:
    with pytest.raises(ArtifactError, match="no model source"):
        ModelSource.from_dict({"kind": "pickle", "name": "x", "kwargs": {}})


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: timm.create_model("resnet18", num_classes=10), "timm:resnet18.a1_in1k,num_classes=10"),
        (lambda: timm.create_model("resnet18", in_chans=1), "timm:resnet18.a1_in1k,num_classes=1000,in_chans=1"),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=5),
            "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k,num_classes=5,img_size=[96,96]",
        ),
        (lambda: torchvision.models.shufflenet_v2_x1_0(), "torchvision:shufflenet_v2_x1_0,num_classes=1000"),
        (lambda: torchvision.models.squeezenet1_1(num_classes=7), "torchvision:squeezenet1_1,num_classes=7"),
        (lambda: torchvision.models.regnet_x_400mf(), "torchvision:regnet_x_400mf,num_classes=1000"),
    ],
)
def test_identify(model: Any, expected: str) -> None:
    built = model()
    state = torch.get_rng_state()
    source = identify(built)
    assert str(source) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert source is not None
    rebuilt = source.build()
    rebuilt.load_state_dict(built.state_dict())


def _changed_conv() -> nn.Module:
    model = timm.create_model("resnet18")
    model.layer1[0].conv1 = nn.Conv2d(64, 64, 5, padding=2, bias=False)
    return model


def _changed_stride() -> nn.Module:
    model = timm.create_model("resnet18")
    model.layer2[0].conv1.stride = (1, 1)
    return model


def _changed_setting() -> nn.Module:
    model = timm.create_model("resnet18")
    model.drop_rate = 0.5  # neither the state dict nor str(model) shows it
    return model


def _changed_forward() -> nn.Module:
    model = timm.create_model("resnet18")
    model.forward = model.forward_features
    return model


class _Subclass(torchvision.models.ResNet):
    pass


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
        _changed_conv,
        _changed_stride,
        _changed_setting,
        _changed_forward,
        lambda: _Subclass(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2]),
    ],
)
def test_identify_gives_none_rather_than_guess(build: Any) -> None:
    assert identify(build()) is None


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("timm:resnet18", (1, 3, 224, 224)),
        ("timm:resnet18,in_chans=1", (1, 1, 224, 224)),
        ("timm:vit_tiny_patch16_224,img_size=96,depth=1", (1, 3, 96, 96)),
        ("torchvision:shufflenet_v2_x0_5", (1, 3, 224, 224)),
        ("torchvision:inception_v3", (1, 3, 299, 299)),
        ("torchvision:efficientnet_b1", (1, 3, 240, 240)),
        ("torchvision:lraspp_mobilenet_v3_large", (1, 3, 224, 224)),
    ],
)
def test_default_inputs(name: str, shape: tuple[int, ...]) -> None:
    source = resolve(name)
    model = source.build().double()
    state = torch.get_rng_state()
    inputs = default_inputs(model, source)
    assert inputs is not None
    assert (tuple(inputs.shape), inputs.dtype) == (shape, torch.float64)
    assert inputs.std() > 0.9
    assert torch.equal(inputs, default_inputs(model))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["mc3_18", "raft_small", "ssdlite320_mobilenet_v3_large"])
def test_default_inputs_of_torchvision_models_that_take_no_single_image(name: str) -> None:
    source = resolve(f"torchvision:{name}")
    model = source.build().eval()
    first, again = default_inputs(model, source), default_inputs(model)
    leaves = zip(tree_leaves(first), tree_leaves(again), strict=True)
    assert all(torch.equal(left, right) for left, right in leaves)
    with torch.no_grad():
        as_call(first).on(model)


def test_default_inputs_of_unknown_models() -> None:
    assert default_inputs(nn.Conv2d(3, 8, 3)) is None
    assert image_inputs(nn.Conv2d(5, 8, 3), (4, 6)).shape == (1, 5, 4, 6)
