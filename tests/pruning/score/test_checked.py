"""What no score can come from is told before any work: weights and statistics that are not finite, batches that the
model cannot read, models without weights."""

import copy

import pytest
import torch

from hf_efficient import CheckpointError, ConfigError, DataError, PruningConfig, measure, plan, prune
from hf_efficient.errors import UnsupportedModelError
from hf_efficient.models.anatomy import Anatomy
from hf_efficient.models.block import EfficientBlock
from hf_efficient.pruning.callback import STATE_FILE
from hf_efficient.pruning.callback import _read as read_state
from hf_efficient.pruning.gradual.schedule import Gradual
from hf_efficient.pruning.gradual.units import UnitRemoval
from hf_efficient.pruning.plan import PruningPlan
from hf_efficient.pruning.score import calibration
from hf_efficient.pruning.score.checked_batches import check_batches
from hf_efficient.pruning.score.layers import block_influence, loss
from hf_efficient.pruning.search import Cutter
from tests.families import CASES as FAMILIES
from tests.families import make_inputs, make_model

from ..tiny import CASES, batch, batches, config, logits, make

LAYERS = ["loss", "block_influence", "random", "magnitude"]
UNITS = ["fisher", "taylor", "obs", "activation", "magnitude", "random"]


def spoil(model, value: float, layer: int = 1) -> str:
    layers = Anatomy.of(model).stacks[0].layers
    name, parameter = next(iter(layers[layer].named_parameters()))
    with torch.no_grad():
        parameter.view(-1)[3] = value
    return name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("importance", LAYERS)
def test_no_layer_is_chosen_among_weights_that_are_not_finite(importance, value):
    model = make("llama")
    name = spoil(model, value)
    settings = PruningConfig(ratio=0.3, granularity="layer", importance=importance, reconstruct=False)
    for work in (prune, plan):
        with pytest.raises(DataError, match=rf"layers\.1\.{name}.*of them finite"):
            work(model, settings, batches("llama"))
    assert prune(make("llama"), settings, batches("llama")).config.num_hidden_layers == 2


def test_a_plan_is_not_carried_out_on_such_weights():
    model, cut = make("bert"), PruningPlan(layers={"encoder": (0, 2)})
    assert prune(model, plan=cut).config.num_hidden_layers == 2
    spoil(model, float("nan"), layer=2)
    with pytest.raises(DataError, match=r"encoder\.layer\.2\."):
        prune(model, plan=cut)


@torch.no_grad()
def overflow(model, layer: int) -> None:
    """Finite weights whose products are not."""
    layers = Anatomy.of(model).stacks[0].layers
    for parameter in layers[layer].parameters():
        parameter.fill_(3e38)


@pytest.mark.parametrize("score", [loss, block_influence])
def test_a_layer_whose_states_overflow_is_named(score):
    model = make("llama")
    overflow(model, 1)
    with pytest.raises(DataError, match=r"layer 1 of the decoder"):
        score(Anatomy.of(model), batches("llama"))


def test_reconstruction_names_the_linear():
    model = make("llama")
    asked, data = PruningPlan({"decoder": (0, 1)}, config=PruningConfig()), batches("llama") * 3
    overflow(model, 2)
    with pytest.raises(DataError, match="The answer of the model"):
        prune(model, plan=asked, calibration=data)
    model = make("llama")
    cutter = Cutter(Anatomy.of(model), PruningConfig(), data)
    assert cutter.weights
    overflow(model, 1)
    with pytest.raises(DataError, match=r"What model\.layers\.1\.self_attn\.o_proj reads"):
        cutter.cut(asked)


FAULTS = {
    "beyond the vocabulary": ("bert", "input_ids", lambda x: x + 40, r"input_ids hold numbers from 40 to .* 0 to 39"),
    "below zero": ("bert", "input_ids", lambda x: x - 1, r"input_ids hold numbers from -1"),
    "floats": ("bert", "input_ids", lambda x: x.float(), "input_ids has the dtype torch.float32"),
    "no rows": ("bert", "input_ids", lambda x: x[:0], "is empty"),
    "no tokens": ("bert", "input_ids", lambda x: x[:, :0], "is empty"),
    "one dimension": ("bert", "input_ids", lambda x: x[0], "2 dimensions are needed"),
    "too long": ("bert", "input_ids", lambda x: x.repeat(1, 9), "has 81 tokens|They must be alike"),
    "a mask of another length": ("bert", "attention_mask", lambda x: x[:, 1:], "They must be alike"),
    "a mask of other rows": ("bert", "attention_mask", lambda x: x[1:], "attention_mask has 2 rows"),
    "padding": ("llama", "attention_mask", torch.zeros_like, "padding only, by its attention_mask"),
    "types": ("bert", "token_type_ids", lambda _: torch.full((3, 9), 2), "token_type_ids hold numbers from 2 to 2"),
    "positions": ("bert", "position_ids", lambda _: torch.full((3, 9), 32), "position_ids hold numbers from 32"),
    "decoder ids": ("t5", "decoder_input_ids", lambda _: torch.full((3, 7), 40), "decoder_input_ids hold numbers"),
    "classes": ("bert", "labels", lambda x: x + 1, "labels hold numbers from 1 to 3; allowed are 0 to 2"),
    "short classes": ("bert", "labels", lambda x: x.int(), r"labels have the dtype torch.int32.*long\(\)"),
    "classes of images": ("vit", "labels", lambda x: x - 7, "labels hold numbers from -7"),
    "tokens": ("llama", "labels", lambda x: x.masked_fill(x >= 0, 500), "labels hold numbers from 500"),
    "no answer": ("t5", "labels", lambda x: torch.full_like(x, -100), "padding only, by its labels"),
    "float tokens": ("t5", "labels", lambda x: x.float(), "torch.int64"),
    "pixels of bytes": ("vit", "pixel_values", lambda x: x.byte(), "pixel_values has the dtype torch.uint8"),
    "pixels of nan": ("vit", "pixel_values", lambda x: x / 0, "not finite"),
    "pixels without rows": ("vit", "pixel_values", lambda x: x[0], "4 dimensions are needed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_batches_that_the_model_cannot_read(fault):
    case, name, change, words = FAULTS[fault]
    model, good = make(case), batches(case, 3)
    wrong = good[1] | {name: change(good[1].get(name))}
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(DataError, match=f"(?s)Calibration batch 1.*({words})"):
        prune(model, PruningConfig(ratio=0.4, round_to=4), [good[0], wrong, good[2]])
    assert len(calibration.check_calibration(Anatomy.of(model), good)) == 3


@pytest.mark.parametrize("importance", ["fisher", "taylor", "obs", "activation"])
def test_labels_beyond_the_classes_reach_no_importance(importance):
    model, wrong = make("bert"), batch("bert") | {"labels": torch.tensor([0, 2, 9])}
    asked = PruningConfig(ratio=0.4, importance=importance, round_to=4)
    for work in (prune, plan):
        with pytest.raises(DataError, match="Calibration batch 2: labels"):
            work(model, asked, [*batches("bert"), wrong])
    with pytest.raises(DataError, match="Calibration batch 0: labels"):
        prune(model, plan=plan(model, asked, batches("bert")), calibration=[wrong])


def test_labels_that_nobody_gave_are_allowed():
    given, bert = batch("llama"), Anatomy.of(make("bert"))
    labels = given["labels"].index_fill(1, torch.tensor([4]), -100)
    check_batches(Anatomy.of(make("llama")), [given | {"labels": labels}])
    check_batches(bert, [batch("bert") | {"labels": torch.tensor([0, -100, 1])}])
    with pytest.raises(DataError, match="from -101"):
        check_batches(bert, [batch("bert") | {"labels": torch.tensor([0, -101, 1])}])


def test_numbers_where_numbers_are_learned():
    torch.manual_seed(0)
    model = CASES["bert"].make(num_labels=1)
    check_batches(Anatomy.of(model), [batch("bert") | {"labels": torch.tensor([0.5, 2.0, -9.0])}])
    with pytest.raises(DataError, match=r"regression.*float"):
        check_batches(Anatomy.of(model), [batch("bert")])


def test_ids_without_a_mask_are_no_padding_if_one_is_real():
    model, ids = make("llama"), torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(DataError, match="padding only, by its input_ids"):
        check_batches(Anatomy.of(model), [{"input_ids": ids}])
    ids[1, 3] = 7
    check_batches(Anatomy.of(model), [{"input_ids": ids}])


@pytest.mark.parametrize("wrong", [5, "rows.csv", 3.5])
def test_what_gives_no_batches(wrong):
    with pytest.raises(DataError, match="calibration must give batches"):
        prune(make("bert"), config(ratio=0.4), wrong)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_inputs_of_every_family_are_read(name):
    inputs = make_inputs(name)
    check_batches(Anatomy.of(make_model(name)), [inputs])
    key = next(key for key in inputs if key in ("input_ids", "decoder_input_ids", "pixel_values", "input_features"))
    with pytest.raises(DataError, match=f"Calibration batch 1.*{key}"):
        check_batches(Anatomy.of(make_model(name)), [inputs, inputs | {key: inputs[key].to(torch.uint8)}])


@pytest.mark.parametrize("kept", [[5000, 70000], [0, 0], [2, 1], [-1, 0], [0, 10**400], [0.5, 1], list(range(1025))])
def test_kept_layers_that_cannot_be(kept):
    good = EfficientBlock(kept_layers={"encoder": (0, 5)}).to_dict()
    assert EfficientBlock.from_dict(good).kept_layers == {"encoder": (0, 5)}
    with pytest.raises(ConfigError, match=r"efficient\.kept_layers\.encoder") as told:
        EfficientBlock.from_dict(good | {"kept_layers": {"encoder": kept}})
    assert len(str(told.value)) < 400


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 200])
def test_a_state_of_pruning_that_cannot_be_read(content, tmp_path):
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=STATE_FILE):
        read_state(tmp_path / STATE_FILE)
    with pytest.raises(CheckpointError, match="is missing"):
        read_state(tmp_path / "other")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_of_a_training_run_are_finite(value):
    settings = Gradual(PruningConfig(ratio=0.2, importance="movement", round_to=4))
    removal, model = UnitRemoval(Anatomy.of(make("bert")), settings), make("bert")
    removal.raise_to(model, 0.1)
    group = list(removal.scores)[2]
    removal.scores[group][1] = value
    with pytest.raises(DataError, match=f"movement score of {group.name}"):
        removal.raise_to(model, 0.2)


def test_measuring_what_has_no_weights():
    with torch.device("meta"):
        empty = CASES["bert"].make()
    for wrong, words in ((None, "got NoneType"), ("bert", "got str"), (empty, "meta device")):
        with pytest.raises(UnsupportedModelError, match=words):
            measure(wrong)
        if wrong is not None:  # no baseline
            with pytest.raises(UnsupportedModelError, match=words):
                measure(make("bert"), baseline=wrong)


@pytest.mark.parametrize("wrong", [None, "google-bert/bert-base-uncased", torch.nn.Linear(2, 2)])
def test_what_is_no_model(wrong):
    is_name = isinstance(wrong, str)
    with pytest.raises(
        ConfigError if is_name else UnsupportedModelError, match=r"load it|A transformers model is needed"
    ):
        prune(wrong, config(ratio=0.4))
    if not is_name:  # that is a name to load a config by
        with pytest.raises(UnsupportedModelError, match="A transformers model is needed"):
            plan(wrong, config(ratio=0.4))


def test_what_is_no_config_or_plan():
    for given, words in (({"config": 0.5}, "PruningConfig"), ({"plan": {"layers": {}}}, "PruningPlan")):
        with pytest.raises(ConfigError, match=f"must be a {words}"):
            prune(make("bert"), **given)
    with pytest.raises(ConfigError, match="must be a PruningConfig"):
        plan(make("bert"), None)


def test_a_model_without_weights_has_a_plan_and_nothing_to_prune():
    with torch.device("meta"):
        model = CASES["bert"].make()
    assert not plan(model, config(ratio=0.4)).chosen
    part = make("bert")
    part.bert.encoder.layer[1].output.dense.to("meta")
    for wrong in (model, part):
        with pytest.raises(UnsupportedModelError, match="meta device"):
            prune(wrong, config(ratio=0.4))


@pytest.fixture
def doubles():
    def switch():
        torch.set_default_dtype(torch.float64)

    yield switch
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("case", "importance"), [*(("bert", name) for name in UNITS), ("t5", "fisher")])
def test_the_default_dtype_makes_no_difference(case, importance, doubles):
    dense, data = make(case), batches(case) * 3
    asked = PruningConfig(ratio=0.4, importance=importance, round_to=4)
    one = plan(dense, asked, data)
    expected = prune(dense, plan=one, calibration=data)
    doubles()
    two = plan(dense, asked, data)
    small = prune(dense, plan=two, calibration=data)
    assert small.dtype == torch.float32
    assert two.forecast.parameters <= two.forecast.parameters_before == one.forecast.parameters_before
    if importance != "random":  # whose noise has other values in other precision
        for name, value in expected.state_dict().items():
            assert torch.equal(value, small.state_dict()[name]), name


@pytest.mark.parametrize("granularity", [("head", "neuron"), ("layer",), ("weight",)])
def test_inference_mode_makes_no_difference(granularity):
    dense, data = make("bert"), batches("bert") * 3
    asked = PruningConfig(ratio=0.4, granularity=granularity, round_to=4)
    expected = prune(dense, asked, data)
    with torch.inference_mode():
        inside = [{name: value.clone() for name, value in one.items()} for one in data]
        small = prune(dense, asked, inside)
    assert torch.equal(logits(small, data[0]), logits(expected, data[0]))
    assert not any(parameter.is_inference() for parameter in small.parameters())
    with torch.inference_mode():
        made = copy.deepcopy(dense)
    with pytest.raises(UnsupportedModelError, match="inference_mode"):
        prune(made, asked, data)


def test_without_batches_the_length_is_one_that_the_model_takes():
    short = make("bert")  # of 32 positions
    assert calibration.fitting_length([], short) == 32 < calibration.fitting_length([], make("t5"))
    assert calibration.fitting_length([], make("vit")) == 5 and calibration.fitting_length(batches("bert"), short) == 7
    assert plan(short, config(ratio=0.4)).forecast.length == 32
