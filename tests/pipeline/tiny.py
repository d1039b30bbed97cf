"""A recipe of a tiny fresh model on digits, with a stage of every sort; and one of a tiny BERT on rows of text."""

import json
from pathlib import Path

from transformers import BertConfig, BertForSequenceClassification

from hf_efficient import Recipe

TRAINING = {"epochs": 2, "batch_size": 32, "learning_rate": 1e-3}
TINY = {
    "name": "tiny",
    "task": "image-classification",
    "model": {
        "config": {
            "model_type": "vit",
            "image_size": 8,
            "patch_size": 2,
            "num_channels": 1,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "hidden_dropout_prob": 0.1,
        }
    },
    "data": {"name_or_path": "bundled:digits", "limit": 200},
    "teacher": TRAINING,
    "stages": [
        {"attention": {"kind": "local", "window": 4, "global_tokens": 1}},
        {"prune": {"ratio": 0.4, "calibration_samples": 32}},
        {"distill": {**TRAINING, "losses": {"kd": 1.0, "ce": 0.5, "hidden": 0.1}}},
    ],
    "measure": {"repeats": 2},
}


def make_bert(folder: Path, **changes) -> Path:
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=40, **fields | changes)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


def text_recipe(model: Path, rows: Path, **changes) -> Recipe:
    recipe = {
        "name": "text",
        "task": "text-classification",
        "model": {"name_or_path": str(model)},
        "data": {"name_or_path": str(rows), "max_length": 8},
        "stages": [{"prune": {"ratio": 0.3, "granularity": ["neuron"]}}],
        "measure": {"repeats": 2},
    }
    return Recipe.from_dict(recipe | changes)
