"""A name is one entry: the light lists that configs check against are those of the tables that carry the work."""

from hf_efficient.attention import config as attention
from hf_efficient.attention.engines.feature_maps import FEATURE_MAPS
from hf_efficient.attention.registry import ATTENTIONS
from hf_efficient.data.preparation import TASKS
from hf_efficient.measurement.quality import TASKS as SCORED
from hf_efficient.pruning import config as pruning
from hf_efficient.pruning.gradual.schedule import SCHEDULES
from hf_efficient.pruning.score.layers import LAYER_IMPORTANCES
from hf_efficient.pruning.score.units import IMPORTANCES
from hf_efficient.pruning.score.weights import WEIGHT_IMPORTANCES, WEIGHTS_NEED_DATA


def test_every_attention_kind_has_a_variant():
    assert set(attention.KINDS) == {"full", *ATTENTIONS}
    assert set(attention.FEATURE_MAPS) == set(FEATURE_MAPS)


def test_every_criterion_and_schedule_has_a_function():
    assert set(pruning.IMPORTANCES) == set(IMPORTANCES) and set(pruning.LAYER_IMPORTANCES) == set(LAYER_IMPORTANCES)
    assert set(pruning.WEIGHT_IMPORTANCES) == {*WEIGHT_IMPORTANCES, "obs"} > set(WEIGHTS_NEED_DATA)
    assert set(pruning.SCHEDULES) == set(SCHEDULES)


def test_every_task_can_be_scored():
    assert set(TASKS) == set(SCORED)
