"""A model of one's own whose code came with its checkpoint: changed, saved with that code, loaded by trust."""

import json
import re

import pytest
from transformers import AutoModel

from hf_efficient import CheckpointError, UnsupportedModelError
from hf_efficient.models.derive import family_for
from hf_efficient.models.loading import load_model

from ...processes import python, run_fresh
from .toy import DOCUMENTED, documented

IMPORTS, CONFIG, *MODULES = re.split("^(?=class )", DOCUMENTED, flags=re.M)
CLASSES = {
    "converted": "EfficientToyModel",
    "head": "EfficientToyModel",
    "neuron": "EfficientToyModel",
    "layer": "ToyModel",  # a plain result is of the stock class
}


def driver(root, action, folder, out):
    done = python("-m", "tests.models.derive.own_driver", root / "cache" / out.name, action, folder, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What was made of the documentation's model, one folder for each of `CLASSES`; its code is in two files."""
    root = tmp_path_factory.mktemp("own")
    (root / "their").mkdir()
    (root / "their/configuration_toy.py").write_text(IMPORTS + CONFIG)
    beside = "from .configuration_toy import ToyConfig\n"
    (root / "their/modeling_toy.py").write_text("".join([IMPORTS, beside, *MODULES]))
    names = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModel": "modeling_toy.ToyModel"}
    config = {"model_type": "toy", "architectures": ["ToyModel"], "auto_map": names, "depth": 4}
    (root / "their/config.json").write_text(json.dumps(config))
    driver(root, "make", root / "their", root / "made")
    return root / "made"


@pytest.mark.processes
def test_it_loads_by_trust_and_can_be_pruned_again(made, tmp_path):
    """In another process, and what is saved there in a third."""
    expected = {part: [name, True, True] for part, name in CLASSES.items()}
    for folder, again in ((made, "again"), (tmp_path / "again", "once more")):
        [*_, last] = driver(tmp_path, "load", folder, tmp_path / again)
        assert json.loads(last) == expected
        expected["layer"][0] = "EfficientToyModel"


@pytest.mark.processes
def test_without_trust_it_is_refused_with_a_reason(made):
    for part in CLASSES:
        with pytest.raises(ValueError, match=r"(?s)contains custom code.*trust_remote_code=True"):
            AutoModel.from_pretrained(made / part, trust_remote_code=False)
        with pytest.raises(CheckpointError, match=r"(?s)contains custom code.*trust_remote_code=True"):
            load_model("AutoModel", made / part)


def test_code_of_the_same_name_is_not_confused(monkeypatch):
    """Two checkpoints may call their model alike, with the same fields, and build it in two ways."""
    for name in ("mixer", "blender"):
        module = documented(monkeypatch, f"code_with_{name}", **{"self.mixer": f"self.{name}"})
        [stack] = family_for(module.ToyConfig(), module.ToyModel(module.ToyConfig())).stacks
        assert stack.attention.module == name and not stack.refusals
        with pytest.raises(UnsupportedModelError, match="load the model first"):
            family_for(module.ToyConfig(depth=2))


@pytest.mark.processes
@pytest.mark.thorough
def test_a_process_without_the_package_loads_it_by_trust_alone(made, tmp_path):
    answers = run_fresh(made, "trusted", "untrusted", home=tmp_path)
    for part, name in CLASSES.items():
        answer = answers["trusted"][part]
        assert answer["class"] == name and answer["equal"]
        assert all(answer["once"].values()) and answer["once"] == answer["twice"]  # the same files again
        assert "custom code" in answers["untrusted"][part]
