"""A cached teacher: the same training as with the live one, and never an answer to another example."""

import json
import random
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_efficient.distillation.cache.cache import TeacherCache
from hf_efficient.distillation.cache.write import cache_teacher
from hf_efficient.distillation.losses.divergences import log_probabilities
from hf_efficient.distillation.losses.losses import kd_loss
from hf_efficient.distillation.losses.tables import DIVERGENCES
from hf_efficient.distillation.losses.top_k import TopLogits
from hf_efficient.errors import CheckpointError, ConfigError, DataError

from ...helpers import random_examples
from ...processes import launch
from ..caching import collate_rows, make_cache, rows_of
from ..tiny import CASES, HEADLESS, VOCABULARY, arguments, collate, examples, llama, make_pair
from ..training import make_trainer, weights


@pytest.mark.parametrize("case", CASES)
def test_training_from_a_cache_is_training_from_the_teacher(case, tmp_path):
    """Three steps in shuffled batches of 4, and the evaluation, which has another batch size."""
    losses = {"embedding": 1.0, "hidden": 0.5} if case in HEADLESS else {"ce": 1.0, "kd": 1.0, "hidden": 0.5}
    settings = {"losses": losses, "per_device_train_batch_size": 4, "max_steps": 3, "layer_map": [[1, 2], [2, 4]]}
    live = make_trainer(case, tmp_path, **settings)
    student, teacher = make_pair(case)
    cache = make_cache(case, tmp_path / "cache", teacher, hidden_states=[2, 4])
    assert len(cache) == 27 and len(cache.manifest.shards) == 3
    cached = make_trainer(case, tmp_path, pair=(student, cache), **settings)
    assert cached.teacher is None
    for trainer in (live, cached):
        trainer.train()
    assert torch.allclose(weights(cached.model), weights(live.model), rtol=1e-10, atol=1e-12)
    ours, expected = cached.evaluate(), live.evaluate()
    for name in expected:
        if "loss" in name or "agreement" in name:
            assert ours[name] == pytest.approx(expected[name], rel=1e-9)


def test_padding_side_and_batch_do_not_matter(tmp_path):
    _, teacher = make_pair("token")
    cache = make_cache("token", tmp_path / "cache", teacher, batch_size=3)
    batch = collate(examples("token"))
    found = cache.find(batch)["teacher_logits"]
    width = batch["input_ids"].shape[1]
    left = {name: torch.zeros_like(value) for name, value in batch.items()}
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for name in batch:
            left[name][row, width - length :] = batch[name][row, :length]
    turned = cache.find(left)["teacher_logits"]
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        assert torch.equal(turned[row, width - length :], found[row, :length])
        assert not found[row, length:].any()


@pytest.mark.parametrize("change", ["token", "length", "mask"])
def test_changed_data_is_not_found(change, tmp_path):
    _, teacher = make_pair("bert")
    cache = make_cache("bert", tmp_path / "cache", teacher)
    batch = collate(examples("bert"))
    cache.find(batch)
    if change == "token":
        batch["input_ids"][0, 0] = (batch["input_ids"][0, 0] + 1) % VOCABULARY
    elif change == "length":
        batch["attention_mask"][0, batch["attention_mask"][0].sum() - 1] = 0
    else:
        batch["attention_mask"][0, 1] = 0
    with pytest.raises(DataError, match="1 of 16 examples"):
        cache.find(batch)


def test_an_order_or_a_label_makes_no_difference(tmp_path):
    """Answers are found by content; what the teacher does not read does not count."""
    _, teacher = make_pair("bert")
    cache = make_cache("bert", tmp_path / "cache", teacher)
    rows = examples("bert")
    straight = cache.find(collate(rows))["teacher_logits"]
    order = random.Random(0).sample(range(16), 16)
    shuffled = cache.find(collate([rows[i] | {"labels": 0} for i in order]))["teacher_logits"]
    assert torch.equal(shuffled, straight[order])


def test_a_seq2seq_answer_belongs_to_its_output(tmp_path):
    """The same input with another target is another example."""
    _, teacher = make_pair("t5")
    cache = make_cache("t5", tmp_path / "cache", teacher)
    batch = collate(examples("t5"))
    batch["labels"][0, 0] = (batch["labels"][0, 0] + 1) % VOCABULARY
    with pytest.raises(DataError, match="1 of 16"):
        cache.find(batch)


# ---- top k ----------------------------------------------------------------------------------------------------------


@random_examples(50)
@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, 12),
    temperature=st.sampled_from([1.0, 3.0]),
    divergence=st.sampled_from(sorted(DIVERGENCES)),
)
def test_top_k_is_a_lower_bound_that_rises_with_k(seed, k, temperature, divergence):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(5, 13, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([True, True, False, True, True])
    options = {"temperature": temperature, "divergence": divergence}
    whole = kd_loss(student, teacher, mask, **options)[0]
    parts = [kd_loss(student, TopLogits.of(teacher, size, temperature), mask, **options)[0] for size in range(k, 13)]
    bounds = torch.stack([*parts, whole])
    assert (bounds.diff() >= -1e-6).all()
    assert bounds[-2] == pytest.approx(whole.item(), rel=1e-5, abs=1e-5)  # 12 of 13 leave one entry to the rest


def test_top_k_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    top = TopLogits.of(teacher, 3, 2.0)
    p, q = ((logits / 2.0).softmax(-1) for logits in (teacher, student))
    p3, q3 = (torch.cat([x.gather(1, top.ids), 1 - x.gather(1, top.ids).sum(1, keepdim=True)], 1) for x in (p, q))
    got, count = kd_loss(student, top, torch.ones(4, dtype=torch.bool), temperature=2.0)
    assert got.item() == pytest.approx((4.0 * (p3 * (p3 / q3).log()).sum()).item(), rel=1e-6)
    assert count == 4
    student.requires_grad_()
    sharp = TopLogits.of(100 * teacher, 3, 1.0)  # the rest has no mass left in float32
    kd_loss(student.float(), TopLogits(sharp.ids, sharp.logits.float(), sharp.log_sum_exp.float(), 1.0), mask_of(4))[
        0
    ].backward()
    assert student.grad.isfinite().all()
    assert log_probabilities(student).isfinite().all()


def mask_of(rows):
    return torch.ones(rows, dtype=torch.bool)


def test_training_from_top_k_comes_closer_with_k(tmp_path):
    """Weights after three steps, against the live teacher."""
    settings = {"losses": {"kd": 1.0}, "max_steps": 3, "temperature": 2.0}
    live = make_trainer("llama", tmp_path, **settings)
    live.train()
    distances = []
    for k in (2, 16, VOCABULARY):
        student, teacher = make_pair("llama")
        cache = make_cache("llama", tmp_path / str(k), teacher, top_k=k, temperature=2.0)
        assert cache.layout.top_k == (None if k == VOCABULARY else k)
        trainer = make_trainer("llama", tmp_path, pair=(student, cache), **settings)
        trainer.train()
        assert 0 < trainer.evaluate()["eval_teacher_agreement"] <= 1
        distances.append((weights(trainer.model) - weights(live.model)).norm().item())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-10 < distances[0]


def test_half_precision_is_close_and_half_as_large(tmp_path):
    _, teacher = make_pair("llama")
    caches = [make_cache("llama", tmp_path / dtype, teacher, top_k=8, dtype=dtype) for dtype in ("float32", "float16")]
    batch = collate(examples("llama"))
    whole, half = (cache.find(batch)["teacher_top_logits"] for cache in caches)
    assert half.dtype == torch.float16
    assert torch.allclose(whole, half.float(), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1e6)
    with pytest.raises(DataError, match="dtype='float32'"):
        make_cache("llama", tmp_path / "large", teacher, top_k=8, dtype="float16")


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_killed_call_goes_on_where_it_was(tmp_path):
    _, teacher = make_pair("bert")
    folder = tmp_path / "cache"
    make_cache("bert", folder, teacher)
    expected = TeacherCache(folder).find(collate(examples("bert")))
    shutil.rmtree(folder / "shard-00001")
    (folder / "shard-00001.123.tmp").mkdir()
    with pytest.raises(CheckpointError, match="2 of 3 shards"):
        TeacherCache(folder)
    untouched = (folder / "shard-00000").stat().st_mtime_ns
    again = make_cache("bert", folder, teacher)
    assert (folder / "shard-00000").stat().st_mtime_ns == untouched
    assert torch.equal(again.find(collate(examples("bert")))["teacher_logits"], expected["teacher_logits"])


def test_another_teacher_or_other_data_are_refused(tmp_path):
    _, teacher = make_pair("bert")
    make_cache("bert", tmp_path / "cache", teacher)
    with pytest.raises(CheckpointError, match="another layout"):
        make_cache("bert", tmp_path / "cache", teacher, hidden_states=[1])
    with pytest.raises(CheckpointError, match="other examples"):
        parts = [rows_of("bert", seed=5), rows_of("bert", 11, seed=1)]
        cache_teacher(teacher, parts, tmp_path / "cache", data_collator=collate_rows, shard_size=10)
    with torch.no_grad():
        teacher.classifier.bias[0] += 1e-9
    with pytest.raises(CheckpointError, match="another teacher"):
        make_cache("bert", tmp_path / "cache", teacher)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        make_cache("bert", tmp_path / "other", teacher)
    with pytest.raises(CheckpointError, match="no teacher cache"):
        TeacherCache(tmp_path / "other")
    manifest = tmp_path / "cache" / "cache.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 99}))
    with pytest.raises(CheckpointError, match="another format or version"):
        TeacherCache(tmp_path / "cache")


def test_what_a_cache_cannot_do(tmp_path):
    student, teacher = make_pair("llama")
    cache = make_cache("llama", tmp_path / "cache", teacher, top_k=4, temperature=2.0)

    def make(**settings):
        return make_trainer("llama", tmp_path, pair=(student, cache), **{"losses": {"kd": 1.0}} | settings)

    for options, message in (
        ({"losses": {"relation": 1.0}}, "no cache keeps"),
        ({"losses": {"hidden": 1.0}, "layer_map": [[2, 4]]}, r"hidden_states=\[4\]"),
        ({"temperature": 1.0}, r"needs 2\.0"),
        ({"temperature_final": 1.0}, "temperature_final"),
        ({"teacher_dtype": "bfloat16"}, "teacher_dtype"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**options)
    trainer = make()
    with pytest.raises(DataError, match=r"cache\.collator"):
        trainer.compute_loss(student, collate(examples("llama")))
    with pytest.raises(ConfigError, match="top_k=64"):
        config = llama().config
        config.vocab_size = 5000
        cache_teacher(type(teacher)(config), rows_of("llama"), tmp_path / "large", data_collator=collate_rows)
    for options in ({"top_k": 0}, {"temperature": 0.0}, {"dtype": "int8"}, {"hidden_states": [5]}, {"batch_size": 0}):
        with pytest.raises(ConfigError):
            make_cache("llama", tmp_path / "bad", teacher, **options)
    assert not (tmp_path / "bad").exists()


def test_evaluating_data_that_was_not_cached_is_an_error(tmp_path):
    student, teacher = make_pair("bert")
    cache = cache_teacher(teacher, rows_of("bert"), tmp_path / "cache", data_collator=collate_rows)
    trainer = make_trainer("bert", tmp_path, pair=(student, cache))
    trainer.train()
    with pytest.raises(DataError, match="not among the 16"):
        trainer.evaluate()


@pytest.mark.processes
def test_two_processes_write_one_cache(tmp_path):
    launch("tests.distillation.caching", tmp_path / "cache", ACCELERATE_USE_CPU="1")
    alone = make_cache("bert", tmp_path / "alone", make_pair("bert")[1])
    batch = collate(examples("bert"))
    together = TeacherCache(tmp_path / "cache").find(batch)
    assert torch.allclose(together["teacher_logits"], alone.find(batch)["teacher_logits"], rtol=1e-12)


def test_a_cache_keeps_working_in_data_loader_workers(tmp_path):
    student, teacher = make_pair("bert")
    cache = make_cache("bert", tmp_path / "cache", teacher)
    settings = {"losses": {"kd": 1.0}, "per_device_train_batch_size": 4, "max_steps": 2}
    plain = make_trainer("bert", tmp_path, pair=(student, cache), **settings)
    plain.train()
    working = make_trainer("bert", tmp_path, pair=(make_pair("bert")[0], cache), dataloader_num_workers=1, **settings)
    working.train()
    assert torch.equal(weights(working.model), weights(plain.model))
    assert arguments(tmp_path).dataloader_num_workers == 0
