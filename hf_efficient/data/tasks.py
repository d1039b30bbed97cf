"""The table of tasks: what each reads, which model answers, how the answer is scored, and what a card says of it.

    TASKS["causal-lm"].auto_class                                    # "AutoModelForCausalLM"
    TASKS["entailment"] = replace(TASKS["text-classification"], columns=("text", "text_pair", "label"), optional=())

Everything else asks this table, so a task is one entry of it, and a column of a new kind one of `ROLES`.
Light to import: neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import images, media, text


@dataclass(frozen=True)
class Role:
    """What a column is for; it can be named as `<role>_column`.

    Fields:
        usual: the names that are tried, in this order, where it is not named.
        help: what the flag says.
        is_rare: recipes write it only where it is given.
    """

    usual: tuple[str, ...] = ()
    help: str = "Default: found by its usual names."
    is_rare: bool = False


ROLES: dict[str, Role] = {
    "text": Role(("text", "sentence", "content")),
    "text_pair": Role(help="Second text of a pair, if there is one."),
    "label": Role(("label", "labels", "category")),
    "target": Role(("target", "summary", "output"), "Output text of seq2seq."),
    "image": Role(("image", "img")),
    "audio": Role(("audio", "sound", "speech"), "Paths, or sounds, for automatic-speech-recognition.", is_rare=True),
    "tokens": Role(("tokens", "words"), "Lists of words, for token-classification.", is_rare=True),
    "question": Role(("question",), "For question-answering.", is_rare=True),
    "context": Role(("context",), "The text that holds the answer.", is_rare=True),
    "answers": Role(("answers", "answer"), "The answers, in the layout of SQuAD.", is_rare=True),
}


def column_name(role: str) -> str:
    """The argument, recipe key and flag that names the column of a role."""
    return f"{role}_column"


@dataclass(frozen=True)
class Task:
    """What a task needs of data and model, and how its answers are read.

    Fields:
        columns: the roles that it reads. optional: those that it reads where they are named.
        auto_class: the Auto class that loads its model.
        kind: what is a target: `examples` (a class for each), `tokens` (a label for each token), `causal_lm` (the
            next token), `spans` (the first and the last token of an answer), `embeddings` (no head: pairs of texts),
            `scores` (a number for each pair of texts), `ctc` (a text, whose tokens come in their order at times of
            their own).
        metric: the main score: accuracy, perplexity, wer (word error rate of what is heard), or the one of its kind.
        tokenize, tokenize_test: a batch of rows to model inputs; the second for the test split, default the first.
        collate: processor -> what pads a list of samples into a batch.
        reads: the part of an AutoProcessor that reads beside its tokenizer: `image_processor` or `feature_extractor`;
            empty where a tokenizer, or for images alone an image processor, is all there is.
        needs: of a tokenizer: `mask_token`, `offsets`, `right_padding`.
        heads: endings of the names of its model classes, beside the one that the Auto class says.
        usual: names that are tried for a role in the place of those of `ROLES`.
        group: the role whose equal values belong together: such rows are never cut apart into train and test.
        trains: whether there are labels, so that a teacher can be fine-tuned.
        losses: what is distilled where nothing is said; None: what the settings of distillation say.
        hub_name: the Hub's name of it, where that is another.
        sample, call: for the reader of a card: what the processor is given, and lines that call the model on `inputs`.
    """

    columns: tuple[str, ...]
    auto_class: str
    kind: str
    metric: str
    tokenize: Callable[..., dict]
    collate: Callable[[Any], Callable]
    tokenize_test: Callable[..., dict] | None = None
    optional: tuple[str, ...] = ()
    reads: str = ""
    needs: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    usual: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    group: str | None = None
    trains: bool = True
    losses: Mapping[str, float] | None = None
    hub_name: str | None = None
    sample: str = '"A text of your own."'
    call: tuple[str, ...] = ("print(model(**inputs).logits)",)

    @property
    def is_of_images(self) -> bool:
        """Whether it reads images alone."""
        return "image" in self.columns and not self.reads

    @property
    def has_lengths(self) -> bool:
        """Whether its rows are texts of their own lengths; those of language models are blocks of one length."""
        return not self.reads and not self.is_of_images and self.tokenize not in (text.continue_text, text.fill)

    @property
    def processor_class(self) -> str:
        """The Auto class of what prepares its inputs."""
        return "AutoProcessor" if self.reads else "AutoImageProcessor" if self.is_of_images else "AutoTokenizer"

    @property
    def roles(self) -> tuple[str, ...]:
        """All that may be named, as `<role>_column`."""
        return self.columns + self.optional

    def names(self, role: str, given: str | None = None) -> tuple[str, ...]:
        """Those that are tried for the column of a role: the given one alone, if there is one."""
        return (given,) if given is not None else self.usual.get(role) or ROLES[role].usual

    def reading(self, text_column: str | None, label_column: str | None) -> dict[str, Any]:
        """How `load_dataset_any` has to read and split its rows, where these columns are named."""
        return {
            "label_column": label_column,
            "group_names": () if self.group is None else self.names(self.group, text_column),
            "stratify": self.has_classes or label_column is None,
        }

    @property
    def has_classes(self) -> bool:
        """Whether its labels are classes."""
        return "label" in self.columns and self.kind != "scores"

    @property
    def is_by_token(self) -> bool:
        """Whether every token is a target."""
        return self.kind in ("tokens", "causal_lm")

    @property
    def class_endings(self) -> tuple[str, ...]:
        """How the names of its model classes end; none for embeddings, whose models have no head."""
        ending = self.auto_class.removeprefix("AutoModel")
        return (ending, *self.heads) if ending else self.heads


CLASS_NAME = ("print(model.config.id2label[model(**inputs).logits.argmax().item()])",)
GENERATED = ("tokens = model.generate(**inputs)", "print(processor.batch_decode(tokens))")

TASKS: dict[str, Task] = {
    "text-classification": Task(
        columns=("text", "label"),
        optional=("text_pair",),
        auto_class="AutoModelForSequenceClassification",
        kind="examples",
        metric="accuracy",
        tokenize=text.classify,
        collate=text.pad_inputs,
        call=CLASS_NAME,
    ),
    "causal-lm": Task(
        columns=("text",),
        auto_class="AutoModelForCausalLM",
        kind="causal_lm",
        metric="perplexity",
        tokenize=text.continue_text,
        collate=text.pad_labels,
        heads=("LMHeadModel",),
        hub_name="text-generation",
        call=GENERATED,
    ),
    "seq2seq": Task(
        columns=("text", "target"),
        auto_class="AutoModelForSeq2SeqLM",
        kind="tokens",
        metric="perplexity",
        tokenize=text.translate,
        collate=text.pad_labels,
        heads=("ForConditionalGeneration",),
        hub_name="text2text-generation",
        call=GENERATED,
    ),
    "image-classification": Task(
        columns=("image", "label"),
        auto_class="AutoModelForImageClassification",
        kind="examples",
        metric="accuracy",
        tokenize=images.images_to_inputs,
        collate=images.stack,
        call=CLASS_NAME,
    ),
    "sentence-embeddings": Task(
        columns=("text",),
        optional=("text_pair", "label"),
        auto_class="AutoModel",
        kind="embeddings",
        metric="retrieval@1",
        tokenize=text.embed,
        tokenize_test=text.embed_test,
        collate=text.pad_inputs,
        trains=False,
        losses={"embedding": 1.0},
        hub_name="sentence-similarity",
    ),
    "reranking": Task(
        columns=("text", "text_pair", "label"),
        usual={
            "text": ("query", "question", "text", "sentence1"),
            "text_pair": ("document", "passage", "answer", "text_pair", "sentence2"),
            "label": ("label", "score", "relevance", "labels"),
        },
        group="text",
        auto_class="AutoModelForSequenceClassification",
        kind="scores",
        metric="ndcg@10",
        tokenize=text.score,
        tokenize_test=text.score_test,
        collate=text.pad_inputs,
        hub_name="text-ranking",
        sample='"A question?", "A text that answers it."',
        call=("print(model(**inputs).logits.item())",),
    ),
    "token-classification": Task(
        columns=("tokens", "label"),
        usual={"label": ("ner_tags", "tags", "labels", "pos_tags")},
        auto_class="AutoModelForTokenClassification",
        kind="tokens",
        metric="accuracy",
        tokenize=text.tag,
        collate=text.pad_labels,
        needs=("offsets",),
        call=("print(model(**inputs).logits.argmax(dim=-1))",),
    ),
    "masked-lm": Task(
        columns=("text",),
        auto_class="AutoModelForMaskedLM",
        kind="tokens",
        metric="perplexity",
        tokenize=text.fill,
        tokenize_test=text.fill_test,
        collate=text.mask_anew,
        needs=("mask_token",),
        hub_name="fill-mask",
    ),
    "question-answering": Task(
        columns=("question", "context", "answers"),
        auto_class="AutoModelForQuestionAnswering",
        kind="spans",
        metric="span_accuracy",
        tokenize=text.answer,
        collate=text.pad_inputs,
        needs=("offsets", "right_padding"),
        sample='"A question?", "A text that answers it."',
        call=("print(model(**inputs).start_logits.argmax().item())",),
    ),
    "image-text-to-text": Task(
        columns=("image", "text", "target"),
        usual={"text": ("text", "question"), "target": ("target", "answer", "output")},
        auto_class="AutoModelForImageTextToText",
        kind="causal_lm",
        metric="perplexity",
        tokenize=media.describe,
        collate=media.Padding,
        reads="image_processor",
        sample='images=image, text="<image> A question?"',
        call=GENERATED,
    ),
    "automatic-speech-recognition": Task(
        columns=("audio", "target"),
        usual={"target": ("text", "sentence", "transcription", "target")},
        auto_class="AutoModelForSpeechSeq2Seq",
        kind="tokens",
        metric="wer",
        tokenize=media.transcribe,
        collate=media.Padding,
        reads="feature_extractor",
        sample="sound, sampling_rate=16_000",
        call=GENERATED,
    ),
    "speech-ctc": Task(
        columns=("audio", "target"),
        usual={"target": ("text", "sentence", "transcription", "target")},
        auto_class="AutoModelForCTC",
        kind="ctc",
        metric="wer",
        tokenize=media.transcribe,
        collate=media.Padding,
        reads="feature_extractor",
        hub_name="automatic-speech-recognition",
        sample="sound, sampling_rate=16_000",
        call=("print(processor.batch_decode(model(**inputs).logits.argmax(-1)))",),
    ),
}
