"""What a model is taken for, and that its losses are those that transformers computes for it."""

import datasets
import pytest
import torch
from transformers import (
    BertConfig,
    BertForPreTraining,
    DPRConfig,
    DPRQuestionEncoder,
    FlaubertConfig,
    FlaubertWithLMHeadModel,
    GPT2Config,
    GPT2DoubleHeadsModel,
    MarianMTModel,
    PreTrainedModel,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5Model,
    ViltConfig,
    ViltForQuestionAnswering,
    WhisperForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetForQuestionAnswering,
)

from hf_efficient import DistillationTrainer, PruningConfig, TeacherCache, build_student, cache_teacher, prune
from hf_efficient.errors import ConfigError, DataError, UnsupportedModelError
from hf_efficient.training.batch import head_of

from ..families import make_model
from .tiny import arguments
from .training import weights

OLD = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "n_words": 40, "dropout": 0.0, "attention_dropout": 0.0}
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
SOUND = Speech2TextConfig(
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    input_feat_per_channel=8,
    conv_channels=16,
    vocab_size=40,
    dropout=0.0,
)


def sound(count, labels=5, frames=24):
    made = torch.Generator().manual_seed(0)
    return [
        {
            "input_features": torch.randn(8, frames, generator=made).tolist(),
            "labels": torch.randint(3, 40, (labels,), generator=made).tolist(),
        }
        for _ in range(count)
    ]


def texts(count):
    made = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 40, (6,), generator=made).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def sound_of_speech_to_text(count):
    return [row | {"input_features": torch.tensor(row["input_features"]).T.tolist()} for row in sound(count)]


HEADS = {
    "marian": (lambda: make_model("marian"), texts, "tokens"),
    "whisper": (lambda: make_model("whisper"), sound, "tokens"),
    "speech to text": (lambda: Speech2TextForConditionalGeneration(SOUND), sound_of_speech_to_text, "tokens"),
    "flaubert": (lambda: FlaubertWithLMHeadModel(FlaubertConfig(**OLD)), texts, "tokens"),
    "xlm": (lambda: XLMWithLMHeadModel(XLMConfig(**OLD)), texts, "tokens"),
    "double": (lambda: GPT2DoubleHeadsModel(GPT2), texts, "causal_lm"),
}


@pytest.mark.parametrize("name", HEADS)
def test_ce_is_the_loss_that_the_model_computes_itself(name, tmp_path):
    """So labels are aligned with logits as the head wants it, though its class name does not say how."""
    make, rows_of, kind = HEADS[name]
    torch.manual_seed(0)
    student = make().eval()
    assert head_of(student).kind == kind
    rows = rows_of(3)
    rows[0]["labels"] = rows[0]["labels"][:-2] + [-100, -100]
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    trainer = DistillationTrainer(student, arguments(tmp_path, losses={"ce": 1.0}), train_dataset=rows)
    with torch.no_grad():
        ours, theirs = trainer.compute_loss(student.eval(), dict(batch)), student(**batch).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.cover
@pytest.mark.parametrize("loss", ["ce", "kd"])
@pytest.mark.parametrize("name", ["marian", "whisper", "double"])
def test_student_learns_by_each_loss(name, loss, tmp_path):
    make, rows_of, _ = HEADS[name]
    torch.manual_seed(0)
    teacher, student, rows = make(), make(), rows_of(8)
    for model, deviation in ((teacher, 0.3), (student, 0.1)):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=deviation)
    settings = {"losses": {loss: 1.0}, "max_steps": 30, "optim": "adamw_torch", "learning_rate": 0.003}
    trainer = DistillationTrainer(
        student, arguments(tmp_path, **settings), teacher=teacher, train_dataset=rows, eval_dataset=rows
    )
    before = trainer.evaluate()[f"eval_loss_{loss}"]
    trainer.train()
    assert 0 < trainer.evaluate()[f"eval_loss_{loss}"] < 0.95 * before


def test_sound_is_distilled_with_given_decoder_inputs_a_shared_encoder_and_a_cache(tmp_path):
    teacher, rows = make_model("whisper"), sound(8)
    start = teacher.config.decoder_start_token_id
    given = [row | {"decoder_input_ids": [start, *row["labels"][:-1]]} for row in rows]
    student = build_student(teacher, layers={"decoder": 1})
    settings = {"losses": {"kd": 1.0}, "share_encoder": True}

    def evaluated(data, teacher=teacher, **more):
        args = arguments(tmp_path, **settings | more)
        return DistillationTrainer(student, args, teacher=teacher, train_dataset=data, eval_dataset=data).evaluate()

    expected = evaluated(rows)["eval_loss_kd"]
    assert evaluated(given)["eval_loss_kd"] == pytest.approx(expected, rel=1e-6)
    cache_teacher(teacher, datasets.Dataset.from_list(rows), tmp_path / "cache")
    cached = evaluated(rows, TeacherCache(tmp_path / "cache"), share_encoder=False)
    assert cached["eval_loss_kd"] == pytest.approx(expected, rel=1e-4)


def test_sounds_of_as_many_bands_as_frames_are_told_apart(tmp_path):
    """A mask of frames is none of the bands, though it has their shape."""
    rows = [row | {"attention_mask": [1] * 4 + [0] * 4} for row in sound(1, frames=8)]
    teacher = make_model("whisper", max_source_positions=4)
    cache = cache_teacher(teacher, datasets.Dataset.from_list(rows), tmp_path / "cache")
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    cache.find(batch)
    batch["input_features"][0, 6, 2] += 1
    with pytest.raises(DataError, match="not among"):
        cache.find(batch)


def test_whisper_student_that_was_pruned(tmp_path):
    teacher = make_model("whisper")
    student = prune(teacher, PruningConfig(ratio=0.3, importance="random", round_to=1))
    before = weights(student)
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, train_dataset=sound(8))
    trainer.train()
    assert not torch.equal(weights(student), before)
    with pytest.raises(ConfigError, match="models that write"):
        DistillationTrainer(
            student, arguments(tmp_path, losses={"kd": 1.0}, on_policy=0.5), teacher=teacher, train_dataset=sound(8)
        )


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 30}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (BertForPreTraining, BertConfig(**SMALL)),
        (DPRQuestionEncoder, DPRConfig(**SMALL)),
        (ViltForQuestionAnswering, ViltConfig(**SMALL)),
        (XLNetForQuestionAnswering, XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=8, vocab_size=30)),
        (T5Model, T5Config(d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=8, vocab_size=30)),
    ],
)
def test_other_heads_are_refused(kind, config):
    """Some have a name like those that are known."""
    with pytest.raises(UnsupportedModelError, match=f"{kind.__name__} cannot be distilled"):
        head_of(kind(config))


def test_class_of_ones_own_is_what_it_comes_from():
    class Tagger(MarianMTModel):
        pass

    class Own(PreTrainedModel):
        config_class = BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.table = torch.nn.Embedding(30, 16)

        def forward(self, input_ids):
            return self.table(input_ids)

    class OwnLabels(Own):
        def forward(self, input_ids, labels=None):
            return self.table(input_ids)

    assert head_of(Tagger(make_model("marian").config)).kind == "tokens"
    assert head_of(Own(BertConfig(**SMALL))).kind == "embeddings"
    with pytest.raises(UnsupportedModelError):
        head_of(OwnLabels(BertConfig(**SMALL)))
    encoder = T5EncoderModel(T5Config(d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=8, vocab_size=30))
    assert head_of(encoder).kind == "embeddings"
    assert isinstance(make_model("whisper"), WhisperForConditionalGeneration)
