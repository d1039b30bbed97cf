"""Made what lies beside this file, with hf_efficient 0.1.0.dev0 (transformers 5.23.0, torch 2.13.0, datasets 5.2.0).

    python -m tests.data.make NEW_FOLDER

The files are a promise: what users have on their disks from that version must be read for good, and give the same.
Do not run this again to get rid of a failing test of `tests/test_old_artefacts.py`; a later format gets files of its
own, beside these. Of each model its folder holds the checkpoint and `expected.safetensors`: inputs, and what the model
gave for them.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from hf_efficient.reporting.environment import Environment
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
)

from hf_efficient import (
    AttentionConfig,
    PruningConfig,
    Recipe,
    Report,
    cache_teacher,
    compress,
    convert_attention,
    plan,
    prune,
)
from hf_efficient.reporting.card import model_card
from hf_efficient.reporting.page import report_page
from hf_efficient.reporting.schema import (
    Comparison,
    DatasetFacts,
    Energy,
    ExportRecord,
    Latency,
    LayerStructure,
    LengthPoint,
    Measurement,
    Quality,
    Score,
    Size,
    StageRecord,
    Workload,
)
from hf_efficient.reporting.tables import markdown_results, text_results, text_table

HERE = Path(__file__).parent
VOCABULARY, LENGTH = 50, 12
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 4}
SMALL = {"window": 2}
# A layer for each kind of attention, and for each way to learn or draw something in it.
KINDS = [
    AttentionConfig("local", **SMALL),
    AttentionConfig("local", global_tokens=1, **SMALL),
    AttentionConfig("strided", block_size=2, num_blocks=2, global_tokens=1),
    AttentionConfig("lsh", block_size=2, num_hashes=2, num_buckets=4),
    AttentionConfig("topk", block_size=2, top_k=3),
    AttentionConfig("linear"),
    AttentionConfig("linear", feature_map="relu"),
    AttentionConfig("linear", feature_map="favor", feature_dim=6),
    AttentionConfig("linear", feature_map="hedgehog"),
    AttentionConfig("local_linear", feature_map="hedgehog", **SMALL),
    AttentionConfig("additive"),
    AttentionConfig("kernel", feature_dim=4),
    AttentionConfig("full"),
]


def spread_out(model: PreTrainedModel) -> PreTrainedModel:
    """Weights so different that layers, heads and tokens matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1:
                noise *= 8 * torch.rand(len(parameter), *[1] * (parameter.dim() - 1))
            parameter += 0.1 * noise
    return model.eval()


def bert(kind: type[PreTrainedModel], depth: int) -> PreTrainedModel:
    sizes = SIZES | {"num_hidden_layers": depth, "intermediate_size": 32, "max_position_embeddings": LENGTH}
    return spread_out(kind(BertConfig(**sizes, num_labels=3)))


def inputs(rows: int = 3) -> dict[str, torch.Tensor]:
    """Padded on the right, but for the first row."""
    mask = (torch.arange(LENGTH) < LENGTH - torch.arange(rows)[:, None] * 2).long()
    return {"input_ids": torch.randint(3, VOCABULARY, (rows, LENGTH)) * mask, "attention_mask": mask}


def keep(model: PreTrainedModel, folder: Path) -> None:
    """The checkpoint, and what it gives in float64: written in float32, but exact to its last digit."""
    given = inputs()
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, VOCABULARY, (3, LENGTH))
    model.save_pretrained(folder)
    exact = type(model).from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        expected = {"logits": exact(**given).logits.float()}
    if model.can_generate():
        prompt = {name: given[name][:1] for name in ("input_ids", "attention_mask")}
        expected["tokens"] = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    kept = {name: value.contiguous() for name, value in (given | expected).items()}
    save_file(kept, folder / "expected.safetensors")


def all_kinds() -> PreTrainedModel:
    """What the layers add is small, so that tokens are not all alike after so many; a kernel is a few of them wide."""
    model = bert(BertForTokenClassification, len(KINDS))
    model = spread_out(convert_attention(model, dict(enumerate(KINDS))))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".output.dense." in name:
                parameter *= 0.1
            if name.endswith("log_width"):
                parameter -= 2
    return model


def make_models(out: Path) -> None:
    torch.manual_seed(0)
    dense = bert(BertForSequenceClassification, 4)
    keep(dense, out / "bert-stock")
    asked = PruningConfig(
        ratio=0.5,
        granularity=["head", "neuron", "layer"],
        importance="magnitude",
        layer_importance="magnitude",
        reconstruct=False,
        round_to=1,
        sequence_length=LENGTH,
    )
    plan(dense, asked).save(out / "plan.json")
    keep(prune(dense, asked), out / "bert-pruned")
    alike = PruningConfig(ratio=0.25, granularity="neuron", allocation="uniform")
    keep(prune(dense, alike, [inputs() | {"labels": torch.tensor([0, 1, 2])}]), out / "bert-portable")
    torch.manual_seed(0)  # again for each, so that one can be changed without the others
    keep(all_kinds(), out / "bert-kinds")

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=3, intermediate_size=32, num_key_value_heads=2, pad_token_id=0)
    llama = spread_out(LlamaForCausalLM(config))
    keep(convert_attention(llama, AttentionConfig("local", window=3)), out / "llama-local")

    t5_sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    torch.manual_seed(1)
    t5 = spread_out(T5ForConditionalGeneration(T5Config(**t5_sizes, decoder_start_token_id=0)))
    local = AttentionConfig("local", window=3)
    blocks = AttentionConfig("strided", block_size=2, num_blocks=2)
    t5 = convert_attention(t5, {"encoder": local, "decoder": {0: local, 1: blocks}})
    less = PruningConfig(ratio=0.3, importance="magnitude", reconstruct=False, round_to=1, sequence_length=LENGTH)
    keep(prune(t5, less), out / "t5")


def make_cache(teacher: PreTrainedModel, out: Path) -> None:
    torch.manual_seed(0)
    rows = inputs(6)
    data = Dataset.from_dict({name: value.tolist() for name, value in rows.items()})
    options = {"top_k": 5, "temperature": 2.0, "hidden_states": [1, 3], "shard_size": 4}
    cache = cache_teacher(teacher, data, out / "teacher-cache", data_collator=default_data_collator, **options)
    found = {f"found.{name}": value.contiguous() for name, value in cache.find(rows).items()}
    save_file(rows | found, out / "cache-rows.safetensors")


def make_recipes(out: Path) -> None:
    for path in sorted((HERE / "recipes").glob("*.yaml")):
        recipe = Recipe.from_yaml(path)
        known = {"fingerprint": recipe.fingerprint(), "recipe": recipe.to_dict()}
        target = out / "recipes" / path.with_suffix(".json").name
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(known, indent=1) + "\n")


def measurement(name: str, part: float, value: float) -> Measurement:
    scores = (Score("accuracy", value, 0.0081, True), Score("loss", round(1.2 - value, 4), 0.0213, False))
    return Measurement(
        model=name,
        workload=Workload(4, 96, (4, 96), 2, "float32", "cpu"),
        size=Size(*(int(part * n) for n in (9_713_411, 2_919_360, 9_650_111, 38_859_028, 735_000_832, 48_765_432))),
        latency=Latency(19.43 * part, 22.81 * part, 18.77 * part, 31, 4),
        quality=Quality("text-classification", 427, 427, scores),
        energy=Energy(0.0371 * part, 2048, "estimated", "codecarbon 3.0.4"),
    )


def make_report(out: Path) -> None:
    """Numbers, a machine and versions that never were, so that whatever is shown comes from the report."""
    student = measurement("EfficientBertForSequenceClassification", 0.4137, 0.9555)
    energy = {"kwh": 0.00213, "co2_grams": 0.811, "country": "DEU", "source": "estimated", "tool": "codecarbon 3.0.4"}
    curve = [{"step": step, "kd": 1.9 / step, "ce": 0.7 / step} for step in (1, 5, 10, 20)]
    structure = [(12, 1152, "full", "encoder"), (7, 760, "local", "encoder"), (0, 0, "removed", "encoder")]
    structure += [(9, 1536, "linear", "decoder"), (12, 640, "topk", "decoder")]
    report = Report(
        student=student,
        base_model="somebody/bert-mini",
        teacher=measurement("BertForSequenceClassification", 1.0, 0.9672),
        comparison=Comparison(2.417, 2.398, 0.4137, 0.4138, 0.4136, 0.4139, "accuracy", -0.0117, 0.0066, 0.9789),
        auto_class="AutoModelForSequenceClassification",
        processor_class="AutoTokenizer",
        loads_with="plugin",
        licence="apache-2.0",
        dataset=DatasetFacts("somebody/news", {"train": 1702, "test": 427}),
        stages=(
            StageRecord("teacher", 61.5, {"epochs": 1.0, "batch_size": 16}, {"energy": energy, "final_loss": 0.118}),
            StageRecord("attention", 0.8, {"kind": "local", "window": 16}, {"layers": [0, 1, 2], "energy": energy}),
            StageRecord("prune", 41.26, {"ratio": 0.55, "metric": "macs"}, {"layers_removed": [2], "energy": energy}),
            StageRecord("distill", 233.7, {"losses": {"kd": 1.0, "ce": 0.5}}, {"curve": curve, "energy": energy}),
            StageRecord("export", 3.2, {"format": "onnx"}, {"weights_sha256": "0" * 64, "energy": energy}),
        ),
        structure=tuple(
            LayerStructure(index % 3, heads, 12, neurons, 1536, kind, stack)
            for index, (heads, neurons, kind, stack) in enumerate(structure)
        ),
        warnings=("Calibration used 48 samples only.", "A name with *stars* and <tags>."),
        recipe={"name": "news-fast", "task": "text-classification", "stages": [{"prune": {"ratio": 0.55}}]},
        seed=17,
        created="2001-02-03",
        commit="0123456789abcdef0123456789abcdef01234567",
        environment=Environment("Babbage 1", 6, None, "Brass iron", "0.9.9", "0.1.2+steam", "0.3.4", "0.0.7"),
        exports=(
            ExportRecord(
                "onnx", "onnxruntime 0.5.6", "int8", "onnx-int8", 4_021_337, 0.0213, Latency(3.97, 4.4, 3.8, 31, 4),
                4.894, measurement("", 0.1, 0.9532).quality, -0.014, 0.0071,
            ),
        ),
        lengths=(LengthPoint(24, 2.1, 4.9), LengthPoint(48, 4.2, 9.8), LengthPoint(96, 8.04, None)),
    )  # fmt: skip
    report.save(out / "report.json")
    (out / "card.md").write_text(str(model_card(report, "me/news-fast")), encoding="utf-8")
    (out / "page.html").write_text(report_page(report, repo_id="me/news-fast"), encoding="utf-8")
    tables = [text_table(report), text_results({"fast": report}), markdown_results({"fast": report})]
    (out / "tables.txt").write_text("\n\n".join(tables) + "\n", encoding="utf-8")


def make_run(out: Path) -> None:
    training = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    recipe = {
        "name": "old-run",
        "task": "image-classification",
        "model": {"config": {"model_type": "vit", "image_size": 8, "patch_size": 2, "num_channels": 1} | sizes},
        "data": {"name_or_path": "bundled:digits", "limit": 40},
        "teacher": training,
        "stages": [
            {"attention": {"kind": "local", "window": 4, "global_tokens": 1}},
            {"prune": {"ratio": 0.4, "calibration_samples": 8}},
            {"distill": {**training, "losses": {"kd": 1.0, "ce": 0.5, "hidden": 0.1}}},
        ],
        "measure": {"repeats": 2},
    }
    compress(Recipe.from_dict(recipe), output_dir=out / "run", announce=print)
    (out / "run" / ".lock").unlink(missing_ok=True)
    for picture in (out / "run" / "model").glob("*.png"):  # depends on matplotlib, and is larger than all the rest
        picture.unlink()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True)
    make_models(out)
    make_cache(AutoModelForCausalLM.from_pretrained(out / "llama-local").eval(), out)
    make_recipes(out)
    make_report(out)
    make_run(out)
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
