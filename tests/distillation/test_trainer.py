"""DistillationTrainer: what reaches which model, what is trained, logged, saved and refused."""

import copy
import json
import re

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import BertForMultipleChoice, DistilBertConfig, DistilBertForSequenceClassification, TrainerCallback

from hf_efficient.cli.programs.dry_run import describe
from hf_efficient.distillation import hidden_states
from hf_efficient.distillation.hidden_states import selects_positions
from hf_efficient.distillation.losses.projections import ATTRIBUTE
from hf_efficient.distillation.terms import LOSSES
from hf_efficient.distillation.trainer import DistillationTrainer
from hf_efficient.errors import ConfigError, DataError, UnsupportedModelError
from hf_efficient.training.batch import Batch, head_of

from .tiny import VOCABULARY, WITH_HEAD, arguments, bert, collate, examples, make_pair, t5
from .training import ALL, make_trainer, trained, weights


@pytest.mark.parametrize("case", [case for case in WITH_HEAD if case != "span"])
def test_ce_alone_is_the_loss_of_the_model(case, tmp_path):
    """The same number and gradient as transformers' own loss on one batch."""
    batch = collate(examples(case))
    student, teacher = make_pair(case)
    trainer = make_trainer(case, tmp_path, pair=(copy.deepcopy(student), teacher), losses={"ce": 1.0})
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    expected = student(**batch).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # Llama casts its logits to float32
    for ours, theirs in zip(trainer.model.parameters(), student.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_kd_is_batchmean_kl_times_temperature_squared(tmp_path):
    student, teacher = make_pair("bert")
    batch = collate(examples("bert"))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    trainer = make_trainer("bert", tmp_path, pair=(student, teacher), losses={"kd": 1.0}, temperature=3.0)
    soft = [(model(**inputs).logits / 3.0).log_softmax(-1) for model in (student, teacher)]
    expected = 9.0 * F.kl_div(soft[0], soft[1], log_target=True, reduction="batchmean")
    assert trainer.compute_loss(student, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("case", WITH_HEAD)
def test_padding_has_no_influence(case, tmp_path):
    """More padding, with garbage in it, changes neither the loss nor the gradient."""
    if case == "vit":
        rows = examples(case)
        batch, padded = collate(rows), collate(rows[::-1])  # images have no padding: only the order may change
    else:
        batch = collate(examples(case))
        padded = {
            k: F.pad(v, (0, 3), value=-100 if k == "labels" else 0) if v.dim() > 1 else v for k, v in batch.items()
        }
        padded["input_ids"] = torch.where(padded["attention_mask"].bool(), padded["input_ids"], VOCABULARY - 1)
    results = []
    for inputs in (batch, padded):
        trainer = make_trainer(case, tmp_path, losses=ALL)
        loss = trainer.compute_loss(trainer.model, dict(inputs))
        loss.backward()
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        results.append((loss.item(), torch.stack([g.norm() for g in grads])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5)


@pytest.mark.parametrize("case", ["llama", "t5"])
def test_a_batch_without_a_single_label_is_harmless(case, tmp_path):
    rows = [row | {"labels": [-100] * len(row["labels"])} for row in examples(case)]
    trainer = make_trainer(case, tmp_path, rows=rows, losses={"ce": 1.0, "kd": 1.0})
    before = weights(trainer.model)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert torch.equal(weights(trainer.model), before)


@pytest.mark.parametrize("case", WITH_HEAD)
def test_a_copy_of_the_teacher_has_nothing_to_learn(case, tmp_path):
    _, teacher = make_pair(case)
    pair = (copy.deepcopy(teacher), teacher)
    trainer = make_trainer(case, tmp_path, pair=pair, losses={"kd": 1.0, "hidden": 1.0})
    assert not trainer.projections
    metrics = trainer.evaluate()
    assert metrics["eval_loss_kd"] == pytest.approx(0, abs=1e-9)
    assert metrics["eval_loss_hidden"] == pytest.approx(0, abs=1e-9)
    assert metrics["eval_teacher_agreement"] == 1.0


@pytest.fixture(scope="module")
def weights_of(tmp_path_factory):
    """The weights after one step with these settings; each is trained once."""
    weights = {}

    def train(settings):
        key = json.dumps(settings)
        if key not in weights:
            weights[key] = trained("llama", tmp_path_factory.mktemp("run"), **settings)
        return weights[key]

    return train


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({"losses": {"ce": 1.0}}, {"losses": {"ce": 1.0, "kd": 1.0}}),
        ({"losses": {"ce": 1.0}}, {"losses": {"ce": 1.0, "hidden": 1.0}}),
        ({"losses": {"kd": 1.0}}, {"losses": {"kd": 2.0}}),
        ({"temperature": 1.0}, {"temperature": 4.0}),
        ({"temperature": 4.0}, {"temperature": 4.0, "temperature_squared": False}),
        ({"divergence": "forward"}, {"divergence": "reverse"}),
        ({"divergence": "jsd"}, {"divergence": "jsd", "jsd_beta": 0.9}),
        ({"losses": {"kd": 1.0}}, {"losses": {"kd": 1.0}, "soft_positions": "attended"}),
        ({"losses": {"hidden": 1.0}}, {"losses": {"hidden": 1.0}, "hidden_loss": "cosine"}),
        ({"losses": {"hidden": 1.0}}, {"losses": {"hidden": 1.0}, "layer_map": "last"}),
    ],
)
def test_every_setting_matters(settings, others, weights_of):
    first, second = weights_of(settings), weights_of(others)
    assert (first - second).norm() > 1e-6 * first.norm()


@pytest.mark.parametrize("losses", [{"ce": 1.0, "kd": 1.0}, {"hidden": 1.0}])
def test_the_same_settings_give_the_same_weights(losses, weights_of, tmp_path):
    """Bit for bit: what differs above is due to the settings."""
    assert torch.equal(weights_of({"losses": losses}), trained("llama", tmp_path, losses=losses))


def test_the_logged_loss_is_the_weighted_sum_of_its_terms(tmp_path):
    losses = {"ce": 0.5, "kd": 2.0, "hidden": 3.0}
    trainer = make_trainer("t5", tmp_path, losses=losses, max_steps=4, logging_steps=2, per_device_train_batch_size=4)
    trainer.train()
    for log in trainer.state.log_history[:2]:
        assert log["loss"] == pytest.approx(sum(losses[name] * log[f"loss_{name}"] for name in losses), rel=1e-6)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(sum(losses[name] * metrics[f"eval_loss_{name}"] for name in losses))


@pytest.mark.parametrize(
    "setting", [{"bf16": True}, {"teacher_dtype": "bfloat16"}, {"gradient_checkpointing": True}], ids=str
)
def test_other_precisions_and_checkpointing(setting, tmp_path):
    """The same losses and gradient, up to the rounding of bfloat16."""
    logs = []
    for settings in ({}, setting):
        student, teacher = make_pair("bert")
        trainer = make_trainer("bert", tmp_path, pair=(student.float(), teacher.float()), losses=ALL, **settings)
        trainer.train()
        logs.append({k: v for k, v in trainer.state.log_history[0].items() if "loss" in k or "grad" in k})
    assert len(logs[0]) == 5
    assert logs[1] == pytest.approx(logs[0], rel=0.05)
    assert (logs[1] == logs[0]) is ("gradient_checkpointing" in setting)


def test_evaluation_is_a_mean_over_positions_whatever_the_batch_size(tmp_path):
    metrics = []
    for batch_size in (2, 11):
        trainer = make_trainer("llama", tmp_path, losses=ALL, per_device_eval_batch_size=batch_size)
        metrics.append({k: v for k, v in trainer.evaluate().items() if "loss" in k or "agreement" in k})
    assert len(metrics[0]) == 5
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)


def test_compute_metrics_gets_only_logits_and_labels(tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["shapes"] = (prediction.predictions.shape, prediction.label_ids.shape)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = make_trainer("bert", tmp_path, losses=ALL)
    trainer.compute_metrics = compute_metrics
    metrics = trainer.evaluate()
    assert seen["shapes"] == ((11, 3), (11,))
    assert 0 <= metrics["eval_accuracy"] <= 1
    unlabelled = [{"input_ids": row["input_ids"]} for row in examples("bert", 5)]
    predictions = trainer.predict(unlabelled).predictions
    assert isinstance(predictions, np.ndarray) and predictions.shape == (5, 3)


def test_training_without_labels(tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in examples("llama")]
    trainer = make_trainer("llama", tmp_path, rows=rows, losses={"kd": 1.0, "hidden": 1.0})
    before = weights(trainer.model)
    trainer.train()
    assert not torch.equal(weights(trainer.model), before)
    with pytest.raises(DataError, match="needs labels"):
        make_trainer("llama", tmp_path, rows=rows).train()


@pytest.mark.parametrize("case", WITH_HEAD)
def test_losses_count_what_the_masks_say(case):
    """The denominators are counted before the forward; they must be those of the sums."""
    student, _ = make_pair(case)
    task = head_of(student)
    batch = Batch(collate(examples(case)), task)
    counts = {part: int(mask.sum()) for loss in LOSSES.values() for part, mask in loss.masks(batch).items()}
    labels = batch.labels[:, 1:] if case == "llama" else batch.labels
    assert counts["ce"] == int(((labels != -100) & (labels != 100)).sum())
    assert counts["kd"] == (32 if case == "span" else counts["ce"])
    encoder = 16 if case == "vit" else int(batch.inputs["attention_mask"].sum())
    assert counts["hidden_encoder"] == encoder
    assert ("hidden_decoder" in counts) == (case == "t5")


def test_the_models_get_their_own_columns(tmp_path):
    """A BERT teacher keeps the token types that a DistilBERT student does not know; neither sees labels."""
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=VOCABULARY, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=3)
    student, teacher = DistilBertForSequenceClassification(config), bert()
    rows = [row | {"token_type_ids": [1] * len(row["input_ids"]), "text": "x"} for row in examples("bert")]
    trainer = make_trainer(
        "bert", tmp_path, pair=(student, teacher), rows=datasets.Dataset.from_list(rows), losses=ALL
    )
    seen = {}

    def spy(name):
        def hook(module, args, kwargs):
            seen[name] = kwargs

        return hook

    teacher.register_forward_pre_hook(spy("teacher"), with_kwargs=True)
    student.distilbert.register_forward_pre_hook(spy("student"), with_kwargs=True)
    trainer.train()
    assert seen["teacher"]["token_type_ids"].any()
    assert seen["student"].get("token_type_ids") is None
    assert "labels" not in seen["teacher"]


def test_only_mapped_hidden_states_are_kept(tmp_path):
    trainer = make_trainer("t5", tmp_path, losses=ALL, layer_map=[[1, 3]])
    answer = trainer._run_teacher(trainer._batch(collate(examples("t5"))))
    only = [3] if selects_positions() else list(range(5))
    assert sorted(answer.states) == [(stack, position) for stack in ("decoder", "encoder") for position in only]


def test_asking_for_some_hidden_states_or_for_all_is_the_same(tmp_path, monkeypatch):
    """transformers 5.17 can only be asked for all of them."""
    some = trained("t5", tmp_path, losses=ALL)
    monkeypatch.setattr(hidden_states, "selects_positions", lambda: False)
    assert torch.equal(trained("t5", tmp_path, losses=ALL), some)


def test_the_teacher_stays_as_it_is(tmp_path):
    student, teacher = make_pair("bert")
    teacher.config.hidden_dropout_prob = 0.5
    for module in teacher.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    before = weights(teacher)
    trainer = make_trainer("bert", tmp_path, pair=(student, teacher.train()), losses=ALL, max_steps=3)
    trainer.train()
    batch = trainer._batch(collate(examples("bert")))
    assert torch.equal(trainer._run_teacher(batch).logits, trainer._run_teacher(batch).logits)
    assert torch.equal(weights(teacher), before)
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())  # what is cut from it can be trained
    assert not trainer._run_teacher(batch).logits.requires_grad
    assert teacher not in trainer.accelerator._models


def test_projections_train_and_leave_no_trace(tmp_path):
    student, teacher = make_pair("bert")
    names = set(student.state_dict())
    trainer = make_trainer("bert", tmp_path, pair=(student, teacher), losses=ALL, weight_decay=0.1)
    start = weights(trainer.projections)

    class Look(TrainerCallback):
        seen = False

        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            projections = set(model.get_submodule(ATTRIBUTE).parameters())
            groups = {g["weight_decay"]: projections & set(g["params"]) for g in optimizer.param_groups}
            assert len(projections) == 3 and groups[0.0] == projections and not groups[0.1]
            self.seen = True

    look = Look()
    trainer.add_callback(look)
    trainer.train()
    assert look.seen
    assert not torch.equal(weights(trainer.projections), start)
    assert set(student.state_dict()) == names and not student._keys_to_ignore_on_save
    assert trainer.evaluate()["eval_loss_hidden"] > 0


def test_peft_trains_adapters_and_projections_only(tmp_path):
    student, teacher = make_pair("bert")
    peft = get_peft_model(student, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2))
    base = {name: p.detach().clone() for name, p in peft.named_parameters() if not p.requires_grad}
    adapters = {name: p.detach().clone() for name, p in peft.named_parameters() if p.requires_grad}
    trainer = make_trainer("bert", tmp_path, pair=(peft, teacher), losses=ALL, max_steps=3)
    start = weights(trainer.projections)
    trainer.train()
    after = dict(peft.named_parameters())
    assert base and all(torch.equal(after[name], value) for name, value in base.items())
    assert not any(torch.equal(after[name], value) for name, value in adapters.items())
    assert not torch.equal(weights(trainer.projections), start)


def test_what_is_refused(tmp_path):
    student, teacher = make_pair("bert")

    def make(student, teacher, **settings):
        return make_trainer("bert", tmp_path, pair=(student, teacher), **settings)

    with pytest.raises(UnsupportedModelError, match="shares weights"):
        make(student, student)
    lora = get_peft_model(copy.deepcopy(teacher), LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(UnsupportedModelError, match="shares weights"):
        make(lora, lora.get_base_model())
    with pytest.raises(UnsupportedModelError, match="vocabulary has 40 entries, the teacher's 48"):
        wider = bert()
        wider.resize_token_embeddings(48)
        make(student, wider)
    with pytest.raises(UnsupportedModelError, match=r"3 labels .* 5 "):
        make(student, bert(num_labels=5))
    names = {0: "a", 1: "b", 2: "c"}
    with pytest.raises(UnsupportedModelError, match="another order"):
        make(bert(id2label=names), bert(id2label={0: "b", 1: "a", 2: "c"}))
    with pytest.raises(UnsupportedModelError, match="do different things"):
        make(student, t5())
    multiple_choice = bert(head=BertForMultipleChoice)
    with pytest.raises(UnsupportedModelError, match="its head is none of"):
        make(multiple_choice, teacher)
    with pytest.raises(ConfigError, match="loaded model"):
        make(student, "bert-base-uncased")
    with pytest.raises(ConfigError, match=r"0 \(embeddings\) to 4"):
        make(student, teacher, losses=ALL, layer_map=[[1, 5]])
    with pytest.raises(ConfigError, match="compute_loss_func"):
        DistillationTrainer(student, arguments(tmp_path), teacher=teacher, compute_loss_func=print)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    from transformers.training_args import ParallelMode

    from hf_efficient.distillation.checks import check_sharded
    from hf_efficient.training.checks import check_run

    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), "parallel_mode", ParallelMode.NOT_DISTRIBUTED)
    with pytest.raises(ConfigError, match="accelerate launch"):
        check_run(args, fsdp_version=None)
    monkeypatch.undo()
    check_run(args, fsdp_version=2)
    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        check_run(args, fsdp_version=1)
    check_run(args, fsdp_version=None, zero_stage=2)
    check_sharded(args, teaches_itself=False)
    with pytest.raises(ConfigError, match="is sharded too"):
        check_sharded(args, teaches_itself=True)
    with pytest.raises(ConfigError, match="do not generate"):
        check_sharded(arguments(tmp_path, losses={"kd": 1.0}, on_policy=1.0), teaches_itself=False)
    with pytest.raises(ConfigError, match="ZeRO-3 is not supported"):
        check_run(args, fsdp_version=None, zero_stage=3)


def test_ce_alone_needs_no_teacher(tmp_path):
    """The same training as with one; every other loss says that it needs one, and so does a setting of it."""
    settings = {"losses": {"ce": 1.0}, "max_steps": 2}
    student, _ = make_pair("bert")
    alone = make_trainer("bert", tmp_path, pair=(student, None), **settings)
    other = make_trainer("bert", tmp_path, **settings)
    for trainer in (alone, other):
        trainer.train()
    assert torch.equal(weights(alone.model), weights(other.model))
    metrics, expected = alone.evaluate(), other.evaluate()
    assert metrics["eval_loss_ce"] == expected["eval_loss_ce"] == metrics["eval_loss"]
    assert "eval_teacher_agreement" in expected and "eval_teacher_agreement" not in metrics
    assert re.search("^teacher +none$", describe(alone), re.MULTILINE)
    for more in ({"losses": {"ce": 1.0, "kd": 1.0}}, {"losses": {"hidden": 1.0}}, {"share_encoder": True}):
        with pytest.raises(ConfigError, match=r"needs? a teacher"):
            make_trainer("bert", tmp_path, pair=(make_pair("bert")[0], None), **settings | more)
    assert make_trainer("bert", tmp_path, pair=(make_pair("bert")[0], None), **settings).teacher is None
