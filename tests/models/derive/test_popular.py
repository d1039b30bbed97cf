"""What benchmarks/results/coverage.json says that model types can do, they can: found from configs alone.

All but those that were measured with a config of their own, because their default one does not build.
"""

import json

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.coverage_page import changes
from hf_efficient import UnsupportedModelError
from hf_efficient.models.derive import family_for
from hf_efficient.models.derive.tiny import tiny_config

from ...helpers import selected
from ...pages import ROOT

RESULT = json.loads((ROOT / "benchmarks/results/coverage.json").read_text())
ROWS = {row["type"]: row for row in RESULT["rows"]}
POPULAR = """
bert roberta camembert xlm-roberta distilbert albert mpnet deberta deberta-v2 electra modernbert nomic_bert esm
t5 mt5 bart mbart pegasus m2m_100 marian whisper wav2vec2 hubert clip siglip vit deit swin beit dinov2 dinov3_vit
layoutlm llava qwen2 qwen3 qwen3_moe qwen2_vl qwen2_5_vl llama llama4_text gemma gemma2 gemma3_text gemma4_text phi
phi3 mistral mixtral gpt_oss deepseek_v3 gpt2 gpt_neo gpt_neox gptj opt bloom falcon starcoder2 olmo2 granite
cohere2 smolvlm
""".split()  # noqa: SIM905


def test_the_list_is_of_sixty_types():
    assert len(set(POPULAR)) >= 60 and set(POPULAR) <= ROWS.keys()


DEFAULT = [(name,) for name, row in ROWS.items() if row["config"] == "default" and "model" not in row["why"]]


@pytest.mark.parametrize(("name",), selected(DEFAULT, lambda name: name in POPULAR))
def test_what_a_type_could_do_it_can(name):
    measured = {ability for ability, holds in ROWS[name]["abilities"].items() if holds}
    config = CONFIG_MAPPING[name]()
    try:
        family = family_for(tiny_config(config) if name in POPULAR else config)
    except UnsupportedModelError as error:
        assert not measured, str(error)
        return
    lost = {ability: family.why_not(ability) for ability in measured if family.why_not(ability)}
    assert not lost


def row(name, why=None, whole=True, **abilities):
    return {"type": name, "abilities": abilities, "why": why or {}, "whole": whole}


def test_two_results_are_compared():
    old = [row("a", convert=True, heads=True), row("b", layers=True), row("c", neurons=True), row("same", heads=True)]
    new = [
        row("a", {"encoder.heads": "fused"}, convert=True, whole=False),
        row("b", layers=True, neurons=True),
        row("d", convert=True),
        row("same", heads=True),
    ]
    assert changes({"rows": old}, {"rows": new}) == [
        "lost    a: heads, whole (encoder.heads: fused)",
        "gone    c: built, neurons",
        "gained  b: neurons",
        "new     d: built, convert, whole",
    ]
    assert changes({"rows": old}, {"rows": new[:1]}) == ["lost    a: heads, whole (encoder.heads: fused)"]
    wrong = [row("a", {"heads": "AssertionError: silent wrong: 1e-2 off"}, convert=True, heads=True)]
    assert "silent wrong" in changes({"rows": old}, {"rows": wrong})[0]
    assert changes(RESULT, RESULT) == []
