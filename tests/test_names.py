"""A name is one entry: the light lists that configs check against are those of the tables that carry the work."""

from hf_efficient.conversion.positions import METHODS, ROPE
from hf_efficient.pipeline.runners import RUNNERS
from hf_efficient.recipes import settings
from hf_efficient.recipes.stages import STAGES


def test_every_way_to_more_positions_is_known():
    assert tuple(METHODS) == settings.POSITION_METHODS and settings.ROPE == ROPE


def test_every_stage_can_run():
    assert set(STAGES) == set(RUNNERS)
