"""A cut tokenizer makes the same tokens of the texts it was cut for, knows as many characters, and survives saving."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from hf_efficient import ConfigError, UnsupportedModelError
from hf_efficient.pruning.cut.tokenizer import complete, trim_tokenizer
from hf_efficient.pruning.cut.vocabulary import used_tokens

from ...helpers import random_examples
from ..tiny_tokenizers import KINDS, TEXTS, tokenizer_of

# Words of the training texts, words made of their letters, and whatever hypothesis thinks of.
WORDS = sorted({word for text in TEXTS for word in text.split()})
SENTENCES = st.lists(st.sampled_from(WORDS) | st.text("abelnstw▁ </w#Ω東ß", min_size=1, max_size=9), max_size=6)
CORPORA = st.lists(SENTENCES.map(" ".join) | st.text(max_size=20), min_size=1, max_size=4)


def cut(kind: str, texts: list[str]) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast, tuple[int, ...]]:
    tokenizer = tokenizer_of(kind)
    kept = used_tokens(tokenizer, texts)
    return tokenizer, trim_tokenizer(tokenizer, kept), kept


def assert_same(before: PreTrainedTokenizerFast, after: PreTrainedTokenizerFast, kept: tuple[int, ...], text: str):
    """The same strings, the same ids but for their numbers, the same text back."""
    old, new = before(text, return_offsets_mapping=True), after(text, return_offsets_mapping=True)
    assert after.convert_ids_to_tokens(new.input_ids) == before.convert_ids_to_tokens(old.input_ids), text
    assert [kept[index] for index in new.input_ids] == old.input_ids
    assert new.offset_mapping == old.offset_mapping
    assert after.decode(new.input_ids, skip_special_tokens=True) == before.decode(
        old.input_ids, skip_special_tokens=True
    )


@pytest.mark.parametrize("kind", KINDS)
@random_examples(25, derandomize=True)
@given(texts=CORPORA)
def test_the_texts_are_cut_as_before(kind, texts):
    before, after, kept = cut(kind, texts)
    assert len(after) == len(kept) < len(before) or set(kept) == set(before.get_vocab().values())
    for text in texts:
        assert_same(before, after, kept, text)


@pytest.mark.parametrize("kind", KINDS)
@random_examples(25, derandomize=True)
@given(texts=CORPORA)
def test_unseen_texts_have_no_more_unknowns(kind, texts):
    before, after, _ = cut(kind, ["the lazy dog"])
    for text in texts:
        # In WordPiece and where words are marked, a letter may be known at one place of a word only.
        spelled = " ".join(f"{letter} a{letter} {letter}a a{letter}a" for letter in text)
        if not before.unk_token or before.unk_token not in before.tokenize(spelled):
            assert not after.unk_token or after.unk_token not in after.tokenize(text)
            old, new = (one(text, add_special_tokens=False).input_ids for one in (before, after))
            assert after.decode(new) == before.decode(old)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_names_a_token_names_it_still(kind):
    before, after, kept = cut(kind, ["sea shells", "shells"])
    assert 0 < len(after) < len(before)
    assert after.special_tokens_map == before.special_tokens_map
    assert {kept[new]: token.content for new, token in after.added_tokens_decoder.items()} == {
        old: token.content for old, token in before.added_tokens_decoder.items()
    }
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "cls_token_id", "mask_token_id"):
        old, new = getattr(before, name), getattr(after, name)
        assert (new is None) == (old is None) and (old is None or kept[new] == old)
    padded = after(["sea", "sea shells sea"], padding=True, return_tensors="pt") if before.pad_token else None
    assert padded is None or padded.input_ids.max() < len(after)
    pair = after("sea", "shells").input_ids
    assert [kept[index] for index in pair] == before("sea", "shells").input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_one_is_loaded_by_the_auto_class(kind, tmp_path):
    before, after, kept = cut(kind, TEXTS[:2])
    after.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(after) is type(loaded) is type(before)
    assert loaded.get_vocab() == after.get_vocab()
    for text in (*TEXTS, "unseen wörds"):
        assert loaded(text).input_ids == after(text).input_ids
    for text in TEXTS[:2]:
        assert_same(before, loaded, kept, text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_given_one_stays_as_it_is(kind):
    tokenizer = KINDS[kind]()
    tokenizer.backend_tokenizer.enable_truncation(max_length=5)
    if tokenizer.pad_token:
        pad = {"pad_id": tokenizer.pad_token_id, "pad_token": tokenizer.pad_token}
        tokenizer.backend_tokenizer.enable_padding(length=5, **pad)
    before, config = tokenizer.backend_tokenizer.to_str(), repr(tokenizer.init_kwargs)
    small = trim_tokenizer(tokenizer, used_tokens(tokenizer, TEXTS[:1]))
    assert tokenizer.backend_tokenizer.to_str() == before
    assert repr(tokenizer.init_kwargs) == config
    assert small.name_or_path == tokenizer.name_or_path


def test_long_texts_are_counted_to_their_end():
    tokenizer = KINDS["bert"]()
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    assert tokenizer.convert_tokens_to_ids("shore") in used_tokens(tokenizer, TEXTS[1:2])


def test_an_unknown_word_stays_unknown():
    """Without `ab`, the longest match before it fails, `abX` would be `a ##bX`."""
    words = ["[UNK]", "a", "##b", "ab", "##bX", "z", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")),
        unk_token="[UNK]",
    )
    other = used_tokens(tokenizer, ["abX"])
    naive = complete(tokenizer, [*tokenizer("abX").input_ids, words.index("##bX")])
    assert tokenizer.tokenize("abX") == ["[UNK]"] == trim_tokenizer(tokenizer, {*other, 4}).tokenize("abX")
    assert trim_tokenizer(tokenizer, naive).tokenize("abX") == ["a", "##bX"]


def test_merges_on_the_way_stay_and_others_go():
    before, after, kept = cut("byte-level", ["shells"])
    old, new = (json.loads(one.backend_tokenizer.to_str())["model"]["merges"] for one in (before, after))
    assert 0 < len(new) < len(old)
    assert new == [pair for pair in old if pair in new]  # in their old order
    names = set(before.convert_ids_to_tokens(kept))
    assert all({left, right, left + right} <= names for left, right in new)
    assert "".join(after.tokenize("shells")) == "shells" and len(after.tokenize("shells")) < 6


def test_the_price_of_an_unknown_character_stays():
    """It is 10 below the lowest score. Were that of `zzz` forgotten, `a ? cde fgh` would become the best reading."""
    scores = {"<unk>": 0.0, "a": -1.0, "cde": -1.0, "fgh": -1.0, "abcd": -30.0, "efgh": -30.0, "zzz": -100.0}
    backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    texts = ["abcdefgh", "cdefgh"]
    kept = used_tokens(tokenizer, texts)
    small = trim_tokenizer(tokenizer, kept)
    assert tokenizer.tokenize(texts[0]) == small.tokenize(texts[0]) == ["abcd", "efgh"]
    spec = json.loads(small.backend_tokenizer.to_str())
    assert ["zzz", -100.0] in spec["model"]["vocab"]
    forgetful = Tokenizer(models.Unigram([pair for pair in scores.items() if pair[0] != "zzz"], unk_id=0))
    assert forgetful.encode(texts[0]).tokens == ["a", "b", "cde", "fgh"]


def test_a_class_that_builds_something_else_is_replaced_by_the_plain_one(tmp_path):
    """BertTokenizer makes its own normalizer and forgets one that was changed."""
    from tokenizers import normalizers

    tokenizer = KINDS["bert"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("fox", "dog"), normalizers.BertNormalizer()]
    )
    kept = used_tokens(tokenizer, ["fox"])
    small = trim_tokenizer(tokenizer, kept)
    small.save_pretrained(tmp_path)
    for one in (small, AutoTokenizer.from_pretrained(tmp_path)):
        assert_same(tokenizer, one, kept, "fox")
        assert one.decode(one("fox").input_ids, skip_special_tokens=True) == "dog"


def test_what_is_refused(tmp_path):
    tokenizer = tokenizer_of("byte-level")
    with pytest.raises(ConfigError, match=r"tokens are not kept.*complete\(tokenizer, kept\)"):
        trim_tokenizer(tokenizer, [0, 1, 2])
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
    with pytest.raises(UnsupportedModelError, match=r"of the kind WordLevel.*BPE, Unigram, WordPiece"):
        complete(words, [0])
    with pytest.raises(UnsupportedModelError, match="ByT5Tokenizer is written in Python; only fast tokenizers"):
        complete(ByT5Tokenizer(), [0])
    with pytest.raises(UnsupportedModelError, match="A transformers tokenizer is needed, got str"):
        complete("bert-base-uncased", [0])
