"""A name is one entry: the light lists that configs check against are those of the tables that carry the work."""

from hf_efficient.attention import config as attention
from hf_efficient.attention.engines.feature_maps import FEATURE_MAPS
from hf_efficient.attention.registry import ATTENTIONS


def test_every_attention_kind_has_a_variant():
    assert set(attention.KINDS) == {"full", *ATTENTIONS}
    assert set(attention.FEATURE_MAPS) == set(FEATURE_MAPS)
