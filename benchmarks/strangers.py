"""Comb models of packages that `cpd` was not written against: `python benchmarks/strangers.py [--json F] [NAME …]`.

Small models with random weights, of audio, 3-D and medical images, diffusion, point clouds, tables, detection, text,
time series, super resolution, video, characters, faces and EEG. Each runs in a process of its own under a time limit.

| column | what it is |
|---|---|
| open | the share of parameters in open groups |
| error | masked = shrunk in float64, 30 % of every open group removed at random, relative to the largest output |
| parts | "whole", or the submodules that were combed where the model cannot be exported whole |
| why not | below 90 %: the reason of the frozen width along which most parameters lie that are in no open group |

A package that is not installed is a row that says so. All are installed, without their dependencies so that none brings
a torch of its own, by `pip install --no-deps $(python benchmarks/strangers.py --packages)`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import results
import torch
from coverage import limited
from models import random_plan, randomize
from oracles import check_masked, frozen_reasons, outputs_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cpd
from cpd.model.inputs import Call, as_call

#: What the rows were made with.
PACKAGES = """
asteroid==0.7.0 braindecode==1.8.1 conformer==0.3.2 denoising-diffusion-pytorch==2.3.4 diffusers==0.42.1
dynamic-network-architectures==0.4.4 easyocr==1.7.2 effdet==0.4.1 encodec==0.1.1 facenet-pytorch==2.6.0
g-mlp-pytorch==0.1.5 iTransformer==0.8.1 kornia==0.9.0 mambapy==1.2.0 monai==1.6.1 neuraloperator==2.0.0
open-clip-torch==3.3.0 openunmix==1.3.0 perceiver-pytorch==0.11.0 point-transformer-pytorch==0.1.5
python-doctr==1.1.0 pytorch-tabnet==4.1.0 pytorch-tcn==1.2.3 pytorchcv==0.0.74 pytorchvideo==0.1.5
rtdl-revisiting-models==0.0.2 segment-anything==1.0 spandrel==0.4.2 speechbrain==1.1.2
tab-transformer-pytorch==0.6.1 tabm==0.0.3 timesformer-pytorch==0.4.1 torchaudio==2.11.0 torchsr==1.0.4
uformer-pytorch==0.0.8 vit-pytorch==1.26.11 vocos==0.1.0 x-transformers==2.31.10
"""
#: What those import, and torch, torchvision and timm do not bring.
ALSO = """
antlr4-python3-runtime==4.9.3 anyascii asteroid-filterbanks axial-positional-embedding beartype beautifulsoup4
certifi cffi charset-normalizer colt5-attention configmypy decorator discrete-continuous-embed-readout
docstring-inheritance einops einx ema-pytorch frozendict ftfy fvcore gateloop-transformer h5py hyper-connections
hyperpyyaml imageio importlib-metadata iopath julius kornia-rs langdetect lazy-loader
linear-attention-transformer linear-operator linformer local-attention loguru mne mne-bids omegaconf
opencv-python-headless opt-einsum pandas pooch portalocker product-key-memory pyclipper pycocotools pycparser
python-bidi pytz rapidfuzz regex requests rotary-embedding-torch rtdl-num-embeddings ruamel.yaml scikit-image
sentencepiece shapely six skorch soundfile soupsieve tabulate tensorly tensorly-torch termcolor tifffile
torch-einops-utils torchinfo urllib3 validators wcwidth x-mlps-pytorch yacs zipp
"""


class Stranger(NamedTuple):
    """A model, its inputs, the package it is of and its field."""

    package: str
    field: str
    make: Callable[[], tuple[nn.Module, Any]]


#: The share of parameters in open groups from which a model counts as open.
ENOUGH = 0.9

STRANGERS: dict[str, Stranger] = {}


def stranger(package: str, field: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Enter a function that gives a model and its inputs under its own name."""

    def enter(make: Callable[[], Any]) -> Callable[[], Any]:
        STRANGERS[make.__name__] = Stranger(package, field, make)
        return make

    return enter


def normal(*shape: int) -> Tensor:
    """Normal values."""
    return torch.randn(*shape)


def tokens(most: int, *shape: int) -> Tensor:
    """Integers below `most`."""
    return torch.randint(most, shape)


# ---------------------------------------------------------------------------------- audio


class Recogniser(nn.Module):
    """Features to a width, an encoder that knows the lengths, and letters."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.encoder, self.head = nn.Linear(20, width), encoder, nn.Linear(width, 12)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Letters of features `[B, T, 20]`."""
        return self.head(self.encoder(self.embed(x), lengths)[0])


@stranger("torchaudio", "audio")
def conformer() -> Any:
    from torchaudio.models import Conformer

    return Recogniser(Conformer(32, 4, 64, 2, 7), 32), (normal(2, 20, 20), torch.tensor([20, 20]))


@stranger("torchaudio", "audio")
def conv_tasnet() -> Any:
    from torchaudio.models import ConvTasNet

    return ConvTasNet(2, 16, 48, 3, 24, 40, 3, 2), normal(1, 1, 640)


@stranger("torchaudio", "audio")
def wav2vec2() -> Any:
    from torchaudio.models import wav2vec2_model

    layers = [(32, 10, 5), (32, 3, 2), (32, 3, 2)]
    model = wav2vec2_model(
        "group_norm", layers, False, 48, 0.0, 16, 4, 2, 4, 0.0, 96, 0.0, 0.0, False, 0.0, 12
    )  # fmt: skip
    return model, normal(1, 1600)


@stranger("torchaudio", "audio")
def wavlm() -> Any:
    from torchaudio.models import wavlm_model

    layers = [(32, 10, 5), (32, 3, 2), (32, 3, 2)]
    model = wavlm_model(
        "layer_norm", layers, True, 48, 0.0, 16, 4, 2, 4, 32, 80, 0.0, 96, 0.0, 0.0, True, 0.0, 12
    )  # fmt: skip
    return model, normal(1, 1600)


@stranger("torchaudio", "audio")
def hdemucs() -> Any:
    from torchaudio.models import HDemucs

    return HDemucs(["a", "b"], 2, 8, nfft=1024, depth=5), normal(1, 2, 8192)


@stranger("torchaudio", "audio")
def emformer() -> Any:
    from torchaudio.models import Emformer

    return Emformer(32, 4, 64, 2, 4, right_context_length=1), (normal(1, 17, 32), torch.tensor([17]))


@stranger("encodec", "audio")
def encodec() -> Any:
    from encodec.modules import SEANetDecoder, SEANetEncoder

    sizes = {"channels": 1, "dimension": 32, "n_filters": 8, "ratios": [4, 2], "lstm": 1}
    return nn.Sequential(SEANetEncoder(**sizes), SEANetDecoder(**sizes)), normal(1, 1, 320)


@stranger("vocos", "audio")
def vocos() -> Any:
    from vocos.models import VocosBackbone

    return nn.Sequential(VocosBackbone(24, 48, 96, 3), nn.Linear(48, 34)), normal(1, 24, 20)


@stranger("speechbrain", "audio")
def ecapa_tdnn() -> Any:
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    return ECAPA_TDNN(24, lin_neurons=16, channels=[64] * 4 + [96], attention_channels=24, se_channels=24), normal(
        1, 40, 24
    )


@stranger("speechbrain", "audio")
def hifigan() -> Any:
    from speechbrain.lobes.models.HifiGAN import HifiganGenerator

    return HifiganGenerator(24, 1, "1", [[1, 3, 5], [1, 3, 5]], [3, 7], [8, 4], 64, [4, 2]), normal(1, 24, 12)


@stranger("asteroid", "audio")
def dprnn_tasnet() -> Any:
    from asteroid.models import DPRNNTasNet

    return DPRNNTasNet(2, bn_chan=32, hid_size=24, chunk_size=10, n_repeats=2, n_filters=32), normal(1, 800)


@stranger("openunmix", "audio")
def open_unmix() -> Any:
    from openunmix.model import OpenUnmix

    return OpenUnmix(65, 2, 48, 2), normal(1, 2, 65, 12)


# ---------------------------------------------------------------------------------- 3-D and medical images


@stranger("monai", "medical")
def swin_unetr() -> Any:
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(in_channels=1, out_channels=3, feature_size=12, spatial_dims=2), normal(1, 1, 64, 64)


@stranger("monai", "medical")
def unetr() -> Any:
    from monai.networks.nets import UNETR

    model = UNETR(1, 3, (32, 32, 32), feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4)
    return model, normal(1, 1, 32, 32, 32)


@stranger("monai", "medical")
def segresnet() -> Any:
    from monai.networks.nets import SegResNet

    return SegResNet(3, 8, 1, 3), normal(1, 1, 16, 16, 16)


@stranger("monai", "medical")
def high_res_net() -> Any:
    from monai.networks.nets import HighResNet

    return HighResNet(3, 1, 3), normal(1, 1, 16, 16, 16)


@stranger("monai", "medical")
def attention_unet() -> Any:
    from monai.networks.nets import AttentionUnet

    return AttentionUnet(3, 1, 3, (8, 16, 32), (2, 2)), normal(1, 1, 16, 16, 16)


@stranger("monai", "medical")
def mednext() -> Any:
    from monai.networks.nets import MedNeXt

    model = MedNeXt(3, 8, 1, 3, blocks_down=(1, 1, 1, 1), blocks_bottleneck=1, blocks_up=(1, 1, 1, 1))
    return model, normal(1, 1, 32, 32, 32)


@stranger("monai", "diffusion")
def monai_diffusion_unet() -> Any:
    from monai.networks.nets import DiffusionModelUNet

    model = DiffusionModelUNet(
        2, 1, 1, num_res_blocks=1, channels=(16, 32), attention_levels=(False, True), norm_num_groups=4,
        num_head_channels=8,
    )  # fmt: skip
    return model, (normal(1, 1, 16, 16), torch.tensor([3]))


@stranger("monai", "diffusion")
def vqvae() -> Any:
    from monai.networks.nets import VQVAE

    model = VQVAE(
        2, 1, 1, channels=(16, 32), num_res_layers=1, num_res_channels=(16, 32), num_embeddings=16, embedding_dim=8,
        downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2,
    )  # fmt: skip
    return model, normal(1, 1, 16, 16)


@stranger("dynamic-network-architectures", "medical")
def nnunet_resenc() -> Any:
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    model = ResidualEncoderUNet(
        1, 3, (8, 16, 32), nn.Conv3d, 3, (1, 2, 2), (1, 2, 2), 3, (1, 1), True, nn.InstanceNorm3d, {"affine": True},
        nonlin=nn.LeakyReLU,
    )  # fmt: skip
    return model, normal(1, 1, 16, 16, 16)


# ---------------------------------------------------------------------------------- diffusion


@stranger("diffusers", "diffusion")
def stable_diffusion_unet() -> Any:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        16, 4, 4, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=24,
        attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    return model, ((normal(1, 4, 16, 16), torch.tensor([3]), normal(1, 7, 24)), {"return_dict": False})


@stranger("diffusers", "diffusion")
def autoencoder_kl() -> Any:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32), norm_num_groups=4,
    )  # fmt: skip
    return model, ((normal(1, 3, 16, 16),), {"return_dict": False})


@stranger("diffusers", "diffusion")
def dit() -> Any:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(4, 12, 4, num_layers=2, norm_num_groups=4, sample_size=8, num_embeds_ada_norm=10)
    inputs = {"timestep": torch.tensor([3]), "class_labels": torch.tensor([2]), "return_dict": False}
    return model, ((normal(1, 4, 8, 8),), inputs)


@stranger("diffusers", "diffusion")
def pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        4, 12, 4, num_layers=2, norm_num_groups=4, cross_attention_dim=48, sample_size=8, caption_channels=20,
        use_additional_conditions=False,
    )  # fmt: skip
    inputs = {
        "encoder_hidden_states": normal(1, 5, 20), "timestep": torch.tensor([3]), "return_dict": False,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip
    return model, ((normal(1, 4, 8, 8),), inputs)


@stranger("diffusers", "diffusion")
def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(1, 8, 8, 1, 1, 12, 4, 20, 16, axes_dims_rope=(4, 4, 4))
    inputs = {
        "hidden_states": normal(1, 16, 8),
        "encoder_hidden_states": normal(1, 5, 20),
        "pooled_projections": normal(1, 16),
        "timestep": torch.tensor([0.3]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }
    return model, ((), inputs)


@stranger("denoising-diffusion-pytorch", "diffusion")
def ddpm_unet() -> Any:
    from denoising_diffusion_pytorch import Unet

    return Unet(16, dim_mults=(1, 2), attn_dim_head=8, flash_attn=False), (normal(1, 3, 16, 16), torch.tensor([3]))


# ---------------------------------------------------------------------------------- point clouds


class PointCloud(nn.Module):
    """Two layers of vector attention between points, and a linear head."""

    def __init__(self, layer: Callable[[], nn.Module], width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, width), nn.Linear(width, 5)
        self.layers = nn.ModuleList([layer(), layer()])

    def forward(self, at: Tensor) -> Tensor:
        """Logits of points `[B, N, 3]`."""
        x = self.embed(at)
        for layer in self.layers:
            x = layer(x, at, mask=torch.ones(at.shape[:2], dtype=torch.bool))
        return self.head(x.amax(1))


@stranger("point-transformer-pytorch", "point clouds")
def point_transformer() -> Any:
    from point_transformer_pytorch import PointTransformerLayer

    layer = lambda: PointTransformerLayer(dim=32, pos_mlp_hidden_dim=24, attn_mlp_hidden_mult=2, num_neighbors=6)  # noqa: E731
    return PointCloud(layer, 32), normal(1, 24, 3)


@stranger("perceiver-pytorch", "point clouds")
def perceiver() -> Any:
    from perceiver_pytorch import Perceiver

    model = Perceiver(
        num_freq_bands=4, depth=2, max_freq=8.0, input_axis=1, num_latents=12, latent_dim=48, latent_heads=4,
        cross_dim_head=16, latent_dim_head=12, num_classes=5,
    )  # fmt: skip
    return model, normal(1, 24, 3)


# ---------------------------------------------------------------------------------- tables


@stranger("rtdl-revisiting-models", "tables")
def rtdl_ft_transformer() -> Any:
    from rtdl_revisiting_models import FTTransformer

    options = FTTransformer.get_default_kwargs(2) | {"d_out": 3}
    model = FTTransformer(n_cont_features=6, cat_cardinalities=[3, 4], **options)
    return model, (normal(4, 6), tokens(3, 4, 2))


@stranger("tabm", "tables")
def tabm() -> Any:
    from tabm import TabM

    model = TabM.make(n_num_features=8, cat_cardinalities=[3, 4], d_out=2, n_blocks=2, d_block=48, k=4)
    return model, (normal(4, 8), tokens(3, 4, 2))


@stranger("pytorch-tabnet", "tables")
def tabnet() -> Any:
    from pytorch_tabnet.tab_network import TabNet

    return TabNet(12, 3, 16, 16, group_attention_matrix=torch.eye(12)), normal(4, 12)


@stranger("tab-transformer-pytorch", "tables")
def tab_transformer() -> Any:
    from tab_transformer_pytorch import TabTransformer

    return TabTransformer(
        categories=(3, 4, 5), num_continuous=6, dim=32, depth=2, heads=4, dim_head=8, dim_out=3, mlp_act=nn.ReLU()
    ), (tokens(3, 2, 3), normal(2, 6))  # fmt: skip


# ---------------------------------------------------------------------------------- images: detection, features, others


@stranger("effdet", "detection")
def efficientdet() -> Any:
    from effdet import EfficientDet, get_efficientdet_config

    config = get_efficientdet_config("tf_efficientdet_lite0")
    config.backbone_args = {"drop_path_rate": 0.0}
    config.image_size = (128, 128)
    return EfficientDet(config, pretrained_backbone=False), normal(1, 3, 128, 128)


@stranger("pytorchcv", "detection")
def centernet() -> Any:
    from pytorchcv.models.centernet import centernet_resnet18_voc

    return centernet_resnet18_voc(pretrained_backbone=False, in_size=(64, 64)), normal(1, 3, 64, 64)


@stranger("pytorchcv", "pose")
def openpose() -> Any:
    from pytorchcv.models.lwopenpose_cmupan import lwopenpose2d_mobilenet_cmupan_coco

    return lwopenpose2d_mobilenet_cmupan_coco(), normal(1, 3, 64, 64)


@stranger("kornia", "matching")
def loftr() -> Any:
    from kornia.feature.loftr.backbone import build_backbone
    from kornia.feature.loftr.loftr import default_cfg

    config = copy.deepcopy(default_cfg)
    config["resnetfpn"] = {"initial_dim": 16, "block_dims": [16, 24, 32]}
    return build_backbone(config), normal(1, 1, 64, 64)


class Matched(nn.Module):
    """Descriptors of two images to one width, changed by each other, and compared."""

    def __init__(self, transformer: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.transformer = nn.Linear(20, width), transformer

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores of descriptors `[B, N, 20]` and `[B, M, 20]`."""
        x, y = self.transformer(self.embed(x), self.embed(y))
        return x @ y.transpose(1, 2)


@stranger("kornia", "matching")
def loftr_transformer() -> Any:
    from kornia.feature.loftr.loftr_module import LocalFeatureTransformer

    config = {"d_model": 48, "nhead": 4, "layer_names": ["self", "cross"], "attention": "linear"}
    transformer = LocalFeatureTransformer(config | {"temp_bug_fix": True, "d_ffn": 48})
    return Matched(transformer, 48), (normal(1, 60, 20), normal(1, 64, 20))


@stranger("segment-anything", "segmentation")
def sam_encoder() -> Any:
    from segment_anything.modeling import ImageEncoderViT

    model = ImageEncoderViT(64, 8, 3, 48, 2, 4, out_chans=24, use_rel_pos=True, window_size=3, global_attn_indexes=(1,))
    return model, normal(1, 3, 64, 64)


@stranger("open-clip-torch", "text")
def clip() -> Any:
    from open_clip import CLIP

    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 12, "vocab_size": 60, "width": 48, "heads": 4, "layers": 2}
    return CLIP(32, vision, text), (normal(1, 3, 32, 32), tokens(60, 1, 12))


@stranger("facenet-pytorch", "faces")
def facenet() -> Any:
    from facenet_pytorch import InceptionResnetV1

    return InceptionResnetV1(classify=False, device="cpu"), normal(1, 3, 96, 96)


@stranger("python-doctr", "characters")
def crnn() -> Any:
    from doctr.models import crnn_mobilenet_v3_small

    model = crnn_mobilenet_v3_small(pretrained=False, pretrained_backbone=False, exportable=True)
    return model, normal(1, 3, 32, 128)


@stranger("python-doctr", "characters")
def db_net() -> Any:
    from doctr.models import db_mobilenet_v3_large

    return db_mobilenet_v3_large(pretrained=False, pretrained_backbone=False, exportable=True), normal(1, 3, 64, 64)


@stranger("python-doctr", "characters")
def vitstr() -> Any:
    from doctr.models import vitstr_small

    return vitstr_small(pretrained=False, pretrained_backbone=False, exportable=True), normal(1, 3, 32, 128)


@stranger("easyocr", "characters")
def craft() -> Any:
    from easyocr.craft import CRAFT

    return CRAFT(pretrained=False), normal(1, 3, 64, 64)


# ---------------------------------------------------------------------------------- super resolution and restoration


@stranger("spandrel", "super resolution")
def swinir() -> Any:
    from spandrel.architectures.SwinIR import SwinIR

    model = SwinIR(
        img_size=16, embed_dim=24, depths=[2, 2], num_heads=[4, 4], window_size=4, upscale=2, upsampler="pixelshuffle"
    )  # fmt: skip
    return model, normal(1, 3, 16, 16)


@stranger("spandrel", "super resolution")
def hat() -> Any:
    from spandrel.architectures.HAT import HAT

    model = HAT(
        img_size=16, embed_dim=24, depths=(2, 2), num_heads=(4, 4), window_size=4, upscale=2, upsampler="pixelshuffle",
        compress_ratio=3, squeeze_factor=6,
    )  # fmt: skip
    return model, normal(1, 3, 16, 16)


@stranger("spandrel", "super resolution")
def nafnet() -> Any:
    from spandrel.architectures.NAFNet import NAFNet

    return NAFNet(width=16, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]), normal(1, 3, 16, 16)


@stranger("spandrel", "super resolution")
def omnisr() -> Any:
    from spandrel.architectures.OmniSR import OmniSR

    return OmniSR(num_feat=32, res_num=1, window_size=4), normal(1, 3, 16, 16)


@stranger("spandrel", "super resolution")
def lama() -> Any:
    from spandrel.architectures.LaMa import LaMa

    return LaMa(in_nc=4), (normal(1, 3, 32, 32), torch.ones(1, 1, 32, 32))


@stranger("torchsr", "super resolution")
def rcan() -> Any:
    from torchsr.models import ninasr_b0

    return ninasr_b0(scale=2, pretrained=False), normal(1, 3, 16, 16)


@stranger("uformer-pytorch", "super resolution")
def uformer() -> Any:
    from uformer_pytorch import Uformer

    return Uformer(dim=16, stages=2, num_blocks=1, dim_head=8, window_size=4, heads=2), normal(1, 3, 32, 32)


# ---------------------------------------------------------------------------------- video


@stranger("pytorchvideo", "video")
def x3d() -> Any:
    from pytorchvideo.models.x3d import create_x3d

    return create_x3d(input_clip_length=4, input_crop_size=64, model_num_class=5), normal(1, 3, 4, 64, 64)


@stranger("pytorchvideo", "video")
def slowfast() -> Any:
    from pytorchvideo.models.slowfast import create_slowfast

    model = create_slowfast(model_depth=50, model_num_class=5, head_pool_kernel_sizes=((2, 2, 2), (8, 2, 2)))
    return model, ([normal(1, 3, 2, 64, 64), normal(1, 3, 8, 64, 64)],)


@stranger("pytorchvideo", "video")
def mvit() -> Any:
    from pytorchvideo.models.vision_transformers import create_multiscale_vision_transformers

    model = create_multiscale_vision_transformers(
        spatial_size=32, temporal_size=4, depth=3, patch_embed_dim=32, num_heads=2, head_num_classes=5,
        embed_dim_mul=[[1, 2.0]], atten_head_mul=[[1, 2.0]], pool_q_stride_size=[[1, 1, 2, 2]],
        pool_kv_stride_adaptive=[1, 2, 2], pool_kvq_kernel=[3, 3, 3],
    )  # fmt: skip
    return model, normal(1, 3, 4, 32, 32)


@stranger("timesformer-pytorch", "video")
def timesformer() -> Any:
    from timesformer_pytorch import TimeSformer

    model = TimeSformer(dim=48, num_frames=4, num_classes=5, image_size=32, depth=2, heads=4, dim_head=12, patch_size=8)
    return model, normal(1, 4, 3, 32, 32)


@stranger("vit-pytorch", "video")
def vivit() -> Any:
    from vit_pytorch.vivit import ViViT

    model = ViViT(
        image_size=32, image_patch_size=8, frames=4, frame_patch_size=2, num_classes=5, dim=48, spatial_depth=2,
        temporal_depth=2, heads=4, mlp_dim=64, dim_head=12,
    )  # fmt: skip
    return model, normal(1, 3, 4, 32, 32)


# ---------------------------------------------------------------------------------- images, by einops


@stranger("vit-pytorch", "images")
def simple_vit_registers() -> Any:
    from vit_pytorch.simple_vit_with_register_tokens import SimpleViT

    model = SimpleViT(image_size=32, patch_size=8, num_classes=5, dim=48, depth=2, heads=4, mlp_dim=64, dim_head=12)
    return model, normal(1, 3, 32, 32)


@stranger("vit-pytorch", "images")
def cross_vit() -> Any:
    from vit_pytorch.cross_vit import CrossViT

    small = {"sm_dim": 32, "sm_patch_size": 8, "sm_enc_depth": 1, "sm_enc_heads": 4, "sm_enc_dim_head": 8}
    large = {"lg_dim": 48, "lg_patch_size": 16, "lg_enc_depth": 1, "lg_enc_heads": 4, "lg_enc_dim_head": 8}
    cross = {"cross_attn_depth": 1, "cross_attn_heads": 4, "cross_attn_dim_head": 8, "depth": 2}
    model = CrossViT(image_size=48, num_classes=5, sm_enc_mlp_dim=64, lg_enc_mlp_dim=64, **small, **large, **cross)
    return model, normal(1, 3, 48, 48)


@stranger("vit-pytorch", "images")
def max_vit() -> Any:
    from vit_pytorch.max_vit import MaxViT

    model = MaxViT(num_classes=5, dim_conv_stem=16, dim=32, dim_head=16, depth=(1, 1), window_size=4)
    return model, normal(1, 3, 64, 64)


@stranger("g-mlp-pytorch", "images")
def g_mlp() -> Any:
    from g_mlp_pytorch import gMLPVision

    return gMLPVision(image_size=32, patch_size=8, num_classes=5, dim=48, depth=2, ff_mult=2), normal(1, 3, 32, 32)


@stranger("neuraloperator", "operators")
def fno() -> Any:
    from neuralop.models import FNO

    return FNO((6, 6), 1, 1, 16, n_layers=2), normal(1, 1, 16, 16)


# ---------------------------------------------------------------------------------- text


@stranger("x-transformers", "text")
def x_decoder() -> Any:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=48, depth=2, heads=4, attn_dim_head=12, rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True)
    return TransformerWrapper(num_tokens=60, max_seq_len=16, attn_layers=layers), tokens(60, 1, 12)


@stranger("x-transformers", "text")
def x_encoder_alibi() -> Any:
    from x_transformers import Encoder, TransformerWrapper

    layers = Encoder(dim=48, depth=2, heads=4, attn_dim_head=12, alibi_pos_bias=True, attn_kv_heads=2)
    return TransformerWrapper(num_tokens=60, max_seq_len=16, attn_layers=layers), tokens(60, 1, 12)


@stranger("conformer", "text")
def lucid_conformer() -> Any:
    from conformer import ConformerBlock

    blocks = [ConformerBlock(dim=48, dim_head=12, heads=4, conv_kernel_size=7) for _ in range(2)]
    return nn.Sequential(nn.Linear(20, 48), *blocks, nn.Linear(48, 5)), normal(1, 16, 20)


@stranger("mambapy", "text")
def mamba() -> Any:
    from mambapy.mamba import Mamba, MambaConfig

    return nn.Sequential(nn.Embedding(60, 32), Mamba(MambaConfig(32, 2, pscan=False)), nn.Linear(32, 60)), tokens(
        60, 1, 8
    )


# ---------------------------------------------------------------------------------- time series and EEG


@stranger("iTransformer", "time series")
def itransformer() -> Any:
    from iTransformer import iTransformer

    model = iTransformer(
        num_variates=6, lookback_len=16, dim=48, depth=2, heads=4, dim_head=12, pred_length=4, flash_attn=False,
        num_residual_streams=1,
    )  # fmt: skip
    return model, normal(1, 16, 6)


@stranger("pytorch-tcn", "time series")
def tcn() -> Any:
    from pytorch_tcn import TCN

    return TCN(6, [32, 32, 32], output_projection=4), normal(1, 6, 24)


@stranger("braindecode", "EEG")
def eegnet() -> Any:
    from braindecode.models import EEGNet

    return EEGNet(n_chans=8, n_outputs=3, n_times=128), normal(1, 8, 128)


@stranger("braindecode", "EEG")
def eeg_conformer() -> Any:
    from braindecode.models import EEGConformer

    return EEGConformer(n_chans=8, n_outputs=3, n_times=256, num_layers=2), normal(1, 8, 256)


@stranger("braindecode", "EEG")
def atcnet() -> Any:
    from braindecode.models import ATCNet

    return ATCNet(n_chans=8, n_outputs=3, n_times=500, sfreq=125, input_window_seconds=4), normal(1, 8, 500)


@stranger("braindecode", "EEG")
def deep4net() -> Any:
    from braindecode.models import Deep4Net

    return Deep4Net(n_chans=8, n_outputs=3, n_times=600), normal(1, 8, 600)


# ---------------------------------------------------------------------------------- one model


def in_double(model: nn.Module) -> nn.Module:
    """The model with its numbers, complex ones too, in double precision."""
    return model._apply(lambda t: t.to(torch.cdouble) if t.is_complex() else t.double() if t.is_floating_point() else t)


def built(name: str) -> tuple[nn.Module, Call]:
    """The model with random weights, and its inputs: in float64, unless its forward makes tensors of float32."""
    torch.set_default_dtype(torch.double)  # for what a forward makes anew
    for convert in (in_double, nn.Module.float):
        torch.manual_seed(0)
        model, inputs = STRANGERS[name].make()
        model, call = convert(randomize(model.eval())), as_call(inputs)
        try:
            outputs_of(model, call)
            break
        except RuntimeError:
            torch.set_default_dtype(torch.float)
    torch.manual_seed(0)
    model, inputs = STRANGERS[name].make()  # a model that has never run, inputs that no forward has changed
    return convert(randomize(model.eval())), as_call(inputs)


def examine(name: str, share: float) -> dict[str, Any]:
    """Comb one model, shrink a copy, and compare it with the unpruned model with the same slices at zero."""
    dense, call = built(name)
    cpd.comb(nn.Linear(2, 2), torch.zeros(1, 2))  # the first export of a process imports torch's compiler
    start = time.perf_counter()
    comb = cpd.comb(dense, call)
    row = {
        "parameters": sum(p.numel() for p in dense.parameters()),
        "seconds": time.perf_counter() - start,
        "open": comb.open_share["parameters"],
        "groups": len(comb.groups),
        "parts": list(comb.operations.parts),
        "unknown": list(comb.unknown),
        "reasons": frozen_reasons(comb),
    }
    plan = random_plan(comb, share, at_least=1)
    try:
        row["error"] = check_masked(dense, comb, plan)
    except Exception as failure:
        row["failed"] = f"{type(failure).__name__}: {failure}".splitlines()[0][:300]
    return row


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model in a process of its own; its package's version, or that it is not installed."""
    item = STRANGERS[name]
    row = {"model": name, "package": item.package, "field": item.field}
    try:
        row["version"] = version(item.package)
    except PackageNotFoundError:
        return {**row, "failed": "not installed"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, __file__, name, "--alone", "--json", str(file), "--share", str(options.share)]
        end = limited(command, options.limit)
        found = json.loads(file.read_text()) if file.exists() else {"failed": end or "it wrote no row"}
    return {**row, **found}


def table_of(rows: list[dict[str, Any]]) -> Table:
    """A row a model, and why it is below 90 % where it is."""
    table = Table(
        "field", "package", "model", "params", "open", "error", "comb s", "parts", "why not", title="strangers"
    )
    for row in rows:
        package = " ".join(filter(None, [row["package"], row.get("version")]))
        if "open" not in row:
            table.add_row(row["field"], package, row["model"], "", "", "", "", "", row["failed"])
            continue
        why = row.get("failed") or (row["reasons"][0] if row["open"] < ENOUGH and row["reasons"] else "")
        table.add_row(
            row["field"], package, row["model"], f"{row['parameters'] / 1e3:.0f} k", f"{row['open']:.1%}",
            row.get("error", "-"), f"{row['seconds']:.1f}", ", ".join(row["parts"]) or "whole", why,
        )  # fmt: skip
    return table


def summary(rows: list[dict[str, Any]]) -> str:
    """How many models are open, and whether any is wrong."""
    done = [row for row in rows if "open" in row]
    enough = sum(row["open"] >= ENOUGH for row in done)
    absent = sum(row.get("failed") == "not installed" for row in rows)
    wrong = [row["model"] for row in done if "failed" in row]
    return (
        f"{enough} of {len(rows) - absent} have at least {ENOUGH:.0%} of the parameters open; {absent} not installed; "
        f"wrong: {', '.join(wrong) or 'none'}."
    )


def main() -> int:
    """Run the models asked for and print the table; exit code 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--share", type=float, default=0.3, help="of every open group that goes")
    parser.add_argument("--limit", type=float, default=300, help="seconds a model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--packages", action="store_true", help="print what to install, and end")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.packages:
        print(*PACKAGES.split(), *ALSO.split())
        return 0
    if options.alone:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        row = results.attempted({}, partial(examine, options.models[0], options.share))
        options.json.write_text(json.dumps(row))
        return 0
    rows = []
    for name in options.models or STRANGERS:
        rows.append(run(name, options))
        if options.json:
            results.write(options.json, rows)
    console = Console(width=230)
    console.print(table_of(rows))
    console.print(summary(rows), highlight=False)
    return int(any("open" in row and "failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
