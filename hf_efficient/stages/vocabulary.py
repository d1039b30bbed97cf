"""The stage that drops tokens which the training texts do not have.

- vocabulary: {max_tokens: 8000}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .base import Run, Stage
from .settings import integer

if TYPE_CHECKING:
    from ..reporting.schema import StageRecord


@dataclass(frozen=True)
class VocabularyStage(Stage):
    """`prune_vocabulary(model, tokenizer, texts)` with the training texts; the last stage, of a text classifier.

        - vocabulary: {}
        - vocabulary: {max_tokens: 8000}                 # the most frequent, exact for texts that have no others

    Last, since teacher and student read the same ids while distilling; a classifier, since the scores of other tasks
    count tokens, and there would be others.
    """

    followers = ("quantize", "export")
    reason = "teacher and student read the same token ids until then"
    new_tokenizer = True

    max_tokens: int | None = integer(None, 1, 1 << 24, optional=True)

    def to_dict(self) -> dict[str, Any]:
        """`max_tokens` only where it is given."""
        return {} if self.max_tokens is None else super().to_dict()

    def check_task(self, path: str, task: str) -> None:
        if task != "text-classification":
            raise ConfigError(
                f"{path} needs task text-classification, got {task!r}, whose score does not allow for other tokens. "
                "Call prune_vocabulary(model, tokenizer, texts) on the result."
            )

    def check(self, path: str, run: Run, config: Any, before: Sequence[Stage]) -> Any:
        from ..pruning.cut.tokenizer import check_tokenizer

        check_tokenizer(run.processor)
        return config

    def run(self, run: Run, source: Path, target: Path) -> dict[str, Any]:
        from ..models.loading import load_processor
        from ..pruning.cut.vocabulary import prune_vocabulary

        model, tokenizer = run.load(source), load_processor(str(source), images=False)
        texts = run.texts("text", "text_pair")
        small, short = prune_vocabulary(model, tokenizer, texts, max_tokens=self.max_tokens)
        facts = {"tokens_before": len(tokenizer), "tokens_after": len(short)}
        facts |= {"parameters_before": model.num_parameters(), "parameters_after": small.num_parameters()}
        return facts | run.reading(short).save(small, target)

    def note(self, record: "StageRecord") -> tuple[str, ...]:
        before, after = record.facts["tokens_before"], record.facts["tokens_after"]
        which = "the most frequent" if self.max_tokens else "those"
        return (
            f"The tokenizer has {after:,} of {before:,} tokens, {which} of the training texts: use the one that lies "
            "beside the model. Other texts are spelled in more pieces.",
        )
