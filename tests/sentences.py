"""Tiny models of the real sentence-transformers, and what they answer."""

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from hf_efficient.models.pooling import pool

from .pipeline.test_tasks_end_to_end import model_folder

WIDTH, NARROW = 16, 8
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19"]


def chain(folder: Path, pooling: str = "mean", *, dense: bool = False, normalize: bool = False, **said) -> Path:
    """A BERT of two layers that reads 12 tokens, saved by sentence-transformers."""
    torch.manual_seed(1)
    transformer = Transformer(str(model_folder(folder.with_name(f"{folder.name}-plain"), "sentence-embeddings")))
    transformer.max_seq_length = 12
    after = [Dense(WIDTH, NARROW)] * dense + [Normalize()] * normalize
    model = SentenceTransformer(modules=[transformer, Pooling(WIDTH, pooling), *after], device="cpu", **said)
    model.save(str(folder))
    return folder


def load(folder: Path, **options) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", **options)


@torch.no_grad()
def by_hand(model: SentenceTransformer, pooling: str, texts: list[str] = TEXTS, length: int = 12) -> torch.Tensor:
    """The vectors as our own pooling has them, and what comes after it."""
    inputs = model.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    states = model[0].model(**inputs).last_hidden_state
    features = {"sentence_embedding": pool(states, inputs["attention_mask"].bool(), pooling)}
    for module in list(model)[2:]:
        features = module(features)
    return features["sentence_embedding"]
