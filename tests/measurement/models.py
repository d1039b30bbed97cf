"""Tiny models with sizes that can be multiplied by hand."""

import torch
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY, WIDTH, INNER, POSITIONS, TYPES = 50, 32, 48, 64, 2


def bert_config(**changes) -> BertConfig:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": TYPES,
        "num_labels": 3,
    }
    return BertConfig(**{**settings, **changes})


def bert_classifier(**changes) -> BertForSequenceClassification:
    return BertForSequenceClassification(bert_config(**changes))


def bert_layer() -> BertModel:
    return BertModel(bert_config(), add_pooling_layer=False)


def gpt2(**changes) -> GPT2LMHeadModel:
    settings = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 1, "n_head": 4, "n_positions": POSITIONS}
    return GPT2LMHeadModel(GPT2Config(**{**settings, "bos_token_id": 0, "eos_token_id": 0, **changes}))


def t5() -> T5ForConditionalGeneration:
    config = T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=INNER, num_layers=1, num_heads=4)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def bart_classifier() -> BartForSequenceClassification:
    sizes = {
        f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 1), ("ffn_dim", 48))
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return BartForSequenceClassification(
        BartConfig(vocab_size=VOCABULARY, d_model=WIDTH, max_position_embeddings=POSITIONS, **sizes, **heads)
    )


def vit() -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=INNER,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=3,
        )
    )


def token_data(lengths, padding=-100):
    texts = [torch.randint(1, 50, (length,)) for length in lengths]
    width = max(lengths)
    return [
        {
            "input_ids": torch.nn.functional.pad(text, (0, width - len(text))),
            "attention_mask": (torch.arange(width) < len(text)).long(),
            "labels": torch.nn.functional.pad(text, (0, width - len(text)), value=padding),
        }
        for text in texts
    ]
