"""Families of Hugging Face transformers through the whole path: `python benchmarks/families.py [--json F] [NAME …]`.

Small models with random weights, each built from its name alone (`hf:CLASS,argument=…`); no network.

| column | what it is |
|---|---|
| open | the share of parameters in open groups, the outputs chosen by the task |
| error | masked = shrunk, 30 % of every open group removed at random, relative to the largest output; in float64 where the forward runs in it |
| own loss | the loss of the compressed model after an epoch, as its own forward gives it |
| MACs | left, of 0.7 asked for |
| load | `cpd.load` and `cpd.from_pretrained` of the folders, without a model: the same outputs to the bit |
| Trainer | one step of `transformers.Trainer` on the result |
| generate | of a language model: four more tokens |
"""  # noqa: E501

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import results
import torch
from models import random_plan, randomize
from oracles import check_masked, double, outputs_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cpd
from cpd.model import sources
from cpd.model.inputs import as_call
from cpd.model.outputs import reader
from cpd.tasks.task import task_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")
IMAGES, CLASSES, SIDE, TOKENS, WORDS = 4, 3, 64, 12, 99


def _pixels(side: int = SIDE) -> Tensor:
    return torch.randn(IMAGES, 3, side, side)


def classes() -> dict[str, Any]:
    return {"pixel_values": _pixels(), "labels": torch.randint(0, CLASSES, (IMAGES,))}


def maps() -> dict[str, Any]:
    return {"pixel_values": _pixels(), "labels": torch.randint(0, CLASSES, (IMAGES, SIDE, SIDE))}


def boxes() -> dict[str, Any]:
    one = {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.5, 0.3, 0.4]])}
    return {"pixel_values": _pixels(), "labels": [dict(one) for _ in range(IMAGES)]}


def depths() -> dict[str, Any]:
    return {"pixel_values": _pixels(), "labels": torch.rand(IMAGES, SIDE, SIDE) + 0.1}


def texts() -> dict[str, Any]:
    ids = torch.randint(5, WORDS, (IMAGES, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, CLASSES, (IMAGES,))}


def language() -> dict[str, Any]:
    ids = torch.randint(5, WORDS, (IMAGES, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Family(NamedTuple):
    """One architecture: its task, its class and what its configuration is given, and what makes a batch."""

    task: str
    source: str
    batch: Callable[[], dict[str, Any]]


_VIT = "hidden_size=64,num_hidden_layers=2,num_attention_heads=4,intermediate_size=128"
_IMAGE = f"{_VIT},image_size={SIDE},patch_size=16,num_labels={CLASSES}"
_TEXT = f"vocab_size={WORDS},{_VIT}"
_LM = f"{_TEXT},num_key_value_heads=2,max_position_embeddings=64"
_RESNET = (
    '{"model_type":"resnet","embedding_size":16,"hidden_sizes":[16,32,48,64],"depths":[1,1,1,1],"layer_type":"basic",'
    '"out_features":["stage1","stage2","stage3","stage4"]}'
)
_DETR = "encoder_layers=1,decoder_layers=1,encoder_ffn_dim=64,decoder_ffn_dim=64,encoder_attention_heads=4"
_DETR = f"{_DETR},decoder_attention_heads=4,d_model=64,num_queries=8,num_labels={CLASSES}"
_SWIN = f"image_size={SIDE},patch_size=4,window_size=4,embed_dim=32,depths=[1,2],num_heads=[2,4],num_labels={CLASSES}"
_SEGFORMER = (
    f"num_encoder_blocks=2,depths=[1,1],sr_ratios=[4,2],hidden_sizes=[32,64],patch_sizes=[7,3],strides=[4,2],"
    f"num_attention_heads=[2,4],mlp_ratios=[2,2],decoder_hidden_size=64,num_labels={CLASSES}"
)
_DINOV2 = (
    f'{{"model_type":"dinov2","hidden_size":64,"num_hidden_layers":2,"num_attention_heads":4,"image_size":{SIDE},'
    '"patch_size":16,"out_features":["stage1","stage2"],"reshape_hidden_states":false,"apply_layernorm":true}'
)
_FPN = "reassemble_factors=[2,1],neck_hidden_sizes=[32,48],fusion_hidden_size=32,head_in_index=-1,head_hidden_size=16"

FAMILIES: dict[str, Family] = {
    "vit": Family("image classification", f"ViTForImageClassification,{_IMAGE}", classes),
    "deit": Family("image classification", f"DeiTForImageClassification,{_IMAGE}", classes),
    "beit": Family("image classification", f"BeitForImageClassification,{_IMAGE}", classes),
    "dinov2": Family(
        "image classification",
        f"Dinov2ForImageClassification,hidden_size=64,num_hidden_layers=2,num_attention_heads=4,image_size={SIDE},"
        f"patch_size=16,num_labels={CLASSES}",
        classes,
    ),
    "swin": Family("image classification", f"SwinForImageClassification,{_SWIN}", classes),
    "convnext": Family(
        "image classification",
        f"ConvNextForImageClassification,hidden_sizes=[16,32,48,64],depths=[1,1,2,1],num_labels={CLASSES}",
        classes,
    ),
    "resnet": Family(
        "image classification",
        'ResNetForImageClassification,embedding_size=16,hidden_sizes=[32,64],depths=[2,2],layer_type="basic",'
        f"num_labels={CLASSES}",
        classes,
    ),
    "mobilenet_v2": Family("image classification", f"MobileNetV2ForImageClassification,num_labels={CLASSES}", classes),
    "segformer": Family("semantic segmentation", f"SegformerForSemanticSegmentation,{_SEGFORMER}", maps),
    "upernet": Family(
        "semantic segmentation",
        "UperNetForSemanticSegmentation,backbone_config="
        '{"model_type":"convnext","hidden_sizes":[16,32,48,64],"depths":[1,1,1,1],'
        '"out_features":["stage1","stage2","stage3","stage4"]},'
        f"hidden_size=32,auxiliary_in_channels=48,auxiliary_channels=16,num_labels={CLASSES}",
        maps,
    ),
    "mobilevit": Family(
        "semantic segmentation",
        f"MobileViTForSemanticSegmentation,image_size={SIDE},hidden_sizes=[32,48,64],neck_hidden_sizes="
        f"[8,16,24,32,48,64,96],num_attention_heads=4,aspp_out_channels=32,num_labels={CLASSES}",
        maps,
    ),
    "data2vec_vision": Family(
        "semantic segmentation",
        f"Data2VecVisionForSemanticSegmentation,{_VIT},image_size={SIDE},patch_size=16,out_indices=[0,1,0,1],"
        f"use_auxiliary_head=false,num_labels={CLASSES}".replace("num_hidden_layers=2", "num_hidden_layers=4").replace(
            "[0,1,0,1]", "[1,2,3,4]"
        ),
        maps,
    ),
    "detr": Family("object detection", f"DetrForObjectDetection,{_DETR},backbone_config={_RESNET}", boxes),
    "conditional_detr": Family(
        "object detection", f"ConditionalDetrForObjectDetection,{_DETR},backbone_config={_RESNET}", boxes
    ),
    "yolos": Family(
        "object detection",
        f"YolosForObjectDetection,{_VIT},image_size=[{SIDE},{SIDE}],patch_size=16,num_detection_tokens=8,"
        f"num_labels={CLASSES}",
        boxes,
    ),
    "rt_detr": Family(
        "object detection",
        'RTDetrForObjectDetection,backbone_config={"model_type":"rt_detr_resnet","embedding_size":16,"hidden_sizes":'
        '[16,32,48,64],"depths":[1,1,1,1],"layer_type":"basic","out_features":["stage2","stage3","stage4"]},'
        "encoder_in_channels=[32,48,64],encoder_hidden_dim=32,encoder_ffn_dim=64,encoder_attention_heads=4,d_model=32,"
        "decoder_in_channels=[32,32,32],decoder_ffn_dim=64,decoder_layers=2,decoder_attention_heads=4,num_queries=8,"
        f"num_denoising=0,num_labels={CLASSES}",
        boxes,
    ),
    "depth_anything": Family(
        "depth", f"DepthAnythingForDepthEstimation,backbone_config={_DINOV2},{_FPN},patch_size=16,"
        "reassemble_hidden_size=64", depths,
    ),
    "glpn": Family(
        "depth",
        "GLPNForDepthEstimation,num_encoder_blocks=4,depths=[1,1,1,1],sr_ratios=[8,4,2,1],hidden_sizes=[16,32,48,64],"
        "num_attention_heads=[1,2,4,4],mlp_ratios=[2,2,2,2],decoder_hidden_size=32",
        depths,
    ),
    "bert": Family("text classification", f"BertForSequenceClassification,{_TEXT},num_labels={CLASSES}", texts),
    "distilbert": Family(
        "text classification",
        f"DistilBertForSequenceClassification,vocab_size={WORDS},dim=64,n_layers=2,n_heads=4,hidden_dim=128,"
        f"num_labels={CLASSES}",
        texts,
    ),
    "modernbert": Family(
        "text classification",
        f"ModernBertForSequenceClassification,{_TEXT},num_labels={CLASSES},pad_token_id=0,bos_token_id=1,"
        "eos_token_id=2,cls_token_id=1,sep_token_id=2",
        texts,
    ),
    "albert": Family(
        "text classification", f"AlbertForSequenceClassification,{_TEXT},embedding_size=32,num_labels={CLASSES}", texts
    ),
    "llama": Family("causal language model", f"LlamaForCausalLM,{_LM}", language),
    "qwen2": Family("causal language model", f"Qwen2ForCausalLM,{_LM}", language),
    "mistral": Family("causal language model", f"MistralForCausalLM,{_LM}", language),
    "gpt2": Family(
        "causal language model", f"GPT2LMHeadModel,vocab_size={WORDS},n_embd=64,n_layer=2,n_head=4,n_positions=64,"
        "bos_token_id=1,eos_token_id=2", language,
    ),
}  # fmt: skip


def built(name: str) -> nn.Module:
    """The model, with random weights."""
    torch.manual_seed(0)
    return randomize(sources.resolve(f"hf:{FAMILIES[name].source}").build())


def oracle(name: str, share: float) -> dict[str, Any]:
    """The share that is open, and the error of a random plan."""
    for convert in (double, lambda value: value):
        model = convert(built(name))
        task = task_of(model)
        call = as_call(convert(task.example_inputs(model)))
        try:
            outputs_of(model, call)
            comb = cpd.comb(model, call, outputs=task.outputs(model))
            break
        except Exception:
            if convert is not double:
                raise
    row = {"open": comb.open_share["parameters"], "parts": list(comb.operations.parts), "unknown": list(comb.unknown)}
    return {**row, "error": check_masked(model, comb, random_plan(comb, share, at_least=1))}


def examine(name: str, share: float) -> dict[str, Any]:
    """One family through everything."""
    start, family = time.perf_counter(), FAMILIES[name]
    model = built(name)
    size = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {"task": family.task, "parameters": size, **oracle(name, share)}
    torch.manual_seed(0)
    data = [family.batch() for _ in range(2)]
    result = cpd.compress(model, target_macs=0.7, data=data, epochs=1, progress=False)
    small, before, after = result.model, result.report.original, result.report.result
    row |= {"MACs": after.macs / before.macs, "onnx": bool(result.speedup)}
    task = task_of(small)
    batch = task.batch(small, data[0])
    read = reader(task.outputs(small))
    with torch.no_grad():
        row["own loss"] = (
            float(small(**{**batch.call.kwargs, **_labels(batch.target)}).loss) if _has_loss(small) else None
        )
        expected = outputs_of(small, batch.call)
    with tempfile.TemporaryDirectory() as folder:
        for place, save, load in (
            ("a", result.save, cpd.load), ("b", result.save_pretrained, cpd.from_pretrained),
        ):  # fmt: skip
            loaded = load(save(Path(folder) / place))
            assert all(map(torch.equal, outputs_of(loaded, batch.call), expected)), f"{load.__name__}: other outputs"
        row["load"] = "ok"
        try:
            row["Trainer"] = trainer_step(small, family.batch, Path(folder))
        except RuntimeError:  # a loss of transformers that its Trainer cannot take, narrower or not
            try:
                trainer_step(model, family.batch, Path(folder))
            except RuntimeError:
                row["Trainer"] = "fails unpruned too"
            else:
                raise
    if family.task == "causal language model":
        tokens = small.generate(data[0]["input_ids"][:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert tokens.shape[1] > TOKENS
        row["generate"] = "ok"
    del read
    return {**row, "seconds": time.perf_counter() - start}


def _has_loss(model: nn.Module) -> bool:
    return "DepthAnything" not in type(model).__name__


def _labels(target: Any) -> dict[str, Any]:
    return target if isinstance(target, dict) else {"labels": target}


def trainer_step(model: nn.Module, batch: Callable[[], dict[str, Any]], folder: Path) -> str:
    """One step of the Trainer of transformers, on the model as it is."""
    if not _has_loss(model):
        return "n/a"
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        str(folder / "runs"), max_steps=1, per_device_train_batch_size=1, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    whole = batch()
    trainer = Trainer(model, settings, train_dataset=[whole], data_collator=lambda rows: rows[0])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(model.named_parameters())
    assert any(not torch.equal(after[name], weight) for name, weight in before.items()), "nothing was learned"
    return "ok"


def table_of(rows: list[dict[str, Any]]) -> Table:
    """A row a family."""
    names = ("open", "error", "own loss", "MACs", "load", "Trainer", "generate")
    table = Table("task", "family", "params", *names, "s", title="families of transformers")
    for row in rows:
        if "failed" in row:
            table.add_row(FAMILIES[row["family"]].task, row["family"], *[""] * (len(names) + 1), row["failed"])
            continue
        figures = (
            f"{row['open']:.1%}", row["error"], f"{row['own loss']:.3g}" if row["own loss"] is not None else "none",
            f"{row['MACs']:.2f}", row["load"], row["Trainer"], row.get("generate", ""),
        )  # fmt: skip
        table.add_row(row["task"], row["family"], f"{row['parameters'] / 1e3:.0f} k", *figures, f"{row['seconds']:.0f}")
    return table


def main() -> int:
    """Run the families asked for and print the table; exit code 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--share", type=float, default=0.3, help="of every open group that goes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", action="store_true", help="let an error end the run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    one = partial(examine, share=options.share)
    rows = results.examined(options.families or FAMILIES, one, options.json, key="family", trace=options.trace)
    console = Console(width=200)
    console.print(table_of(rows))
    good = [row for row in rows if "failed" not in row]
    console.print(
        f"{len(good)} of {len(rows)} pass; {sum(row['open'] >= 0.9 for row in good)} have at least 90 % open.",
        highlight=False,
    )
    return int(len(good) < len(rows))


if __name__ == "__main__":
    sys.exit(main())
