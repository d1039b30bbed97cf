import subprocess
import sys

import pytest
import torch

from hf_efficient.errors import ConfigError, UnsupportedModelError
from hf_efficient.io.environment import PACKAGE
from hf_efficient.measurement.measure import measure

from .models import bert_classifier, bert_config, vit


def data(n=12):
    return [{"input_ids": torch.randint(1, 50, (8,)), "labels": i % 3} for i in range(n)]


def test_alone():
    model = bert_classifier()
    result = measure(model, batch_size=2, sequence_length=16, repeats=2, warmup=1, threads=1)
    work = result.workload
    assert (work.batch_size, work.sequence_length, work.input_shape) == (2, 16, (2, 16))
    assert (work.threads, work.dtype, work.device) == (1, "float32", "cpu")
    assert result.model == "BertForSequenceClassification"
    assert result.latency.rounds == 2 and 0 < result.latency.min_ms <= result.latency.median_ms
    assert result.quality is None and result.baseline is None and result.comparison is None
    assert result.size.parameters == sum(p.numel() for p in model.parameters())


def test_against_a_baseline(tmp_path):
    torch.set_num_threads(2)
    teacher, student = bert_classifier(num_hidden_layers=3), bert_classifier()
    teacher.save_pretrained(tmp_path)
    samples = data()
    settings = {"sequence_length": 16, "repeats": 2, "threads": 1}
    result = measure(student, baseline=teacher, dataset=samples, baseline_folder=tmp_path, **settings)
    assert torch.get_num_threads() == 2
    both = (result.size, result.baseline.size)
    assert result.comparison.parameter_ratio == both[0].parameters / both[1].parameters < 1
    assert result.comparison.mac_ratio == both[0].macs / both[1].macs < 1
    assert result.comparison.memory_ratio == both[0].peak_memory_bytes / both[1].peak_memory_bytes < 1
    assert both[0].bytes_on_disk is None and both[1].bytes_on_disk > both[1].weight_bytes
    speedup = result.baseline.latency.median_ms / result.latency.median_ms
    assert result.comparison.speedup == pytest.approx(speedup)
    accuracy = result.quality.main.value - result.baseline.quality.main.value
    assert result.comparison.quality_difference == pytest.approx(accuracy)
    assert result.alone().baseline is None and result.alone().size == result.size
    alone = measure(student, dataset=samples, **settings)
    assert alone.quality == result.quality and alone.size == result.size


def test_images_have_no_sequence_length():
    result = measure(vit(), repeats=2, warmup=0)
    assert result.workload.sequence_length is None and result.workload.input_shape == (1, 1, 8, 8)


def test_more_tokens_than_positions():
    assert bert_config().max_position_embeddings < 512
    with pytest.raises(ConfigError, match="sequence_length=512"):
        measure(bert_classifier())


@pytest.mark.processes
@pytest.mark.parametrize("before", ["", "import hf_efficient.models.modes"])
def test_the_public_name_can_be_called_whatever_was_imported_before(before):
    """The package and its function share a name: importing the package must not hide the function."""
    call = "try:\n    measure(1, wrong=2)\nexcept TypeError as error:\n    print(error)"
    code = f"{before}\nfrom hf_efficient import measure\n{call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "unexpected keyword argument 'wrong'" in done.stdout, done.stderr


@pytest.mark.processes
def test_importing_it_imports_nothing_heavy():
    # The package's own __init__ is left out: it registers with transformers, which is another matter.
    code = f"""
import sys, types
package = types.ModuleType("hf_efficient")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["hf_efficient"] = package
import hf_efficient.measurement.measure, hf_efficient.reporting.card, hf_efficient.reporting.plots
print([name for name in ("torch", "transformers", "matplotlib", "huggingface_hub") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_what_is_no_model_or_has_no_weights_is_named():
    for wrong, words in ((None, "NoneType"), ("out/model", "as model, got str"), (torch.nn.Linear(2, 2), "Linear")):
        with pytest.raises(UnsupportedModelError, match=words):
            measure(wrong)
    with pytest.raises(UnsupportedModelError, match="meta"):
        measure(bert_classifier(), baseline=bert_classifier().to("meta"), sequence_length=8, repeats=2)
