"""GGUF files in llama.cpp, by whichever package that carries it is installed.

program = LlamaCpp(Path("out/model.gguf"), threads=2, exact=True)
program(input_ids, attention_mask).logits
greedy(program, tokens, count=12)                   # one token at a time, with llama.cpp's own cache

llama-cpp-python is compiled where it is installed; cyllama comes as a wheel (Linux, macOS, Windows).
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BINDINGS = {"llama_cpp": "llama_cpp_python", "cyllama": "cyllama"}  # module: distribution
_FLOAT32 = 0  # ggml's number of that type
_LEAST = 64  # tokens of the first room for keys and values


def installed() -> str | None:
    """The module that is taken; None if there is none."""
    return next((module for module in BINDINGS if find_spec(module) is not None), None)


class LlamaCpp:
    """A GGUF file, called as a causal model of transformers: row after row, padding left out.

    Parameters:
        exact: attention, and what is kept for it, in float32 instead of float16.
    """

    def __init__(self, path: Path, threads: int, exact: bool):
        self.path, self.threads, self.exact = path, threads, exact
        self.engine: Any = None
        self.room = 0

    def __call__(self, input_ids: "Tensor", attention_mask: "Tensor | None" = None) -> Any:
        import torch
        from transformers.modeling_outputs import CausalLMOutput

        logits = None
        for row, ids in enumerate(input_ids):
            real = torch.ones_like(ids) if attention_mask is None else attention_mask[row]
            tokens = ids[real.bool()].tolist()
            scores = self.started(len(tokens)).read(tokens, every=True)
            if logits is None:
                logits = torch.zeros(*input_ids.shape, scores.shape[-1])
            logits[row, real.bool()] = scores
        return CausalLMOutput(logits=logits)

    def started(self, length: int) -> Any:
        """The engine with an empty cache, which has room for so many tokens."""
        if length > self.room:
            self.room = max(_LEAST, length)
            engine = _LlamaCppPython if installed() == "llama_cpp" else _Cyllama
            self.engine = engine(self.path, self.room, self.threads, self.exact)
        self.engine.clear()
        return self.engine


def greedy(program: LlamaCpp, tokens: Sequence[int], count: int) -> list[int]:
    """The likeliest tokens after `tokens`, up to and with the one that ends a text, at most `count`."""
    engine, written = program.started(len(tokens) + count), []
    scores = engine.read(list(tokens))
    while len(written) < count:
        written.append(int(scores[-1].argmax()))
        if engine.ends(written[-1]):
            break
        scores = engine.read(written[-1:])
    return written


class _LlamaCppPython:
    def __init__(self, path: Path, room: int, threads: int, exact: bool):
        import llama_cpp

        kept = {"type_k": _FLOAT32, "type_v": _FLOAT32} if exact else {}
        sizes = {"n_ctx": room, "n_batch": room, "n_ubatch": room, "n_threads": threads, "n_threads_batch": threads}
        self.model = llama_cpp.Llama(str(path), logits_all=True, verbose=False, **sizes, **kept)

    def clear(self) -> None:
        self.model.reset()

    def read(self, tokens: list[int], every: bool = False) -> "Tensor":
        """Logits `[T, V]`, or `[1, V]` of the last token, after what was read before."""
        import torch

        start = self.model.n_tokens
        self.model.eval(tokens)
        rows = self.model.scores[start if every else self.model.n_tokens - 1 : self.model.n_tokens]
        return torch.from_numpy(rows.copy())

    def ends(self, token: int) -> bool:
        return token == self.model.token_eos()

    def tokenize(self, text: str) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=False, special=True)


class _Cyllama:
    def __init__(self, path: Path, room: int, threads: int, exact: bool):
        from cyllama.llama import llama_cpp as bound

        class Model(bound.LlamaModel):  # get_logits_ith of 0.2.18 asks the model for a number that it does not have
            @property
            def n_vocab(self) -> int:
                return self.get_vocab().n_vocab

        bound.disable_logging()
        sizes = bound.LlamaContextParams()
        sizes.n_ctx = sizes.n_batch = sizes.n_ubatch = room
        sizes.n_threads = sizes.n_threads_batch = threads
        if exact:
            sizes.type_k = sizes.type_v = _FLOAT32
            sizes.flash_attn_type = 0  # flash attention has float16 inside
        self.bound, self.room, self.position = bound, room, 0
        self.model = Model(path_model=str(path), params=bound.LlamaModelParams())
        self.words = self.model.get_vocab()
        self.context = bound.LlamaContext(model=self.model, params=sizes)

    def clear(self) -> None:
        self.context.kv_cache_clear()
        self.position = 0

    def read(self, tokens: list[int], every: bool = False) -> "Tensor":
        import torch

        batch = self.bound.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for place, token in enumerate(tokens):
            batch.add(token, self.position + place, [0], every or place == len(tokens) - 1)
        self.context.decode(batch)
        self.position += len(tokens)
        rows = range(len(tokens)) if every else [-1]
        return torch.stack([torch.tensor(self.context.get_logits_ith(row)) for row in rows])

    def ends(self, token: int) -> bool:
        return self.words.is_eog(token)

    def tokenize(self, text: str) -> list[int]:
        return self.words.tokenize(text, False, True)
