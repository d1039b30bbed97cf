"""Whatever is in a recipe, a config, a plan or a report: it is read, or refused with an error of ours."""

import dataclasses
import itertools
import random

import pytest
from hypothesis import HealthCheck, given, note
from hypothesis import strategies as st

from hf_efficient import AttentionConfig, CheckpointError, ConfigError, PruningConfig, PruningPlan, Report
from hf_efficient.errors import shown, unknown_name
from hf_efficient.pruning.gradual.schedule import Gradual

from ..helpers import random_examples
from .mutations import ODD, mutated, scrambled
from .targets import TARGETS

DEEP = "[" * 100_000 + "]" * 100_000
MANY = random_examples(80, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_right_is_accepted(name):
    target = TARGETS[name]
    assert all(target.read(target.write(document)) for document in target.documents())


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_wrong_is_refused_by_an_error_of_ours(name):
    target, documents = TARGETS[name], TARGETS[name].documents()
    answers = set()  # what is left whole is accepted, which is what the test before this one is about

    @MANY
    @given(st.integers(0, 1 << 64))
    def check(seed):
        pick = random.Random(seed).randrange
        text = target.write(mutated(documents[pick(len(documents))], pick))
        text = scrambled(text, pick) if pick(3) == 0 else text
        note(text)
        answers.add(target.read(text))

    check()
    assert False in answers


NOTHING = ["", "\0", DEEP, '{"a":' * 50_000, "1" * 5000, "null", "[]", "{}", "\ufeff{}", "NaN"]
# Where nothing is said, everything is as it is by default.
DEFAULTS = {(name, "{}") for name in ("overrides", "block", "pruning", "tokenizer")} | {
    ("overrides", x) for x in ("[]", "\ufeff{}")
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("text", NOTHING, ids=range(len(NOTHING)))
def test_texts_that_are_nothing(name, text):
    assert TARGETS[name].read(text) is ((name, text) in DEFAULTS)


def field_values():
    return [*ODD, b"a", {1, 2}, object(), 1 + 2j, range(3), "x" * 10**6, 10**5000, [[[]]], {"a": {"b": 10**5000}}]


@pytest.mark.parametrize("kind", [AttentionConfig, PruningConfig, Gradual])
def test_every_field_of_a_config_checks_what_it_is_given(kind):
    """One field at a time, with everything that Python has."""
    accepted = 0
    least = {"config": PruningConfig(importance="taylor")} if kind is Gradual else {}
    names = [entry.name for entry in dataclasses.fields(kind) if entry.name != "config"]
    kinds = [{"kind": "local"}, {"kind": "linear", "feature_map": "favor"}, {"kind": "kernel"}, {"kind": "lsh"}]
    for name, value in itertools.product(names, field_values()):
        for base in kinds if kind is AttentionConfig else [least]:
            try:
                kind(**base | {name: value})
            except ConfigError as error:
                assert 0 < len(str(error)) < 1000, (name, shown(value))
            else:
                accepted += 1
    assert 0 < accepted < len(names) * len(field_values())


@pytest.mark.parametrize("given_name", [10**5000, "x" * 10**6, [10**5000], {"a": 1}, None], ids=range(5))
def test_an_unknown_name_is_told_whatever_it_is(given_name):
    message = str(unknown_name("kind", given_name, ["local", "full"]))
    assert "Known: full, local." in message and len(message) < 200


def test_a_near_name_is_still_suggested():
    assert "Did you mean 'local'?" in str(unknown_name("kind", "locla", ["local", "full"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"forecast": []}, "forecast"),
        ({"forecast": {"layers": 5}}, "forecast"),
        ({"model": 3}, "`model` of a plan must be a model type"),
        ({"chosen": "yes"}, "`chosen` of a plan must be true or false"),
        ({"config": {"importance": {}}}, "importance must be a name"),
        ({"config": [1]}, "cannot be read"),
    ],
)
def test_plans_with_values_of_another_type(change, words):
    with pytest.raises(ConfigError, match=words):
        PruningPlan.from_dict(PruningPlan().to_dict() | change)


def test_files_nested_too_deep_are_no_plans_and_no_reports(tmp_path):
    (tmp_path / "plan.json").write_text(DEEP)
    with pytest.raises(ConfigError, match=r"plan\.json as JSON: nested far too deep"):
        PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(CheckpointError, match="nested deeper than 100 levels"):
        Report.from_json('{"schema_version": 1, "a": ' + "[" * 200 + "]" * 200 + "}")
