"""Tiny models that read images or sounds beside texts, with processors made here, and rows in files for them.

folder = save_whisper(tmp_path / "whisper")
rows = save_sounds(tmp_path)                    # sounds.jsonl and its WAV files
"""

import json
import wave
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["red", "green", "blue", "dark", "what", "colour", "is", "it", "?"]
SAYINGS = ["low", "high", "low low", "high low"]
RATE = 16_000
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def save_llava(folder: Path) -> Path:
    """LLaVA on images of 16 pixels, 4 patches of which make as many tokens, with a word-level tokenizer."""
    specials = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>"}
    names = [*specials.values(), "<image>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=64,
        **{f"{name}_token": token for name, token in specials.items()},
    )
    square = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False)
    processor = transformers.LlavaProcessor(
        images, fast, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.save_pretrained(folder)
    config = transformers.LlavaConfig(
        vision_config=SIZES | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
        text_config=SIZES | {"model_type": "llama", "vocab_size": len(names), "pad_token_id": 0},
        image_token_index=names.index("<image>"),
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def save_images(folder: Path, count: int = 20) -> Path:
    """Squares of one colour, and what colour it is."""
    colours = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "dark": (20, 20, 20)}
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(count):
        name = list(colours)[number % 4]
        shade = np.clip(np.array(colours[name]) + number, 0, 255).astype("uint8")
        Image.fromarray(np.broadcast_to(shade, (20, 20, 3)).copy()).save(folder / "images" / f"{number}.png")
        rows.append({"image": f"images/{number}.png", "text": "what colour is it ?", "target": name})
    path = folder / "images.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def save_whisper(folder: Path) -> Path:
    """Whisper that hears a second, with a byte-level tokenizer without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = transformers.WhisperTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|startoftranscript|>", "<|notimestamps|>"]})
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    features = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    transformers.WhisperProcessor(features, tokenizer).save_pretrained(folder)
    size, end = len(tokenizer), tokenizer.eos_token_id
    config = transformers.WhisperConfig(
        vocab_size=size,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=50,
        max_target_positions=32,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder


def save_wav2vec(folder: Path) -> Path:
    """wav2vec 2.0 with CTC over letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"LOWHIG"]
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), do_lower_case=True)
    features = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    transformers.Wav2Vec2Processor(features, tokenizer).save_pretrained(folder)
    config = transformers.Wav2Vec2Config(
        **SIZES,
        vocab_size=len(letters),
        conv_dim=(8, 8),
        conv_kernel=(10, 8),
        conv_stride=(10, 16),
        num_feat_extract_layers=2,
        feat_extract_norm="layer",
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        ctc_zero_infinity=True,
    )
    torch.manual_seed(0)
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE, width: int = 2) -> None:
    """Mono, or [n, channels], from -1..1."""
    top = (1 << (8 * width - 1)) - 1
    numbers = np.round(np.asarray(samples) * top).astype("<i4")
    data = (numbers + 128).astype("uint8").tobytes() if width == 1 else _low_bytes(numbers, width)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if numbers.ndim == 1 else numbers.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)


def _low_bytes(numbers: np.ndarray, width: int) -> bytes:
    return numbers.reshape(-1, 1).view("uint8").reshape(-1, 4)[:, :width].tobytes()


def save_sounds(folder: Path, count: int = 20) -> Path:
    """Tones, low and high, and their names."""
    (folder / "sounds").mkdir(parents=True)
    rows = []
    for number in range(count):
        saying, time = SAYINGS[number % 4], np.arange(RATE // 5) / RATE
        tones = [np.sin(2 * np.pi * (300 if word == "low" else 900) * time) for word in saying.split()]
        write_wav(folder / "sounds" / f"{number}.wav", 0.3 * np.concatenate(tones) + 0.001 * (number % 7))
        rows.append({"audio": f"sounds/{number}.wav", "text": saying})
    path = folder / "sounds.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
