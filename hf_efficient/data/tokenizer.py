"""A tokenizer for a model that is trained from nothing: byte-level BPE, learned from its training texts.

    tokenizer = train_tokenizer(texts, 4096)
    tokenizer("any text at all")["input_ids"]                          # bytes are its alphabet: nothing is unknown

Sennrich et al. 2016 (BPE), Radford et al. 2019 (over bytes).
"""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import ConfigError, DataError, shown

PAD, END, MASK = "<pad>", "<end>", "<mask>"
LEAST, MOST = 260, 1 << 20  # the bytes, the special tokens and one merge; above any vocabulary that was ever trained


def train_tokenizer(texts: Iterable[str], size: int, *, close: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `size` tokens, the 256 bytes and three special ones among them.

    Parameters:
        close: every text gets the token `<end>`, as encoder-decoders expect; a decoder's prompt must not have it.

    Raises:
        ConfigError: a size below 260 or above 1,048,576.
        DataError: the texts are empty.
    """
    if isinstance(size, bool) or not isinstance(size, int) or not LEAST <= size <= MOST:
        raise ConfigError(f"The size of a tokenizer must be an integer from {LEAST} to {MOST:,}, got {shown(size)}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), [PAD, END, MASK]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() == len(special) + len(alphabet):
        raise DataError("The training texts are empty: no tokenizer can be learned from them.")
    if close:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, special.index(END))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, mask_token=MASK)


def token_fields(tokenizer: PreTrainedTokenizerBase, config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """What a fresh config must know of its tokenizer: the size of the vocabulary and the special tokens."""
    fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    fields |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if getattr(config_class(), "is_encoder_decoder", False):
        fields["decoder_start_token_id"] = tokenizer.pad_token_id
    return fields
