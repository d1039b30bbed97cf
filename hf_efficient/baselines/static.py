"""A student of depth 0: one vector for each token, made of the teacher, and the mean of those in a text.

    v_t = PCA(mean of the teacher's last states of [CLS] t [SEP])         model2vec (Tulkens and van Dongen 2024)
    e_t = a / (a + p(t)) v_t,  p(t) the part that t has of the training tokens      SIF (Arora et al. 2017)
    logits(text) = W mean(e_t for t in text) + b

Then W, b and e are fine-tuned on the labels, for as long as is best for a tenth of the rows that is held out.

    static = make_static(teacher, tokenizer, texts)                       # no labels: vectors of tokens
    tune(static, texts, labels, classes)
    static.save("out/static")

    SentenceTransformer("out/static").encode(texts)                       # the means, by either library
    StaticModel.from_pretrained("out/static").encode(texts)
"""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ..errors import CheckpointError, ConfigError
from ..io.disk import write_atomic
from ..io.json import read_json
from ..io.tensors import read_tensors, write_tensors
from ..models.modes import evaluating
from ..stages.base import Run
from .base import Baseline, Reader, Texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH = 256  # of the vectors, at most
SIF = 1e-3  # a, as in the paper
MOST = 50_000  # tokens that no training text has; more of them get no vector
BATCH = 256  # tokens at a time through the teacher
ROUNDS, PATIENCE, ROWS, RATE, HELD_OUT = 30, 3, 32, 1e-3, 0.1
STEPS = 100  # of a round at least: it goes through few rows more than once
WEIGHTS, TOKENIZER, HEAD = "model.safetensors", "tokenizer.json", "head"


@dataclass
class Static:
    """Vectors of tokens `[vocabulary, width]` with the `tokenizers.Tokenizer` that numbers them; after `tune` a head,
    `weight` `[classes, width]` and `bias` `[classes]`."""

    tokenizer: Any
    vectors: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Without special tokens, and never cut."""
        return [each.ids for each in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """`[texts, width]`: the mean vector of each; zeros for a text without tokens."""
        return _mean(self.vectors, self.tokens(texts))

    def logits(self, texts: Sequence[str]) -> torch.Tensor:
        """`[texts, classes]`."""
        if self.weight is None:
            raise ConfigError("These vectors have no head for classes. Call `tune` first.")
        return F.linear(self.encode(texts), self.weight, self.bias)

    def save(self, folder: str | Path, labels: Sequence[str] = ()) -> None:
        """A folder that sentence-transformers and model2vec load; the head lies in `head`, as a Dense module of the
        first. `labels`: the names of the classes, for a reader of the config."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, {"embeddings": self.vectors})
        write_atomic(folder / TOKENIZER, self.tokenizer.to_str())
        width = self.vectors.shape[1]
        config = {"model_type": "model2vec", "architectures": ["StaticModel"], "hidden_dim": width}
        config |= {"normalize": False, "max_length": None, "sif_coefficient": SIF, "embedding_dtype": "float32"}
        _write_json(folder / "config.json", config | ({"labels": list(labels)} if labels else {}))
        modules = {"idx": 0, "name": "0", "path": ".", "type": "sentence_transformers.models.StaticEmbedding"}
        _write_json(folder / "modules.json", [modules])
        if self.weight is not None and self.bias is not None:
            (folder / HEAD).mkdir(exist_ok=True)
            write_tensors(folder / HEAD / WEIGHTS, {"linear.weight": self.weight, "linear.bias": self.bias})
            dense = {"in_features": width, "out_features": len(self.bias), "bias": True}
            _write_json(folder / HEAD / "config.json", dense | {"activation_function": "torch.nn.Identity"})

    @classmethod
    def load(cls, folder: str | Path) -> "Static":
        """What `save` wrote; CheckpointError for files that are damaged, or do not fit together."""
        from tokenizers import Tokenizer

        folder = Path(folder)
        read_json(folder / TOKENIZER)  # bounded, and JSON
        tokenizer, tensors = Tokenizer.from_file(str(folder / TOKENIZER)), read_tensors(folder / WEIGHTS)
        head = read_tensors(folder / HEAD / WEIGHTS) if (folder / HEAD).is_dir() else {}
        static = cls(tokenizer, tensors["embeddings"], head.get("linear.weight"), head.get("linear.bias"))
        if len(static.vectors) < tokenizer.get_vocab_size():
            raise CheckpointError(f"{folder} has fewer vectors than tokens. Take it from a good copy.")
        return static


def make_static(
    teacher: "PreTrainedModel", tokenizer: Any, texts: Sequence[str], width: int = WIDTH, sif: float = SIF
) -> Static:
    """Vectors of all tokens, made of the teacher without training.

    Parameters:
        teacher: any encoder with a `last_hidden_state`, with or without a head.
        tokenizer: its own, a fast one.
        texts: how often each token stands in them is what tells common words.
        width: of the vectors, at most the teacher's.
        sif: a token of this frequency weighs half as much as a rare one.

    Raises:
        ConfigError: a tokenizer that is not fast.
    """
    check_fast(tokenizer)
    own = copy.deepcopy(tokenizer.backend_tokenizer)
    own.no_padding()
    own.no_truncation()
    static = Static(own, torch.zeros(0))
    flat = [token for row in static.tokens(texts) for token in row]
    counts = torch.bincount(torch.tensor(flat, dtype=torch.long), minlength=len(tokenizer)).double()
    others = (counts == 0).nonzero().flatten()
    chosen = torch.cat([counts.nonzero().flatten(), others[:MOST]]).sort().values
    states = _states(teacher, tokenizer, chosen).double()
    states -= states.mean(0)
    axes = torch.linalg.eigh(states.T @ states).eigenvectors.flip(1)[:, :width]  # [hidden, width]
    found = states @ axes
    found *= math.sqrt(found.shape[1]) / found.norm(dim=1).mean().clamp_min(1e-12)  # entries of about 1
    found *= (sif / (sif + counts[chosen] / max(len(flat), 1)))[:, None]
    static.vectors = torch.zeros(len(counts), found.shape[1])
    static.vectors[chosen] = found.float()
    return static


def check_fast(tokenizer: Any) -> None:
    """ConfigError for a tokenizer that the libraries of static vectors cannot read."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("static needs a fast tokenizer, one with a tokenizer.json. Leave static out.")


def _states(teacher: "PreTrainedModel", tokenizer: Any, tokens: torch.Tensor) -> torch.Tensor:
    """`[tokens, hidden]`: the mean of the last states of each token between the special tokens of a text."""
    special = tokenizer("a", return_special_tokens_mask=True)
    real = [place for place, is_special in enumerate(special["special_tokens_mask"]) if not is_special] or [0]
    before, after = special["input_ids"][: real[0]], special["input_ids"][real[-1] + 1 :]
    body, rows = teacher.base_model, []
    with evaluating(body):
        for some in tokens.split(BATCH):
            parts = [*before, None, *after]
            columns = [some if part is None else torch.full_like(some, part) for part in parts]
            ids = torch.stack(columns, dim=1).to(body.device)
            rows.append(body(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1).cpu())
    return torch.cat(rows).float()


def tune(static: Static, texts: Sequence[str], labels: Sequence[int], classes: int, seed: int = 0) -> int:
    """Train head and vectors in place; the number of epochs that was best for the rows held out."""
    generator = torch.Generator().manual_seed(seed)
    rows, targets = static.tokens(texts), torch.tensor(labels)
    order = torch.randperm(len(rows), generator=generator)
    held = order[: math.ceil(HELD_OUT * len(rows))] if len(rows) > 1 else order
    kept = order[len(held) :] if len(rows) > 1 else order
    used = torch.tensor(sorted({token for row in rows for token in row}), dtype=torch.long)
    places = {token: place for place, token in enumerate(used.tolist())}
    rows = [[places[token] for token in row] for row in rows]  # others would get no gradient
    vectors = static.vectors[used].clone().requires_grad_()
    weight = torch.zeros(classes, vectors.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.Adam([vectors, weight, bias], lr=RATE)
    best: tuple[float, int, list[torch.Tensor]] = (math.inf, 0, [])

    def loss(which: torch.Tensor) -> torch.Tensor:
        logits = F.linear(_mean(vectors, [rows[row] for row in which.tolist()]), weight, bias)
        return F.cross_entropy(logits, targets[which])

    epochs = math.ceil(STEPS / math.ceil(len(kept) / ROWS))  # of a round
    for number in range(1, ROUNDS + 1):
        order = torch.cat([torch.randperm(len(kept), generator=generator) for _ in range(epochs)])
        for some in kept[order].split(ROWS):
            optimizer.zero_grad()
            loss(some).backward()
            optimizer.step()
        with torch.no_grad():
            found = loss(held).item()
        if found < best[0]:
            best = found, number, [value.detach().clone() for value in (vectors, weight, bias)]
        elif number - best[1] >= PATIENCE:
            break
    if best[2]:
        static.vectors[used], static.weight, static.bias = best[2]
    else:
        raise ConfigError("static: the loss is not finite from the first epoch on. Leave static out.")
    return best[1] * epochs


def _mean(vectors: torch.Tensor, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """`[rows, width]`: the mean of the vectors that each row numbers."""
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0)[:-1]
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    return F.embedding_bag(flat, vectors, ends, mode="mean")


def _write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2) + "\n")


class StaticReader(Reader):
    """A tuned `Static` that answers texts."""

    def __init__(self, static: Static):
        super().__init__()
        self.static = static
        tensors = (static.vectors, static.weight, static.bias)
        self.weight_bytes = 4 * sum(tensor.numel() for tensor in tensors if tensor is not None)

    def scores(self, texts: Texts) -> torch.Tensor:
        return self.static.logits(list(map(" ".join, texts)))


class StaticVectors(Baseline):
    """Static vectors of tokens."""

    name = "static"

    def check(self, run: Run) -> None:
        check_fast(run.processor)

    def make(self, run: Run, student: Path, target: Path) -> dict[str, Any]:
        prepared = run.data()
        texts, labels = list(map(" ".join, run.read_texts("train"))), list(prepared.train["labels"])
        static = make_static(run.load(run.teacher_folder), run.processor, texts)
        epochs = tune(static, texts, labels, len(prepared.label_names), run.recipe.seed)
        static.save(target, prepared.label_names)
        tokens, width = static.vectors.shape
        about = f"the mean of {width} numbers for each token, made of the teacher's, fine-tuned"
        return {"about": about, "tokens": tokens, "width": width, "epochs": epochs}

    def reader(self, run: Run, folder: Path) -> Reader:
        return StaticReader(Static.load(folder))


STATIC = StaticVectors()
