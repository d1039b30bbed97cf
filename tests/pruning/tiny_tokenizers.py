"""Tokenizers of every kind, trained here on a few sentences, and as the classes of transformers wrap them."""

import json
from collections.abc import Callable
from functools import cache

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "the quick brown fox jumps over the lazy dog",
    "she sells sea shells by the sea shore, and the shells she sells are sea shells for sure",
    "banana bandana cabana: anna ran an ant farm in havana!",
    "Größe, naïve café; Straße Ωmega 東京 tower - 100% of 2,048 tokens?",
    "aaaa aaaaa aaaaaa abababab babababa (abcabc) low lower lowest newer newest wider widest",
)
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_NAMES = list(SPECIAL.values())


def _train(tokenizer: Tokenizer, trainer: object) -> Tokenizer:
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    ends = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _train(tokenizer, trainers.WordPieceTrainer(vocab_size=220, special_tokens=_NAMES, show_progress=False))


def _byte_level(specials_last: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own = [] if specials_last else _NAMES
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=own, initial_alphabet=alphabet, show_progress=False)
    tokenizer = _train(tokenizer, trainer)
    if specials_last:  # as GPT-2, Llama 3 and Whisper have them
        tokenizer.add_special_tokens(_NAMES)
    return tokenizer


def _whole_words() -> Tokenizer:
    """As Llama 3: a word that is a token needs no merges."""
    tokenizer = _byte_level(specials_last=True)
    vocabulary, merges = _bpe_parts(tokenizer)
    tokenizer.model = models.BPE(vocabulary, merges[: len(merges) // 2], ignore_merges=True)
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """As Llama 2: no pre-tokenizer, so that tokens may cross words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    names = [*_NAMES, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=430, special_tokens=names, max_token_length=8, show_progress=False)
    tokenizer = _train(tokenizer, trainer)
    vocabulary, merges = _bpe_parts(tokenizer)
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer, made.decoder = tokenizer.normalizer, tokenizer.decoder
    made.add_special_tokens(_NAMES)
    return made


def _word_ends() -> Tokenizer:
    """As CLIP: the last letter of a word is marked."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    options = {"vocab_size": 220, "special_tokens": _NAMES, "end_of_word_suffix": "</w>", "show_progress": False}
    return _train(tokenizer, trainers.BpeTrainer(**options))


def _word_middles() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    options = {"vocab_size": 220, "special_tokens": _NAMES, "continuing_subword_prefix": "##", "show_progress": False}
    return _train(tokenizer, trainers.BpeTrainer(**options))


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    options = {"vocab_size": 160, "special_tokens": _NAMES, "unk_token": "<unk>", "show_progress": False}
    return _train(tokenizer, trainers.UnigramTrainer(**options))


def _bpe_parts(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _pieces(tokenizer: Tokenizer) -> list[tuple[str, float]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["vocab"]]


def _roberta() -> PreTrainedTokenizerFast:
    vocabulary, merges = _bpe_parts(_byte_level())
    names = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    return transformers.RobertaTokenizer(vocab=vocabulary, merges=merges, **SPECIAL | names)


def _gpt2() -> PreTrainedTokenizerFast:
    vocabulary, merges = _bpe_parts(_byte_level(specials_last=True))
    return transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges)


def _whisper() -> PreTrainedTokenizerFast:
    vocabulary, merges = _bpe_parts(_byte_level(specials_last=True))
    made = transformers.WhisperTokenizer(vocab=vocabulary, merges=merges)
    names = ["<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    made.add_special_tokens({"extra_special_tokens": names})
    made.set_prefix_tokens()
    return made


def _clip() -> PreTrainedTokenizerFast:
    vocabulary, merges = _bpe_parts(_word_ends())
    names = {"<s>": "<|startoftext|>", "</s>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in vocabulary.items()}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)


def _llama() -> PreTrainedTokenizerFast:
    vocabulary, merges = _bpe_parts(_byte_fallback())
    return transformers.LlamaTokenizer(vocab=vocabulary, merges=merges)


def _t5() -> PreTrainedTokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(p for p in _pieces(_unigram()) if p[0] not in _NAMES)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=3)


def _xlm_roberta() -> PreTrainedTokenizerFast:
    first = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    own = [piece for piece in _pieces(_unigram()) if piece[0] not in _NAMES]
    return transformers.XLMRobertaTokenizer(vocab=[*first, *own, ("<mask>", 0.0)])


def _bert() -> PreTrainedTokenizerFast:
    names = {"<pad>": "[PAD]", "<s>": "[CLS]", "</s>": "[SEP]", "<unk>": "[UNK]"}
    vocabulary = {names.get(token, token): index for token, index in _wordpiece().get_vocab().items()}
    return transformers.BertTokenizer(vocab=vocabulary | {"[MASK]": len(vocabulary)})


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "wordpiece": lambda: _finish(_wordpiece()),
    "byte-level": lambda: _finish(_byte_level()),
    "specials-last": lambda: _finish(_byte_level(specials_last=True)),
    "whole-words": lambda: _finish(_whole_words()),
    "byte-fallback": lambda: _finish(_byte_fallback()),
    "word-ends": lambda: _finish(_word_ends()),
    "word-middles": lambda: _finish(_word_middles()),
    "unigram": lambda: _finish(_unigram()),
    "bert": _bert,
    "roberta": _roberta,
    "gpt2": _gpt2,
    "whisper": _whisper,
    "clip": _clip,
    "llama": _llama,
    "t5": _t5,
    "xlm-roberta": _xlm_roberta,
}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Made once; no test may change it."""
    return KINDS[kind]()
