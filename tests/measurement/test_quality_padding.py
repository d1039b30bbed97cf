"""A score belongs to the data: not to how far rows are padded, to the side, or to how many are scored together."""

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from hf_efficient import AttentionConfig, convert_attention
from hf_efficient.measurement.quality import evaluate_quality

from .models import INNER, POSITIONS, VOCABULARY, WIDTH, bert_config, t5

LENGTHS = [9, 4, 6, 7, 3, 8, 5, 12]
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": INNER, "max_position_embeddings": POSITIONS, "pad_token_id": 0}


def llama(head=LlamaForCausalLM):
    return head(LlamaConfig(**SIZES, num_key_value_heads=2))


def gpt2():
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def modernbert():
    special = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return ModernBertForMaskedLM(ModernBertConfig(**SIZES, **special))


MODELS = {
    "causal-lm": llama,
    "causal-lm, learned positions": gpt2,
    "causal-lm, linear attention": lambda: convert_attention(llama(), AttentionConfig("linear")),
    "masked-lm": modernbert,
    "seq2seq": t5,
    "sentence-embeddings": lambda: llama(LlamaModel),
}


def samples(task):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    if task == "sentence-embeddings":
        return [{"input_ids": text, "pair": index // 2} for index, text in enumerate(texts)]
    labels = texts[::-1] if task == "seq2seq" else texts
    if task == "masked-lm":
        labels = [[token if i % 2 else -100 for i, token in enumerate(text)] for text in texts]
    return [{"input_ids": text, "labels": own} for text, own in zip(texts, labels, strict=True)]


def collator(side, width=0):
    def put(value, longest, padding):
        spare = [padding] * (longest - len(value))
        return value + spare if side == "right" else spare + value

    def collate(rows):
        batch = {}
        for name in rows[0].keys() - {"pair"}:
            longest = (
                max(width, *(len(row[name]) for row in rows)) if len(rows) > 1 else max(width, len(rows[0][name]))
            )
            batch[name] = torch.tensor([put(row[name], longest, -100 if name == "labels" else 7) for row in rows])
        ids = batch["input_ids"].shape[1]
        batch["attention_mask"] = torch.tensor([put([1] * len(row["input_ids"]), ids, 0) for row in rows])
        return batch | ({"pair": torch.tensor([row["pair"] for row in rows])} if "pair" in rows[0] else {})

    return collate


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_scores_do_not_depend_on_padding_or_batch_size(name):
    model, task = made(name), name.partition(",")[0]
    data = samples(task)
    found = [
        evaluate_quality(model, data, collator(side, width), task, batch_size=size)
        for side, width, size in [("right", 0, 8), ("right", 40, 3), ("left", 0, 1), ("left", 0, 3), ("left", 40, 8)]
    ]
    first = found[0]
    for other in found[1:]:
        assert torch.equal(other.count, first.count)
        assert torch.equal(other.targets, first.targets) and torch.equal(other.predictions, first.predictions)
        assert torch.allclose(other.loss, first.loss, rtol=1e-5)  # a loss is added up in float32
        assert other.quality.main.value == pytest.approx(first.quality.main.value, rel=1e-6)
    changed = [dict(row) for row in data]
    changed[0]["input_ids"] = changed[0]["input_ids"][::-1]
    assert not torch.allclose(evaluate_quality(model, changed, collator("left"), task).loss, first.loss, rtol=1e-4)


@pytest.mark.parametrize("name", ["causal-lm", "causal-lm, learned positions"])
def test_perplexity_is_that_of_the_rows_alone(name):
    """From the model's own loss of each row without padding, and not from that of the padded batch."""
    model, data = made(name), samples("causal-lm")
    result = evaluate_quality(model, data, collator("left"), batch_size=8)
    alone = []
    with torch.no_grad():
        for row in data:
            ids = torch.tensor([row["input_ids"]])
            alone.append(model(input_ids=ids, labels=ids).loss.double() * (len(row["input_ids"]) - 1))
        stock = model(**collator("left")(data)).loss.double()
    assert torch.allclose(result.loss, torch.stack(alone), rtol=1e-5)
    assert result.count.tolist() == [length - 1 for length in LENGTHS]
    assert result.quality.scores[1].value != pytest.approx(stock.item(), rel=1e-3)


@pytest.mark.parametrize("head", [BertForMaskedLM, BertForTokenClassification])
def test_labels_at_padding_do_not_count(head):
    """A collator that copies the ids as labels, padding and all."""
    torch.manual_seed(0)
    model = head(bert_config(num_labels=VOCABULARY)).eval()
    data = [row | {"labels": row["input_ids"]} for row in samples("masked-lm")]

    def collate(rows):
        batch = collator("right")(rows)
        return batch | {"labels": batch["input_ids"]}

    result, expected = (evaluate_quality(model, data, own, batch_size=8) for own in (collate, collator("right")))
    assert torch.equal(result.loss, expected.loss) and result.count.tolist() == LENGTHS
