"""A tiny setting of every attention kind: small enough that none of them covers a whole test input.

for name, config in TINY.items(): ...
TINY_JOBS                                  # every family of COMMON with every setting that it can take
"""

from hf_efficient import AttentionConfig
from hf_efficient.attention.registry import ATTENTIONS
from hf_efficient.models.families import FAMILIES

TINY = {
    "local": AttentionConfig("local", window=2),
    "local-global": AttentionConfig("local", window=2, global_tokens=1),
    "strided": AttentionConfig("strided", block_size=2, num_blocks=2, global_tokens=1),
    "lsh": AttentionConfig("lsh", block_size=2, num_hashes=2, num_buckets=4),
    "topk": AttentionConfig("topk", block_size=2, top_k=3),
    "linear-elu": AttentionConfig("linear"),
    "linear-relu": AttentionConfig("linear", feature_map="relu"),
    "linear-favor": AttentionConfig("linear", feature_map="favor", feature_dim=6),
    "linear-hedgehog": AttentionConfig("linear", feature_map="hedgehog"),
    "local_linear": AttentionConfig("local_linear", window=2, feature_map="hedgehog"),
    "additive": AttentionConfig("additive"),
    "kernel": AttentionConfig("kernel", feature_dim=4),
    "kernel-positions": AttentionConfig("kernel", feature_dim=0),
}

COMMON = ("bert", "vit", "llama", "t5", "gpt2", "bart")


def fits(family: str, config: AttentionConfig) -> bool:
    """T5 needs a kind with a place for its relative position bias."""
    return FAMILIES[family].relative_bias is None or ATTENTIONS[config.kind].takes_bias


TINY_JOBS = [(family, name) for family in COMMON for name, config in TINY.items() if fits(family, config)]
