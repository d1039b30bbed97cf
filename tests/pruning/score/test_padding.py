"""Scores of units, weights and layers belong to the calibration texts: not to how far these are padded, to the side,
or to how they are cut into batches. In float64."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    LlamaForTokenClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from hf_efficient.models.anatomy import Anatomy
from hf_efficient.pruning.cut.linears import find_linears
from hf_efficient.pruning.methods import IMPORTANCES, LAYER_IMPORTANCES, WEIGHT_IMPORTANCES
from hf_efficient.pruning.score.calibration import model_loss, token_mask
from hf_efficient.pruning.score.linear_inputs import collect

from ..tiny import HIDDEN, LABELS, NEURONS, VOCABULARY, gpt2, llama, t5

LENGTHS = [7, 3, 9, 5, 4, 8, 6, 2]
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_attention_heads": 4, "intermediate_size": NEURONS}


def labelled_llama(layers: int):
    config = llama(layers).config
    config.num_labels, config.classifier_dropout = LABELS, 0.0
    return LlamaForTokenClassification(config)


def modernbert(layers: int):
    return ModernBertForMaskedLM(ModernBertConfig(**SIZES, **SPECIAL, num_hidden_layers=layers, local_attention=4))


def answering(layers: int):
    return BertForQuestionAnswering(BertConfig(**SIZES, num_hidden_layers=layers, max_position_embeddings=32))


def bart(head):
    sizes = {"encoder_ffn_dim": NEURONS, "decoder_ffn_dim": NEURONS, "d_model": HIDDEN, "num_labels": LABELS}
    counts = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    counts |= dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    return head(BartConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes, **counts))


# name -> (make, sides): BERT and BART have positions that are learned and counted from the first column.
MODELS = {
    "llama": (llama, ("right", "left")),
    "gpt2": (gpt2, ("right", "left")),
    "llama tokens": (labelled_llama, ("right", "left")),
    "modernbert": (modernbert, ("right", "left")),
    "t5": (lambda layers: t5(layers, layers), ("right", "left")),
    "answers": (answering, ("right",)),
    "bart classifier": (lambda layers: bart(BartForSequenceClassification), ("right",)),
}


def make(name: str):
    torch.manual_seed(0)
    model = MODELS[name][0](2).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


def rows_of(name: str, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    if name == "answers":
        spans = [{"start_positions": i % 2, "end_positions": len(text) - 1} for i, text in enumerate(texts)]
        return [{"input_ids": text} | span for text, span in zip(texts, spans, strict=True)]
    if name == "bart classifier":  # which reads the state of the one end token
        return [{"input_ids": [*text, 2], "labels": i % LABELS} for i, text in enumerate(texts)]
    labels = texts[::-1] if name == "t5" else texts
    if name == "llama tokens":
        labels = [[token % LABELS if i else -100 for i, token in enumerate(text)] for text in texts]
    return [{"input_ids": text, "labels": own} for text, own in zip(texts, labels, strict=True)]


def batches_of(rows, side: str, width: int, size: int, labels: bool = True):
    """Garbage under the padding, since nobody may read it."""
    made = []
    for start in range(0, len(rows), size):
        chosen, batch = rows[start : start + size], {}
        for name in chosen[0]:
            values = [row[name] for row in chosen]
            if isinstance(values[0], list):
                values = _padded(values, -100 if name == "labels" else 7, side, width)
            batch[name] = torch.tensor(values)
        mask = _padded([[1] * len(row["input_ids"]) for row in chosen], 0, side, width)
        batch["attention_mask"] = torch.tensor(mask)
        made.append(batch if labels else {name: value for name, value in batch.items() if name != "labels"})
    return made


def _padded(values, padding, side, width):
    longest = max([width, *map(len, values)])
    spare = [[padding] * (longest - len(value)) for value in values]
    return [first + last for first, last in (zip(spare, values) if side == "left" else zip(values, spare))]  # noqa: B905


def paddings(name: str):
    sides = MODELS[name][1]
    return [(side, width, size) for side in sides for width, size in ((0, 1), (16, 3), (30, 8))]


def all_equal(found: list[dict], other: dict, rtol: float = 1e-9) -> None:
    first = found[0]
    for scores in found[1:]:
        assert scores.keys() == first.keys()
        for key, value in first.items():
            scale = float(value.abs().max())
            assert scale > 0 and float((scores[key] - value).abs().max()) <= rtol * scale, key
    assert any(not torch.allclose(other[key].double(), first[key].double(), rtol=1e-3) for key in first)


@pytest.mark.cover
@pytest.mark.parametrize("importance", ["fisher", "taylor", "obs", "activation"])
@pytest.mark.parametrize("name", MODELS)
def test_unit_scores_do_not_depend_on_padding(name, importance):
    model = make(name)
    groups = Anatomy.of(model).groups

    def scores(rows, *padding):
        batches = batches_of(rows, *padding)
        found = IMPORTANCES[importance](model, groups, batches=batches, length=6, seed=3)
        return {group.name: values for group, values in found.items()}

    found = [scores(rows_of(name), *padding) for padding in paddings(name)]
    all_equal(found, scores(rows_of(name, 1), "right", 0, 8), 1e-6 if importance == "activation" else 1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "modernbert", "llama tokens"])
def test_pseudo_labels_are_of_real_tokens(name):
    model = make(name)

    def losses(rows, *padding):
        batches = batches_of(rows, *padding, labels=False)
        return {"loss": sum(model_loss(model, batch) for batch in batches).detach()}

    found = [losses(rows_of(name), *padding) for padding in paddings(name)]
    all_equal(found, losses(rows_of(name, 1), "right", 0, 8))


@pytest.mark.cover
@pytest.mark.parametrize("importance", LAYER_IMPORTANCES)
@pytest.mark.parametrize("name", MODELS)
def test_layer_scores_do_not_depend_on_padding(name, importance):
    anatomy = Anatomy.of(make(name))
    found = [
        {key: torch.tensor(value) for key, value in scores.items()}
        for scores in (
            LAYER_IMPORTANCES[importance](anatomy, batches_of(rows_of(name), *padding)) for padding in paddings(name)
        )
    ]
    for scores in found[1:]:
        assert scores.keys() == found[0].keys()
        for key, value in found[0].items():
            assert float(scores[key]) == pytest.approx(float(value), rel=1e-5, abs=1e-6)  # cosines are in float32


@pytest.mark.parametrize("name", MODELS)
def test_what_linears_read_does_not_depend_on_padding(name):
    """The sums that `activation` and `obs` of single weights are made of."""
    model = make(name)
    linears = find_linears(Anatomy.of(model))

    def grams(rows, *padding):
        return collect(model, linears, batches_of(rows, *padding), lambda read: read.T @ read)

    found = [grams(rows_of(name), *padding) for padding in paddings(name)]
    all_equal(found, grams(rows_of(name, 1), "right", 0, 8))


@pytest.mark.cover
@pytest.mark.parametrize("importance", ["taylor", "fisher", "activation"])
@pytest.mark.parametrize("name", ["llama", "t5", "answers", "bart classifier"])
def test_weight_scores_do_not_depend_on_padding(name, importance):
    """In the same batches: they are sums over batches by definition."""
    model = make(name)
    linears = find_linears(Anatomy.of(model))

    def scores(rows, side, width):
        batches = batches_of(rows, side, width, 3)
        return WEIGHT_IMPORTANCES[importance](model, linears, batches=batches, seed=0)

    found = [scores(rows_of(name), side, width) for side in MODELS[name][1] for width in (0, 20)]
    all_equal(found, scores(rows_of(name, 1), "right", 0))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_of_labels_is_that_of_rows_alone(name):
    """The model's own of each row without padding, summed; of the padded batch it would be another."""
    model = make(name)
    rows = rows_of(name)
    [batch] = batches_of(rows, "left", 0, 8)
    alone = [model(input_ids=ids, labels=ids).loss for ids in (torch.tensor([row["input_ids"]]) for row in rows)]
    assert model_loss(model, batch).item() == pytest.approx(sum(alone).item(), rel=1e-6)
    assert model_loss(model, batch).item() != pytest.approx(8 * model(**batch).loss.item(), rel=1e-4)


def test_one_definition_of_the_tokens_of_a_decoder():
    """Of a classifier: those whose token and the next are real. Of one that writes: its labels, moved to the front."""
    like = torch.zeros(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch = {"input_ids": torch.full((2, 5), 4), "attention_mask": mask, "labels": torch.tensor([0, 1])}
    classifier = bart(BartForSequenceClassification)
    assert torch.equal(token_mask(batch, classifier, "decoder", like), mask.to(like))
    turned = batch | {"attention_mask": mask.flip(1)}
    assert token_mask(turned, classifier, "decoder", like)[0].tolist() == [0, 0, 0, 1, 1]
    labels = torch.tensor([[-100, -100, 5, -100, 6], [5, 6, 7, 8, 9]])
    writes = bart(BartForConditionalGeneration)
    assert token_mask(batch | {"labels": labels}, writes, "decoder", like)[0].tolist() == [1, 0, 1, 0, 0]
    given = batch | {"labels": labels, "decoder_attention_mask": mask.flip(0)}
    assert torch.equal(token_mask(given, writes, "decoder", like), mask.flip(0).to(like))
