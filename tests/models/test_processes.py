"""What the person who receives a checkpoint meets: other processes, with and without the package and their trust."""

import pytest

from hf_efficient import AttentionConfig, convert_attention
from hf_efficient.models.block import EfficientBlock
from hf_efficient.models.classes import efficient_class, with_block
from hf_efficient.models.saving import LOADER

from ..families import CASES, config_class, make_config, make_model, one_layer
from ..processes import run_fresh, save_with_expectation
from .derive.tiny import make

pytestmark = pytest.mark.processes

DERIVED = {"opt": "EfficientOPTModel", "megatron-bert": "EfficientMegatronBertModel"}  # the latter computes its own
SAVED = {"config.json", "model.safetensors", f"{LOADER}.py"}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    portable = tmp_path_factory.mktemp("portable")
    for name, case in CASES.items():
        model = convert_attention(make_model(name, **one_layer(name)), AttentionConfig(kind="local", window=2))
        save_with_expectation(model, name, folder)
        trivial = with_block(make_config(name, **one_layer(name)), EfficientBlock())
        save_with_expectation(efficient_class(case.head, config_class(name))(trivial).eval(), name, portable)
    for name in DERIVED:
        model, inputs = make(name)
        model = convert_attention(model, AttentionConfig(kind="local", window=3))
        assert model.config.efficient["family"]["model_type"] == name  # so that nothing is derived there
        save_with_expectation(model, name, folder, inputs)
    home = tmp_path_factory.mktemp("home")
    answers = run_fresh(folder, "imported", "untrusted", "missing", "trusted", f"stock:{portable}", home=home)
    return {scenario.partition(":")[0]: answer for scenario, answer in answers.items()}


def test_after_importing_the_package_every_family_loads_bit_for_bit(answers):
    for name, case in CASES.items():
        assert answers["imported"][name] == {
            "class": f"Efficient{case.head.__name__}",
            "module": "hf_efficient.models",
            "equal": True,
        }


def test_a_derived_type_loads_with_the_package_or_by_trust(answers):
    for name, class_name in DERIVED.items():
        for scenario in ("imported", "trusted"):
            answer = answers[scenario][name]
            assert (answer["class"], answer["equal"]) == (class_name, True)


def test_trust_alone_loads_every_family_and_saves_the_same_files_again(answers):
    for name, case in CASES.items():
        answer = answers["trusted"][name]
        assert (answer["class"], answer["equal"]) == (f"Efficient{case.head.__name__}", True)
        for step in ("once", "twice"):
            assert SAVED <= answer[step].keys() <= SAVED | {"generation_config.json"}
            assert all(answer[step].values()), answer[step]


def test_without_trust_and_without_the_package_imported_it_raises(answers):
    for name in (*CASES, "asked"):
        assert answers["untrusted"][name].startswith("ValueError")
        assert "trust_remote_code=True" in answers["untrusted"][name]


def test_without_the_package_the_error_says_how_to_get_it(answers):
    for name in CASES:
        assert answers["missing"][name].startswith("ImportError")
        assert "pip install hf_efficient" in answers["missing"][name]


def test_a_portable_checkpoint_loads_where_the_package_is_not_imported(answers):
    answer = answers["stock"]
    assert answer["plugin_imported"] is False
    for name, case in CASES.items():
        assert (answer[name]["class"], answer[name]["equal"]) == (case.head.__name__, True)
