"""Tokens drawn from the teacher: the right expected loss and gradient, which the largest k do not have."""

import pytest
import torch

from hf_efficient.distillation.cache.cache import TeacherCache
from hf_efficient.distillation.cache.write import cache_teacher
from hf_efficient.distillation.losses.draws import DrawnTokens
from hf_efficient.distillation.losses.losses import kd_loss
from hf_efficient.distillation.losses.top_k import TopLogits
from hf_efficient.errors import ConfigError

from ..caching import collate_rows, make_cache, rows_of
from ..tiny import VOCABULARY, collate, examples, make_pair
from ..training import make_trainer, weights

K, CLASSES, TEMPERATURE = 4, 13, 2.0


def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(3, CLASSES, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


def loss_and_gradient(student, teacher):
    own = student.clone().requires_grad_()
    mask = torch.ones(own.shape[:-1], dtype=torch.bool)
    loss = kd_loss(own, teacher, mask, temperature=TEMPERATURE)[0]
    loss.backward()
    return loss.detach(), own.grad


def test_the_mean_over_draws_is_the_whole_divergence():
    """20,000 draws at once; the error of their mean is what chance leaves, that of the largest k stays."""
    student, teacher = logits()
    count = 20_000
    many = teacher.expand(count, *teacher.shape)
    drawn = DrawnTokens.of(many, K, TEMPERATURE, torch.Generator().manual_seed(0))
    assert drawn.ids.shape == (count, 3, 1 + K)
    loss, gradient = loss_and_gradient(student.expand(count, *student.shape), drawn)
    expected_loss, expected = loss_and_gradient(student, teacher)
    error = (gradient.mean(0) - expected).norm() / expected.norm()
    assert loss.item() / count == pytest.approx(expected_loss.item(), rel=0.02)
    assert error < 0.02
    biased = loss_and_gradient(student, TopLogits.of(teacher, K, TEMPERATURE))[1]
    assert (biased - expected).norm() / expected.norm() > 5 * error
    assert (gradient[0] - expected).norm() > 0.1 * expected.norm()  # one draw is no more than an estimate


def test_the_definition():
    student, teacher = logits()
    drawn = DrawnTokens.of(teacher, K, TEMPERATURE, torch.Generator().manual_seed(1))
    p, log_q = (teacher / TEMPERATURE).softmax(-1), (student / TEMPERATURE).log_softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    assert torch.equal(drawn.ids[:, 0], teacher.argmax(-1))
    expected = TEMPERATURE**2 * (-log_q.gather(1, drawn.ids[:, 1:]).mean(1) - entropy).sum()
    assert loss_and_gradient(student, drawn)[0].item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_draws_belong_to_the_example(tmp_path):
    """Neither batch nor padding side matters; other tokens and another temperature give others."""
    _, teacher = make_pair("llama")
    one, two = (
        make_cache("llama", tmp_path / str(size), teacher, sampled=8, temperature=2.0, batch_size=size)
        for size in (1, 5)
    )
    batch = collate(examples("llama"))
    found = [cache.find(batch)["teacher_drawn_ids"] for cache in (one, two)]
    assert torch.equal(*found) and found[0].shape[-1] == 9
    mask = batch["attention_mask"].bool()
    assert len({tuple(row) for row in found[0][mask][:, 1:].tolist()}) > 0.9 * int(mask.sum())
    assert not found[0][~mask].any()
    cold = make_cache("llama", tmp_path / "cold", teacher, sampled=8, temperature=1.0)
    assert not torch.equal(cold.find(batch)["teacher_drawn_ids"], found[0])


def test_training_from_draws_comes_closer_with_k(tmp_path):
    settings = {"losses": {"ce": 1.0, "kd": 1.0}, "max_steps": 3, "temperature": 2.0}
    live = make_trainer("llama", tmp_path, **settings)
    start = weights(live.model)
    live.train()
    agreement = live.evaluate()["eval_teacher_agreement"]
    distances = []
    for k in (1, 30, VOCABULARY):
        student, teacher = make_pair("llama")
        cache = make_cache("llama", tmp_path / str(k), teacher, sampled=k, temperature=2.0)
        assert cache.layout.sampled == (None if k == VOCABULARY else k)
        trainer = make_trainer("llama", tmp_path, pair=(student, cache), **settings)
        trainer.train()
        distances.append((weights(trainer.model) - weights(live.model)).norm() / (weights(live.model) - start).norm())
        assert trainer.evaluate()["eval_teacher_agreement"] == pytest.approx(agreement, abs=0.2)
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-8 < distances[0]


def test_what_drawn_tokens_cannot_do(tmp_path):
    student, teacher = make_pair("llama")
    cache = make_cache("llama", tmp_path / "cache", teacher, sampled=4, temperature=2.0)
    again = TeacherCache(tmp_path / "cache")
    assert again.manifest == cache.manifest
    for settings, message in (({"temperature": 1.0}, r"needs 2\.0"), ({"divergence": "reverse"}, "needs 'forward'")):
        with pytest.raises(ConfigError, match=message):
            given = {"losses": {"kd": 1.0}, "temperature": 2.0} | settings
            make_trainer("llama", tmp_path, pair=(student, cache), **given)
    for options, message in (({"top_k": 4, "sampled": 4}, "not both"), ({"sampled": 0}, "sampled=0 must be 1")):
        with pytest.raises(ConfigError, match=message):
            cache_teacher(teacher, rows_of("llama"), tmp_path / "no", data_collator=collate_rows, **options)
