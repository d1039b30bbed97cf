"""Named types outside of the table: pruned, converted, distilled, saved, loaded in another process, exported."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_efficient import (
    AttentionConfig,
    DistillationArguments,
    DistillationTrainer,
    PruningConfig,
    convert_attention,
    export,
    prune,
)
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.derive.inputs import tiny_inputs
from hf_efficient.models.derive.tiny import tiny_config, tiny_model

from ...helpers import selected
from ...processes import python, run_fresh, save_with_expectation


@dataclass(frozen=True)
class Row:
    """A class with a head, what loads it, the parts that leave, and the stacks that are converted."""

    head: str
    auto: str
    parts: str = "layer head neuron"
    converted: str = ""
    importance: str = "activation"


CLASSES, TEXT, SUMMARY = "AutoModelForSequenceClassification", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
READ, BOTH = "AutoModelForImageTextToText", "encoder decoder"
STAGES = " ".join(f"encoder_layers_{number}_blocks" for number in range(4))
EXPERTS = {"importance": "taylor"}  # what experts in one tensor read is seen by nobody
ROWS = {
    "mpnet": Row("MPNetForSequenceClassification", CLASSES, converted="encoder"),
    "deberta-v2": Row("DebertaV2ForSequenceClassification", CLASSES, converted="encoder"),
    "albert": Row("AlbertForSequenceClassification", CLASSES, "head neuron", "encoder"),  # one layer for all
    "qwen2": Row("Qwen2ForCausalLM", TEXT, converted="decoder"),
    "qwen3_moe": Row("Qwen3MoeForCausalLM", TEXT, converted="decoder", **EXPERTS),
    "gemma2": Row("Gemma2ForCausalLM", TEXT, converted="decoder"),
    "phi3": Row("Phi3ForCausalLM", TEXT, converted="decoder"),
    "gpt_neox": Row("GPTNeoXForCausalLM", TEXT, converted="decoder"),
    "opt": Row("OPTForCausalLM", TEXT, converted="decoder"),
    "gpt_oss": Row("GptOssForCausalLM", TEXT, converted="decoder", **EXPERTS),
    "mt5": Row("MT5ForConditionalGeneration", SUMMARY, converted=BOTH),
    "m2m_100": Row("M2M100ForConditionalGeneration", SUMMARY, converted=BOTH),  # NLLB
    "pegasus": Row("PegasusForConditionalGeneration", SUMMARY, converted=BOTH),
    "wav2vec2": Row("Wav2Vec2ForSequenceClassification", "AutoModelForAudioClassification", converted="encoder"),
    "siglip": Row("SiglipForImageClassification", "AutoModelForImageClassification", converted="vision"),
    "swin": Row("SwinForImageClassification", "AutoModelForImageClassification", "head neuron", STAGES),
    "qwen2_5_vl": Row("Qwen2_5_VLForConditionalGeneration", READ, converted="vision text"),
    "llava": Row("LlavaForConditionalGeneration", READ, converted="vision text"),
}
TRACED = ("qwen2_5_vl", "llava")  # for the rows of the trace alone, see tests/runtimes
FAST = ("mpnet", "opt", "qwen3_moe", "m2m_100", "siglip", "llava")


def make(name):
    """A tiny teacher, inputs for it, and the same with labels."""
    teacher = tiny_model(tiny_config(CONFIG_MAPPING[name]()), getattr(transformers, ROWS[name].head))
    inputs = tiny_inputs(teacher)
    labels = torch.tensor([0, 1])
    if "Classification" not in ROWS[name].head:
        labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    batch = {key: value for key, value in inputs.items() if key != "decoder_input_ids"} | {"labels": labels}
    return teacher, inputs, batch


def pruned(model, part, batch, importance):
    config = PruningConfig(
        ratio=0.04,
        granularity=(part,),
        importance=importance,
        layer_importance="magnitude",
        round_to=1,
        reconstruct=importance == "activation",
    )
    return prune(model, replace(config, ratio=0.2) if part == "layer" else config, [batch])


def distilled(student, teacher, batch, folder, loss="kd"):
    """After two steps; a row of the data is a whole batch, whatever it is made of."""
    arguments = DistillationArguments(
        str(folder),
        losses={loss: 1.0},
        max_steps=2,
        per_device_train_batch_size=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    before = {key: value.clone() for key, value in student.state_dict().items()}
    options = {"train_dataset": [batch, batch], "data_collator": lambda rows: dict(rows[0])}
    DistillationTrainer(model=student, teacher=teacher, args=arguments, **options).train()
    assert any(not torch.equal(value, before[key]) for key, value in student.state_dict().items())
    return student.eval()


@pytest.mark.processes
@pytest.mark.parametrize(("name",), selected([(name,) for name in ROWS], lambda name: name in FAST))
def test_pruned_converted_distilled_saved_and_loaded(name, tmp_path):
    row = ROWS[name]
    teacher, inputs, batch = make(name)
    student, sizes = teacher, [teacher.num_parameters()]
    for part in row.parts.split():
        student = pruned(student, part, batch, row.importance)
        sizes.append(student.num_parameters())
    assert sizes == sorted(set(sizes), reverse=True)
    assert {stack.name for stack in Anatomy.of(student).stacks} >= set(row.converted.split())
    if row.converted:
        student = convert_attention(student, dict.fromkeys(row.converted.split(), AttentionConfig("local", window=3)))
    student = distilled(student, teacher, batch, tmp_path / "run")
    assert loaded(student, name, row.auto, inputs, tmp_path) == {
        "class": type(student).__name__,
        "equal": True,
        "parameters": sizes[-1],
    }


def loaded(student, name, auto, inputs, folder):
    """What another process says of the saved student."""
    saved = folder / "saved" / name
    student.save_pretrained(saved)
    with torch.no_grad():
        save_file(inputs | {"expected": student(**inputs)[0].contiguous()}, saved / "expected.safetensors")
    (saved / "auto.txt").write_text(auto)
    done = python("-m", "tests.models.derive.again_driver", folder / "saved")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])[name]


@pytest.mark.processes
def test_both_towers_of_siglip(tmp_path):
    teacher = tiny_model(tiny_config(CONFIG_MAPPING["siglip"]()), transformers.SiglipModel)
    inputs, student = tiny_inputs(teacher), teacher
    for part in ("layer", "head", "neuron"):
        student = pruned(student, part, inputs, "activation")
    for tower in ("text_model", "vision_model"):
        sizes = [getattr(model, tower).num_parameters() for model in (teacher, student)]
        assert sizes[1] < sizes[0]
    student = convert_attention(student, dict.fromkeys(("text", "vision"), AttentionConfig("local", window=3)))
    for tower, taken in (("text_model", "input_ids"), ("vision_model", "pixel_values")):
        pair, batch = [getattr(model, tower) for model in (student, teacher)], {taken: inputs[taken]}
        distilled(*pair, batch, tmp_path / tower, "embedding")
    answer = loaded(student.eval(), "siglip", "AutoModel", inputs, tmp_path)
    assert answer == {"class": "EfficientSiglipModel", "equal": True, "parameters": student.num_parameters()}


PORTABLE = dict.fromkeys(ROWS, "neuron") | dict.fromkeys(("mt5", "m2m_100", "pegasus", "siglip"), "layer")
del PORTABLE["swin"]  # whose config has one width for FFNs of all stages, and in whole ratios


@pytest.mark.thorough
def test_what_is_portable_loads_without_us(tmp_path):
    for name, part in PORTABLE.items():
        teacher, inputs, batch = make(name)
        config = PruningConfig(
            ratio=0.3,
            granularity=(part,),
            importance="magnitude",
            allocation="uniform",
            round_to=1,
            reconstruct=False,
        )
        student = prune(teacher, config, [batch]).eval()
        assert type(student) is type(teacher) and student.num_parameters() < 0.9 * teacher.num_parameters(), name
        save_with_expectation(student, name, tmp_path / "saved", inputs)
        (tmp_path / "saved" / name / "auto.txt").write_text(ROWS[name].auto)
    scenario = f"stock:{tmp_path / 'saved'}"
    answers = run_fresh(tmp_path, scenario, home=tmp_path / "home")[scenario]
    assert answers.pop("plugin_imported") is False
    assert answers.keys() == PORTABLE.keys()
    assert [name for name, answer in answers.items() if not answer["equal"]] == []


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in ROWS if name not in TRACED])
def test_exported(name, tmp_path):
    """In ONNX Runtime, for other numbers of rows and tokens too."""
    row = ROWS[name]
    teacher, inputs, batch = make(name)
    student = pruned(teacher, row.parts.split()[-1], batch, row.importance)
    if row.converted:
        student = convert_attention(student, dict.fromkeys(row.converted.split(), AttentionConfig("local", window=3)))
    assert export(student, "onnx", tmp_path / "program", inputs=[inputs]).difference < 1e-4
