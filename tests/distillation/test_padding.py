"""No loss, task or cache may depend on how far rows are padded, on which side, or on the rows beside them.

Everything is in float64, so what remains is the order of additions. Where two answers must differ stands beside it.
"""

import copy

import datasets
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertForMaskedLM,
    BertForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForTokenClassification,
    LlamaModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from hf_efficient import AttentionConfig, convert_attention
from hf_efficient.distillation.cache.cache import TeacherCache
from hf_efficient.distillation.cache.write import cache_teacher
from hf_efficient.distillation.generation import teacher_texts, write
from hf_efficient.distillation.trainer import DistillationTrainer
from hf_efficient.training.batch import Batch, head_of

from .tiny import LABELS, PAD, VOCABULARY, arguments, bert, examples, llama, t5

SIZES = {"vocab_size": VOCABULARY, "num_attention_heads": 4, "pad_token_id": 0}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
LAYERS = {"hidden": 1.0, "attention": 1.0, "relation": 1.0, "attention_output": 1.0}
LANGUAGE = {"ce": 1.0, "kd": 1.0} | LAYERS


def gpt2(hidden: int, layers: int):
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**config, **dropout, bos_token_id=1, eos_token_id=2))


def modernbert(hidden: int, layers: int):
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 16, "local_attention": 4}
    return ModernBertForMaskedLM(ModernBertConfig(**SIZES, **SPECIAL, **sizes))


def labelled_llama(hidden: int, layers: int):
    config = llama(hidden, layers).config
    config.num_labels, config.classifier_dropout = LABELS, 0.0
    return LlamaForTokenClassification(config)


def llama_pool(hidden: int, layers: int):
    return LlamaModel(llama(hidden, layers).config)


def phi(hidden: int, layers: int):
    """A kind whose answer depends on the rotary phase itself, not on distances alone."""
    return convert_attention(llama(hidden, layers), AttentionConfig("linear"))


# name -> (make, the examples of `tiny.CASES`, losses)
MODELS = {
    "llama": (llama, "llama", LANGUAGE),
    "gpt2": (gpt2, "llama", LANGUAGE),
    "linear llama": (phi, "llama", {"ce": 1.0, "kd": 1.0, "hidden": 1.0}),
    "llama tokens": (labelled_llama, "token", LANGUAGE),
    "llama embedding": (llama_pool, "embedding", {"embedding": 1.0} | LAYERS),
    "modernbert": (modernbert, "masked", LANGUAGE),
    "t5": (t5, "t5", LANGUAGE),
}


def collator(side: str, width: int = 0):
    """Pads to the longest row, at least `width`; garbage under the padding, since nobody may read it."""

    def collate(rows):
        rows = [dict(row) | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            longest = max(width, *map(len, values))
            padding = 7 if name == "input_ids" else PAD[name]
            spare = [[padding] * (longest - len(value)) for value in values]
            pairs = zip(spare, values, strict=True) if side == "left" else zip(values, spare, strict=True)
            batch[name] = torch.tensor([first + second for first, second in pairs])
        return batch

    return collate


def make_models(name: str):
    torch.manual_seed(0)
    models = [MODELS[name][0](hidden, layers).double() for hidden, layers in ((16, 2), (24, 4))]
    for model in models:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return models


def trainer_of(models, folder, losses, collate, teacher=None, rows=None, **settings):
    student = copy.deepcopy(models[0])
    torch.manual_seed(0)  # of the projections
    return DistillationTrainer(
        student,
        arguments(folder, losses=losses, **settings),
        teacher=teacher or models[1],
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
    )


def step(trainer, rows, collate, size):
    """The loss, and the gradient of everything that learns, of one optimizer step in batches of `size`."""
    for model in (trainer.model, trainer.projections):
        model.zero_grad()
    batches = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    given, counts = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    losses = [trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=counts) for batch in given]
    sum(losses).backward()
    learning = [*trainer.model.parameters(), *trainer.projections.parameters()]
    gradient = torch.cat([p.grad.flatten() for p in learning if p.grad is not None])
    return sum(losses).item(), gradient


PADDINGS = [("right", 16, 8), ("right", 64, 3), ("left", 0, 1), ("left", 16, 8), ("left", 64, 3)]


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_do_not_depend_on_padding(name, tmp_path):
    _, case, losses = MODELS[name]
    models, rows = make_models(name), examples(case, 8)
    for loss in losses:
        trainer = trainer_of(models, tmp_path, {loss: 1.0}, collator("right"))
        found = [
            step(trainer, rows, collator(side, width), size) for side, width, size in [("right", 0, 8), *PADDINGS]
        ]
        value, gradient = found[0]
        assert value > 0 and gradient.norm() > 0
        for (own, other), padding in zip(found[1:], PADDINGS, strict=True):
            assert own == pytest.approx(value, rel=1e-9), (loss, padding)
            assert (other - gradient).norm() <= 1e-8 * gradient.norm(), (loss, padding)
        another = step(trainer, rows[:7], collator("left"), 7)
        assert another[0] != pytest.approx(value, rel=1e-6)


@pytest.mark.cover
@pytest.mark.parametrize("soft_positions", ["labels", "attended"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_evaluation_does_not_depend_on_padding(name, soft_positions, tmp_path):
    _, case, losses = MODELS[name]
    models, rows = make_models(name), examples(case, 8)
    found = []
    trainer = trainer_of(models, tmp_path, losses, collator("right"), rows=rows, soft_positions=soft_positions)
    for side, width, trainer.args.per_device_eval_batch_size in [("right", 0, 8), *PADDINGS]:
        trainer.data_collator = collator(side, width)
        metrics = trainer.evaluate()
        found.append({name: value for name, value in metrics.items() if "loss" in name or "agreement" in name})
    assert len(found[0]) == len(losses) + 2
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)  # the trainer adds them up in float32


@pytest.mark.cover
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(("written", "read"), [("left", "right"), ("right", "left"), ("left", "left")])
def test_a_cache_serves_both_sides(name, written, read, tmp_path):
    """The loss from a cache is that of the live teacher, whatever side either was padded on."""
    models, rows = make_models(name), examples(MODELS[name][1], 8)
    losses = {"ce": 1.0, "kd": 1.0, "hidden": 1.0}
    settings = {"temperature": 2.0, "layer_map": [[1, 2], [2, 4]]}
    folder = tmp_path / "cache"
    table = datasets.Dataset.from_list([dict(row) for row in rows])
    options = {"batch_size": 3, "top_k": VOCABULARY, "temperature": 2.0, "hidden_states": [2, 4], "shard_size": 5}
    cache_teacher(models[1], table, folder, data_collator=collator(written, 20), **options)
    live = trainer_of(models, tmp_path, losses, collator("right"), **settings)
    cached = trainer_of(models, tmp_path, losses, collator(read), teacher=TeacherCache(folder), **settings)
    value, gradient = step(live, rows, collator("right"), 8)
    own, other = step(cached, rows, cached.cache.collator(collator(read, 24)), 3)
    assert own == pytest.approx(value, rel=1e-9)
    assert (other - gradient).norm() <= 1e-8 * gradient.norm()


def test_ce_is_the_mean_over_all_predicted_tokens(tmp_path):
    """Against rows one by one, without padding; and not against transformers' own loss, which counts padding."""
    models, rows = make_models("llama"), examples("embedding", 8)
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    batch = collator("left")(rows)
    got = trainer_of(models, tmp_path, {"ce": 1.0}, collator("left")).compute_loss(models[0], dict(batch))
    losses = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = models[0](input_ids=ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert got.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-9)
    assert got.item() != pytest.approx(models[0](**batch).loss.item(), rel=1e-3)


def test_labels_at_padding_do_not_count():
    """Where a collator copies the ids, padding and all."""
    ids = torch.tensor([[7, 7, 3, 4, 5], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    for model, expected in (
        (llama(), [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]),
        (bert(head=BertForMaskedLM), mask.tolist()),
    ):
        assert Batch(inputs, head_of(model)).label_targets()[1].long().tolist() == expected


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_answer_in_padding_does_not_count(side):
    task = head_of(bert(head=BertForQuestionAnswering, num_labels=2))
    batch = collator(side)([{"input_ids": [3, 4, 5, 6]}, {"input_ids": [3, 4]}])
    first = torch.tensor([0, 0 if side == "left" else 3])
    ends = {"start_positions": first, "end_positions": torch.tensor([3, 3 if side == "left" else 1])}
    counted = Batch(batch | ends, task).label_targets()[1].tolist()
    assert counted == [[True, True], [False, True]]


def test_what_is_written_does_not_depend_on_padding():
    """On-policy texts and a teacher's texts, with positions that are learned."""
    student, teacher = make_models("gpt2")
    rows = examples("llama", 6)
    settings = {"max_new_tokens": 4, "sampling": None}
    right, left = (
        write(student, Batch(collator(side)(rows), head_of(student)), **settings) for side in ("right", "left")
    )
    assert all(torch.equal(right[name], left[name]) for name in right)
    table = datasets.Dataset.from_list([dict(row) for row in rows])
    one, two = (
        list(teacher_texts(teacher, table, data_collator=collator(side), max_new_tokens=4, batch_size=size))
        for side, size in (("right", 6), ("left", 2))
    )
    assert one == two


def bart(head):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return head(BartConfig(vocab_size=VOCABULARY, max_position_embeddings=64, num_labels=3, **sizes, **heads))


def test_the_decoder_of_a_classifier_reads_the_moved_text():
    """A position counts if the token in it and the one behind it are real: as many as there are tokens, each row, and
    never more for a row that is padded further. On the left the first of them would hold padding."""
    task = head_of(bart(BartForSequenceClassification))
    rows = [{"input_ids": [3, 4, 2]}, {"input_ids": [3, 4, 5, 6, 2]}]
    for width in (0, 9):
        mask = Batch(collator("right", width)(rows), task).token_masks()["decoder"]
        assert mask.sum(1).tolist() == [3, 5] and mask[:, :3].all()
    left = Batch(collator("left")(rows), task).token_masks()["decoder"]
    assert left.long().tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]
    labels = torch.tensor([[3, 4, -100], [3, 4, 5]])
    generates = head_of(bart(BartForConditionalGeneration))
    written = Batch(collator("right")(rows) | {"labels": labels}, generates).token_masks()["decoder"]
    assert written.tolist() == (labels != -100).tolist()
