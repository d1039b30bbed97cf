"""The stage that drops tokens which the training texts do not have.

- vocabulary: {max_tokens: 8000}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .base import Run, Stage
from .settings import integer, number, read

if TYPE_CHECKING:
    from ..reporting.schema import StageRecord

COUNTING = "causal-lm"  # whose score counts tokens
TASKS = ("text-classification", "sentence-embeddings", "reranking", COUNTING)
COMMON = {COUNTING: 0.5}  # `common_share`: what a language model writes is broader than the texts that it is shown


@dataclass(frozen=True)
class VocabularyStage(Stage):
    """`prune_vocabulary(model, tokenizer, texts)` with the training texts.

        - vocabulary: {}
        - vocabulary: {max_tokens: 8000}                 # the most frequent, exact for texts that have no others
        - vocabulary: {common_share: 0.5}                # and the first half of the ids, whatever the texts have

    It is the first stage, or the last before `quantize` and `export`. As the first one it changes the teacher as well,
    so that teacher and student read the same ids while distilling; the report still compares with the original. A
    language model's perplexity counts the tokens of the original tokenizer, so that both numbers mean the same; there
    it must be the first.

    `common_share`: ids of BPE and Unigram tokenizers go from common tokens to rare ones in what they were made from;
    by default none, for a language model 0.5.
    """

    followers = ("quantize", "export")
    reason = "teacher and student read the same token ids until then; as the first stage it would change those of both"
    may_begin = True
    new_tokenizer = True

    max_tokens: int | None = integer(None, 1, 1 << 24, optional=True)
    common_share: float | None = number(None, 0, 1, optional=True)

    @classmethod
    def read(cls, section: Any, path: str, task: str | None = None) -> "VocabularyStage":
        given = dict(section) if isinstance(section, Mapping) else section
        if task in COMMON and isinstance(given, dict) and "max_tokens" not in given:
            given.setdefault("common_share", COMMON[task])
        stage = read(cls, given, path)
        if stage.max_tokens is not None and stage.common_share:
            raise ConfigError(
                f"{path} has max_tokens, the most frequent tokens of the texts, and common_share, which keeps others. "
                "Give one of them."
            )
        return stage

    def to_dict(self) -> dict[str, Any]:
        """What is given, or usual for the task."""
        return {name: value for name, value in super().to_dict().items() if value is not None}

    def check_task(self, path: str, task: str) -> None:
        if task not in TASKS:
            raise ConfigError(
                f"{path} needs one of the tasks {', '.join(TASKS)}, got {task!r}, whose score does not allow for "
                "other tokens. Call prune_vocabulary(model, tokenizer, texts) on the result."
            )

    def check(self, path: str, run: Run, config: Any, before: Sequence[Stage]) -> Any:
        from ..pruning.cut.tokenizer import check_tokenizer

        check_tokenizer(run.processor)
        if run.recipe.task == COUNTING and before[1:]:  # after the teacher
            raise ConfigError(
                f"{path}: of a language model tokens leave first, so that what follows is chosen and trained with "
                "those that stay. Move it to the front."
            )
        return config

    def run(self, run: Run, source: Path, target: Path) -> dict[str, Any]:
        from ..models.loading import load_processor
        from ..pruning.cut.vocabulary import prune_vocabulary

        model, tokenizer = run.load(source), load_processor(str(source), images=False)
        common = range(int((self.common_share or 0) * len(tokenizer)))
        texts = run.texts("text", "text_pair")
        small, short = prune_vocabulary(model, tokenizer, texts, keep=common, max_tokens=self.max_tokens)
        facts = {"tokens_before": len(tokenizer), "tokens_after": len(short)}
        facts |= {"parameters_before": model.num_parameters(), "parameters_after": small.num_parameters()}
        reader = run.reading(short)
        reader.data(config=small.config)  # raises where the test texts have become too long for it
        return facts | reader.save(small, target)

    def note(self, record: "StageRecord") -> tuple[str, ...]:
        before, after = record.facts["tokens_before"], record.facts["tokens_after"]
        which = "the most frequent" if self.max_tokens else "those"
        more = f", and of the most common {self.common_share:.0%}" if self.common_share else ""
        return (
            f"The tokenizer has {after:,} of {before:,} tokens, {which} of the training texts{more}: use the one that "
            "lies beside the model. Other texts are spelled in more pieces.",
        )
