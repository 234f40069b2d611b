"""Models of Hugging Face transformers, from small configurations with random weights: no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cpd
from cpd.model import hf_models, sources
from cpd.model.inputs import as_call
from cpd.model.recorded import unsafe, why_not_by_name
from cpd.options import plain
from cpd.tasks.hugging_face import HuggingFace, stacked, what_matters
from cpd.tasks.task import TaskBatches, task_of

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
IDS = torch.arange(24).reshape(4, 6)

SMALL = "hidden_size=32,num_hidden_layers=1,num_attention_heads=4,intermediate_size=48"
VIT = f"hf:ViTForImageClassification,{SMALL},image_size=16,patch_size=8,num_labels=3"
BERT = f"hf:BertForSequenceClassification,{SMALL},vocab_size=40,num_labels=3"
LLAMA = f"hf:LlamaForCausalLM,{SMALL},vocab_size=40,num_key_value_heads=2,max_position_embeddings=32"
YOLOS = f"hf:YolosForObjectDetection,{SMALL},image_size=[16,16],patch_size=8,num_detection_tokens=4,num_labels=3"


def built(name: str) -> Any:
    torch.manual_seed(0)
    return sources.resolve(name).build()


def rows(count: int = 12) -> list[dict[str, Any]]:
    return [{"pixel_values": torch.randn(3, 16, 16), "label": index % 3, "file": "x.png"} for index in range(count)]


def test_a_model_by_its_name_is_compressed_on_rows_saved_and_loaded_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = cpd.compress(VIT, target_macs=0.7, data=rows(), epochs=1, progress=False, output_dir=tmp_path / "out")
    assert type(result.model).__name__ == "ViTForImageClassification"
    assert result.report.history[-1]["task_loss"] > 0
    assert result.report.source == VIT
    images = torch.randn(2, 3, 16, 16)
    loaded = cpd.load(tmp_path / "out")
    assert torch.equal(loaded(images).logits, result.model(images).logits)
    again = cpd.from_pretrained(result.save_pretrained(tmp_path / "hub"))
    assert torch.equal(again(images).logits, result.model(images).logits)
    found = transformers.pipeline(
        "image-classification", model=loaded,
        image_processor=transformers.ViTImageProcessor(size={"height": 16, "width": 16}),
    )(transformers.image_utils.PIL.Image.new("RGB", (20, 20)))  # fmt: skip
    assert len(found) == 3


def test_trainer_trains_the_result(tmp_path: Path) -> None:
    model = built(VIT)
    comb = cpd.comb(model, torch.randn(1, 3, 16, 16), outputs=HuggingFace().outputs(model))
    small = cpd.shrink(model, comb.plan({comb.open[0].name: range(comb.open[0].size - 4)}))
    before = small.classifier.weight.detach().clone()
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"pixel_values": row["pixel_values"], "labels": row["label"]} for row in rows(4)]
    transformers.Trainer(small, settings, train_dataset=data).train()
    assert not torch.equal(before, small.classifier.weight)


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        (VIT, {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}),
        (BERT, {"input_ids": IDS, "labels": torch.tensor([0, 1, 2, 0]), "idx": torch.zeros(4)}),
        (LLAMA, {"input_ids": IDS, "labels": IDS}),
        (YOLOS, {"pixel_values": torch.randn(4, 3, 16, 16), "labels": [
            {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])} for _ in range(4)
        ]}),
    ],
    ids=["vit", "bert", "llama", "yolos"],
)  # fmt: skip
def test_the_loss_is_the_models_own_and_almost_all_is_open(name: str, batch: dict[str, Any]) -> None:
    model = built(name).eval()
    task = task_of(model)
    assert isinstance(task, HuggingFace)
    read = task.batch(model, batch)
    assert "idx" not in read.call.kwargs
    output, loss = task.learn(model, read.call, read.target)
    known = {key: value for key, value in batch.items() if key != "idx"}
    assert torch.equal(loss, model(**known).loss)  # type: ignore[arg-type]
    mimicked = what_matters(output)
    first = mimicked[0] if isinstance(mimicked, tuple) else mimicked
    assert first.shape[1] == output.logits.shape[-1]  # classes in dimension 1
    comb = cpd.comb(model, as_call(task.example_inputs(model)), outputs=task.outputs(model))
    assert comb.open_share["parameters"] > 0.9
    assert comb.unknown == ()


@pytest.mark.parametrize("outputs", ["logits", ("logits", "hidden_states.-1")])
def test_classes_that_are_named_lie_in_dimension_1(outputs: Any) -> None:
    model = built(LLAMA).eval()
    pick = HuggingFace().chosen(model, outputs)
    output = model(IDS, output_hidden_states=True)
    found = pick(output)  # type: ignore[operator]
    first = found[0] if isinstance(found, tuple) else found
    assert torch.equal(first, output.logits.movedim(-1, 1))
    assert not isinstance(found, tuple) or found[1] is output.hidden_states[-1]
    assert plain(pick) == str(outputs)  # as a report tells it
    assert HuggingFace().chosen(model, what_matters) is what_matters


_TOWER = f"{SMALL},image_size=16,patch_size=8"


@pytest.mark.parametrize(
    ("name", "features", "matter"),
    [
        (f"hf:CLIPVisionModelWithProjection,{_TOWER},projection_dim=8", ("visual_projection",), ("image_embeds",)),
        (f"hf:ViTModel,{_TOWER}", ("layernorm", "pooler.activation"), ("last_hidden_state", "pooler_output")),
    ],
    ids=["tower", "headless"],
)
def test_embeddings_are_mimicked_as_features(name: str, features: Any, matter: tuple[str, ...]) -> None:
    model, task = built(name).eval(), HuggingFace(batch_size=4)
    assert task.training(model)["features"] == features
    assert "features" not in task.training(built(VIT))
    data = [{"pixel_values": row["pixel_values"]} for row in rows(4)]
    result = cpd.compress(model, target_macs=0.8, data=data, task=task, epochs=1, branches=False, progress=False)
    output, wide = (one(torch.randn(1, 3, 16, 16)) for one in (result.model, model))
    assert [output[part].shape for part in matter] == [wide[part].shape for part in matter]
    assert all(part in result.report.notes[0] for part in matter if len(wide) > len(matter))


def test_a_language_model_goes_on_generating() -> None:
    model = built(LLAMA)
    ids = torch.arange(12).reshape(2, 6)
    result = cpd.compress(
        model, target_params=0.7, data=[{"input_ids": ids, "labels": ids}], epochs=0, branches=False, progress=False,
    )  # fmt: skip
    small: Any = result.model
    assert model.config.use_cache
    assert small.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > 6
    with torch.no_grad():
        whole = small(ids).logits
        first = small(ids[:, :4], use_cache=True)
        second = small(ids[:, 4:], past_key_values=first.past_key_values)
    assert torch.allclose(whole[:, 4:], second.logits, atol=1e-4)


def test_depth_without_a_loss_of_its_own_is_learned_by_its_error() -> None:
    class Depth(torch.nn.Module):
        config: Any = None

        def forward(self, pixel_values: Tensor, labels: Any = None) -> dict[str, Tensor]:
            if labels is not None:
                raise NotImplementedError("Training is not implemented yet")
            return {"predicted_depth": pixel_values[:, 0]}

    task, images = HuggingFace(), torch.rand(2, 3, 4, 4)
    target = images[:, 0] + 0.5
    target[0, 0, 0] = 0  # not known
    batch = task.batch(Depth(), {"pixel_values": images, "labels": target})
    output, loss = task.learn(Depth(), batch.call, batch.target)
    assert float(loss) == pytest.approx(0.5)  # type: ignore[arg-type]
    assert torch.equal(what_matters(output), images[:, 0])
    with pytest.raises(cpd.InputError, match=r"^The depths of a batch are \[2, 2, 2\]; the model predicts \[2, 4, 4\]"):
        task.learn(Depth(), batch.call, target[:, :2, :2])


def test_rows_are_told_from_batches() -> None:
    model, task = built(VIT), HuggingFace(batch_size=5)
    read = task.batches(model, rows())
    assert isinstance(read, TaskBatches)
    assert [batch.call.kwargs["pixel_values"].shape[0] for batch in read] == [5, 5, 2]
    assert all(isinstance(batch.target, Tensor) for batch in read)
    whole = [{"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.zeros(4).long()}]
    assert next(iter(task.batches(model, whole))).call.kwargs["pixel_values"].shape[0] == 4
    boxes = [{"pixel_values": torch.zeros(3, 8, 8), "labels": {"boxes": torch.zeros(n, 4)}} for n in (1, 2)]
    assert isinstance(stacked(boxes)["labels"], list)
    with pytest.raises(cpd.InputError, match="batch_size must be"):
        HuggingFace(batch_size=0)


def test_what_a_file_records_is_a_class_and_plain_values() -> None:
    source = sources.identify(built(VIT))
    assert source is not None
    assert why_not_by_name(str(source)) is None
    assert sources.identify(sources.resolve(str(source)).build()) == source
    labelled = built(VIT + ',id2label={"0":"a","1":"b=c, d","2":"e"},label2id={"a":0,"b=c, d":1,"e":2}')
    again = sources.resolve(str(sources.identify(labelled)))
    assert again.build().config.id2label == {0: "a", 1: "b=c, d", 2: "e"}
    for kwargs, fault in (
        ({"auto_map": {"AutoModel": "x--y.Z"}}, "auto_map in its configuration says what is loaded"),
        ({"backbone_config": {"use_pretrained_backbone": True}}, "use_pretrained_backbone in its configuration"),
        ({"backbone": "user/repository"}, "names a backbone that is looked up elsewhere"),
        ({"hidden_act": "https://x.y/z"}, "hidden_act in its configuration is no plain number"),
    ):
        found = unsafe(sources.ModelSource("hf", "ViTForImageClassification", kwargs))
        assert found is not None
        assert fault in found
    assert unsafe(sources.ModelSource("hf", "some/folder")) == "some/folder is no class of transformers"
    assert not hf_models.is_class("PreTrainedModelX")


def test_a_folder_is_opened_by_its_path(tmp_path: Path) -> None:
    model = built(VIT)
    model.save_pretrained(tmp_path / "vit")
    source = sources.resolve(f"hf:{tmp_path / 'vit'}")
    assert source.recorded is None
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(source.build(pretrained=True)(images).logits, model.eval()(images).logits)
    with pytest.raises(cpd.InputError, match="transformers cannot build"):
        sources.resolve(f"hf:{tmp_path / 'none'}").build()
