"""What `scripts/cache_teacher.py` does: a teacher and data in, a folder of its answers out.

run(*read(["--teacher", "out/teacher", "--dataset", "bundled:bbc-news", ...]))
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import PartialState
from transformers.hf_argparser import HfArg

from ...data.preparation import check_labels
from ...distillation.cache.cache import TeacherCache
from ...distillation.cache.write import cache_teacher
from ...errors import ConfigError
from ...training.progress import telling
from ..base import say
from .flags import DataArguments, parse

logger = logging.getLogger(__name__)


@dataclass
class CacheArguments(DataArguments):
    """As for distilling from the cache, where the flags of the data must be the same."""

    output_dir: str = HfArg(default="", help="Folder of the cache; one that was begun is continued.")
    seed: int = HfArg(default=42, help="Of the split, where the data has no test split.")
    batch_size: int = HfArg(default=8, help="Examples that the teacher answers at once.")
    top_k: int | None = HfArg(
        default=None, help="How many logits of each token to keep; language models need it, such as 64."
    )
    sampled: int | None = HfArg(
        default=None, help="Or how many tokens to draw for each: unbiased, for the forward divergence."
    )
    temperature: float = HfArg(default=1.0, help="With top_k or sampled: the temperature of the training.")
    pooling: str = HfArg(default="mean", help="Of sentence-embeddings: mean, cls, last or weighted_mean.")
    hidden_states: list[int] = HfArg(
        default_factory=list, help="Which hidden states to keep for the hidden loss; 0: the embeddings."
    )
    dtype: str | None = HfArg(default=None, help="float16, float32 or float64 on disk.")
    shard_size: int = HfArg(default=1000, help="Examples in one table.")
    use_cpu: bool = HfArg(default=False, help="Also where there is a GPU.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None:
            raise ConfigError("Give teacher, the Hub id or folder of the model whose answers are kept.")
        if not self.output_dir:
            raise ConfigError("Give output_dir, the folder of the cache.")
        if self.task == "masked-lm":
            raise ConfigError("masked-lm has other masks in every epoch, so a cache is of no use.")


def read(words: Sequence[str]) -> CacheArguments:
    """The flags of `scripts/cache_teacher.py`."""
    (script,) = parse(words, (CacheArguments,))
    return script


@telling(say)
def run(script: CacheArguments) -> TeacherCache:
    """Ask the teacher about both splits; raises as `cache_teacher` and `prepare` do."""
    state = PartialState(cpu=script.use_cpu)
    processor = script.load_processor()
    with state.main_process_first():
        data = script.load_data(processor, seed=script.seed)
    teacher = script.load_teacher().to(state.device)
    check_labels(teacher.config, data)
    cache = cache_teacher(
        teacher,
        [data.train, data.test],
        script.output_dir,
        data_collator=data.collator,
        batch_size=script.batch_size,
        top_k=script.top_k,
        sampled=script.sampled,
        temperature=script.temperature,
        pooling=script.pooling,
        hidden_states=script.hidden_states,
        dtype=script.dtype,
        shard_size=script.shard_size,
    )
    logger.info("%d answers in %s.", len(cache), cache.folder)
    return cache
