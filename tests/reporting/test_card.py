import re
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from hf_efficient.data.tasks import TASKS
from hf_efficient.models.pooling import POOLINGS, pool
from hf_efficient.recipes.recipe import Recipe, shipped_recipes
from hf_efficient.reporting.card import TEMPLATE, model_card, recipe_text, save_card
from hf_efficient.reporting.schema import DatasetFacts, Latency, Quality, Score, StageRecord
from hf_efficient.reporting.tables import format_bytes, format_count, format_ms, format_ratio

from .samples import STUDENT, sample_report

NUMBER = re.compile(r"\d+(?:\.\d+)*")


def leaves(value):
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def numbers_of(report):
    """Each number that the report may put into a text, in each way that the house writes numbers."""
    size = [report.student.size, report.teacher.size] if report.teacher else [report.student.size]
    texts = []
    for leaf in leaves(asdict(report)) + [s.non_embedding_parameters for s in size]:
        texts.append(str(leaf))
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
            ways = (format_count, format_bytes, format_ms, format_ratio)
            texts += [way(abs(leaf)) for way in ways]
            texts += [f"{abs(leaf):.1f}", f"{abs(leaf):.3f}", f"{100 * abs(leaf):.1f}", f"{leaf:.4g}"]
    return {number for text in texts for number in NUMBER.findall(text)}


def test_the_template_holds_no_number():
    text = TEMPLATE.read_text()
    assert not re.search(r"\d", re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", text))


@pytest.mark.parametrize(
    "report",
    [
        sample_report(),
        sample_report(loads_with="portable", seed=None, commit=None),
        sample_report(teacher=None, comparison=None, stages=(), structure=(), warnings=(), dataset=None),
        sample_report(student=replace(STUDENT, quality=None), comparison=None),
    ],
)
def test_every_number_comes_from_the_report(report):
    content = model_card(report, repo_id="me/small").content
    known = numbers_of(report)
    assert [number for number in NUMBER.findall(content) if number not in known] == []
    assert "None" not in content and "{{" not in content and "\n\n\n" not in content


def test_a_changed_measurement_changes_the_card():
    slower = replace(STUDENT, latency=Latency(11.77, 14.88, 9.99, 31, 4))
    before, after = (str(model_card(report)) for report in (sample_report(), sample_report(student=slower)))
    assert "10.6 ms" in before and "10.6 ms" not in after
    assert "11.8 ms" in after and "14.9 ms" in after


def test_key_facts_are_there():
    text = str(model_card(sample_report()))
    for fact in (
        *("96.7% ± 0.9", "95.5% ± 1.0", "-1.2 ± 0.7 points", "97.9%", "1.84x", "22.7M", "16.8M", "688M", "73.5 MB"),
        *("batch 1, 128 tokens, 2 threads, float32 on cpu", "AMD EPYC, 6 cores", "median of 31 rounds", "427 samples"),
        *("0123456789abcdef0123456789abcdef01234567", "2026-11-23", "2.13.0+cpu", "5.23.0", "Seed: 17"),
        *("**pruning** (41.3 s): ratio 0.55, metric macs", "final_loss 0.2981", "train 1702, test 427"),
        *("1152 of 1536", "Calibration used 48 samples only."),
    ):
        assert fact in text, fact


def test_front_matter_is_valid_and_complete():
    text = str(model_card(sample_report(), repo_id="me/small"))
    front = yaml.safe_load(text.split("---\n")[1])
    data = ModelCard(text).data
    assert data.base_model == front["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert front["base_model_relation"] == "finetune"
    assert data.license == "apache-2.0" and data.library_name == "transformers"
    assert data.pipeline_tag == "text-classification" and data.datasets == ["SetFit/bbc-news"]
    assert data.tags == ["hf_efficient", "pruning", "distillation"]
    results = {result.metric_type: result for result in data.eval_results}
    assert data.model_name == "small" and set(results) == {"accuracy", "loss"}
    assert results["accuracy"].metric_value == 0.9555
    assert results["accuracy"].dataset_name == "SetFit/bbc-news"


def test_a_diverged_model_has_a_card_without_the_broken_result():
    scores = (Score("loss", float("nan"), float("nan"), False), Score("token_accuracy", 0.2, 0.1, True))
    quality = Quality("causal-lm", 427, 9000, scores)
    data = ModelCard(str(model_card(sample_report(student=replace(STUDENT, quality=quality), comparison=None)))).data
    assert [result.metric_type for result in data.eval_results] == ["token_accuracy"]
    assert data.pipeline_tag == data.eval_results[0].task_type == "text-generation"


def test_loading_differs_between_plugin_and_portable():
    plugin, portable = (
        str(model_card(sample_report(loads_with=kind), repo_id="me/small")) for kind in ("plugin", "portable")
    )
    for words in ("pip install hf-efficient", "import hf_efficient", "trust_remote_code=True"):
        assert words in plugin and words not in portable
    call = 'AutoModelForSequenceClassification.from_pretrained("me/small")'
    assert call in plugin and call in portable


def snippet_of(text):
    return re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)


@pytest.mark.parametrize("auto", sorted({task.auto_class for task in TASKS.values()}))
def test_every_task_has_a_snippet_that_is_python(auto):
    for kind in ("plugin", "portable"):
        text = str(model_card(sample_report(loads_with=kind, auto_class=auto), repo_id="me/small"))
        names = compile(snippet_of(text), "card", "exec").co_names
        assert {auto, "AutoTokenizer", "print"} <= set(names) and ("hf_efficient" in names) == (kind == "plugin")


@pytest.mark.parametrize("head", ["SequenceClassification", "CausalLM"])
def test_the_snippet_runs(head, tmp_path, capsys):
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    from ..pruning.tiny_tokenizers import tokenizer_of

    tokenizer = tokenizer_of("bert")
    if head == "CausalLM":
        config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=len(tokenizer), n_positions=32)
        model = GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        labels = {0: "sport", 1: "tech"}
        model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes, id2label=labels))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    report = sample_report(auto_class=f"AutoModelFor{head}", loads_with="portable")
    exec(snippet_of(str(model_card(report, repo_id=str(tmp_path)))), {})
    printed = capsys.readouterr().out.strip()
    assert printed in ("sport", "tech") if head == "SequenceClassification" else printed


def test_the_recipe_is_shown_and_reads_back():
    recipe = {"name": "bbc-fast", "pruning": {"ratio": 0.55}, "note": "```\nnot code"}
    text = str(model_card(sample_report(recipe=recipe)))
    shown = re.search(r"^````yaml\n(.*?)^````$", text, re.DOTALL | re.MULTILINE).group(1)
    assert yaml.safe_load(shown) == recipe
    assert "\n```yaml" in str(model_card(sample_report(recipe={"name": "bbc-fast"})))
    assert "```yaml" not in str(model_card(sample_report(recipe={})))


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_shown_recipe_is_the_recipe(name):
    recipe = Recipe.from_yaml(name)
    shown = recipe_text(sample_report(recipe=recipe.to_dict()))
    assert Recipe.from_dict(yaml.safe_load(shown)).fingerprint() == recipe.fingerprint() and "null" not in shown


def test_the_relation_is_quantized_only_if_nothing_else_was_done():
    def relation(*names):
        stages = tuple(StageRecord(name, 1.0, {"epochs": 1.0} if name == "teacher+" else {}) for name in names)
        stages = tuple(replace(stage, name=stage.name.rstrip("+")) for stage in stages)
        return ModelCard(str(model_card(sample_report(stages=stages)))).data.to_dict()["base_model_relation"]

    assert relation("teacher", "quantize") == relation("quantize", "export") == "quantized"
    assert relation("teacher+", "quantize") == relation("prune", "quantize") == "finetune"


@pytest.mark.parametrize("pooling", POOLINGS)
def test_embeddings_are_pooled_in_the_card_as_they_were_measured(pooling):
    score = Score("retrieval@1", 0.9, 0.01, True)
    stages = (StageRecord("distill", 1.0, {"pooling": pooling} if pooling != "mean" else {}, {}),)
    quality = Quality("sentence-embeddings", 427, 427, (score,))
    report = sample_report(student=replace(STUDENT, quality=quality), stages=stages, auto_class="AutoModel")
    text = str(model_card(report))
    assert ModelCard(text).data.pipeline_tag == "sentence-similarity" and "90.0% ± 1.0" in text
    states, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    line = re.search(r"^vectors = (.*)$", text, re.MULTILINE)[1]
    vectors = eval(line, {"torch": torch, "states": states, "mask": mask})
    assert torch.allclose(vectors, pool(states, mask.bool(), pooling))
    assert "vectors" not in str(model_card(sample_report()))


def test_images_get_an_image_processor():
    work = replace(STUDENT.workload, sequence_length=None, input_shape=(1, 3, 32, 32))
    images = sample_report(student=replace(STUDENT, workload=work), processor_class="AutoImageProcessor")
    text = str(model_card(images))
    assert "AutoImageProcessor" in text and "AutoTokenizer" not in text and "32x32 pixels" in text
    alone = str(model_card(replace(images, processor_class=None)))
    assert "Processor" not in alone and "processor" not in alone


def test_saved_card_shows_the_plots_that_are_there(tmp_path):
    path = save_card(sample_report(), tmp_path)
    assert path == tmp_path / "README.md" and "png" not in path.read_text()
    (tmp_path / "structure.png").write_bytes(b"x")
    assert "(structure.png)" in save_card(sample_report(), tmp_path).read_text()
    assert "accuracy_latency.png" not in path.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "structure.png"]


def test_user_text_cannot_break_the_page():
    report = sample_report(warnings=("first\n# a heading",), dataset=None, base_model="org/a{{ 7 * 7 }}b")
    text = str(model_card(report))
    assert "\n# a heading" not in text and "a49b" not in text
    assert "org/a{{ 7 * 7 }}b" in text


@pytest.mark.parametrize("name", ["a fresh bert", "bundled:minilm", "reviews.tsv", "data/reviews.tsv"])
def test_what_cannot_be_on_the_hub_is_not_linked_to_it(name):
    report = sample_report(base_model=name, dataset=DatasetFacts(name, {"test": 427}))
    text = str(model_card(report, repo_id="me/small"))
    data = ModelCard(text).data
    assert data.base_model is None and data.datasets is None and "base_model_relation" not in data.to_dict()
    assert f"{name} compressed with" in text and "huggingface.co" not in text
    assert data.eval_results[0].dataset_name == name
