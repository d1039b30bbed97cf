"""Sounds to samples: WAV with the standard library, other formats through soundfile where it is installed.

    read_sound(Path("said.wav").read_bytes(), rate=16_000)      # [n], float32 in -1..1, one channel

A sound is a path, a `datasets.Audio`, an object with `array` and `sampling_rate`, or a list of numbers in -1..1 at the
rate of the model.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import DataError, shown
from .images import bytes_of

if TYPE_CHECKING:
    import numpy as np

MAX_SAMPLES = 1 << 26  # over an hour at 16,000 a second


def samples_of(sound: Any, rate: int) -> np.ndarray:
    """One sound of a row as float32 [n] at `rate` samples a second.

    Raises:
        DataError: it is none, cannot be read, or has numbers beyond -1..1.
    """
    import numpy as np

    if isinstance(sound, Mapping) and {"bytes", "path"} <= sound.keys():
        return read_sound(bytes_of(sound, "sound"), rate)
    own_rate = rate
    if isinstance(sound, Mapping) and {"array", "sampling_rate"} <= sound.keys():
        sound, own_rate = sound["array"], sound["sampling_rate"]
    if not isinstance(sound, list | tuple | np.ndarray):
        raise DataError(f"it has {shown(sound)}, where a sound is needed: a path, or numbers from -1 to 1.")
    try:
        samples = np.asarray(sound, dtype="float64")
    except (ValueError, TypeError) as error:
        raise DataError(f"its samples are no numbers ({error}).") from error
    return _checked(samples, own_rate, rate)


def read_sound(data: bytes, rate: int) -> np.ndarray:
    """An encoded sound as float32 [n] at `rate` samples a second: channels are averaged, another rate is resampled.

    Raises:
        DataError: it cannot be decoded.
    """
    if data[:4] == b"RIFF":
        return _checked(*_read_wav(data), rate)
    try:
        import soundfile
    except ImportError as error:
        raise DataError("it is no WAV file, and other formats need soundfile: pip install soundfile.") from error
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            count, own_rate = file.frames * file.channels, file.samplerate
            samples = file.read(dtype="float64", always_2d=True) if count <= MAX_SAMPLES else None
    except Exception as error:  # the decoders raise whatever the bytes make them run into
        raise DataError(f"the sound cannot be decoded ({str(error)[:200]}): mend or remove it.") from error
    if samples is None:
        raise DataError(f"it has {count:,} samples, at most {MAX_SAMPLES:,} are read. Cut it.")
    return _checked(samples.mean(1), own_rate, rate)


def _read_wav(data: bytes) -> tuple[np.ndarray, int]:
    import numpy as np

    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            if file.getnframes() > MAX_SAMPLES:
                raise DataError(f"it has {file.getnframes():,} samples, at most {MAX_SAMPLES:,} are read. Cut it.")
            raw = np.frombuffer(file.readframes(file.getnframes()), dtype="uint8")
    except (wave.Error, EOFError, ValueError) as error:
        raise DataError(f"the WAV file cannot be decoded ({error}): save it as PCM of 8 to 32 bits.") from error
    raw = raw[: len(raw) // (width * channels) * width * channels]  # of a file that ends too early
    if width == 1:  # the one width that has no sign
        values = raw.astype("float64") - 128
    else:
        wide = np.zeros((len(raw) // width, 4), dtype="uint8")
        wide[:, 4 - width :] = raw.reshape(-1, width)
        values = wide.view("<i4")[:, 0] / float(1 << (32 - 8 * width))
    return values.reshape(-1, channels).mean(1) / (1 << (8 * width - 1)), rate


def _checked(samples: np.ndarray, own_rate: Any, rate: int) -> np.ndarray:
    import numpy as np

    if samples.ndim != 1 or not samples.size or samples.size > MAX_SAMPLES:
        raise DataError(
            f"it has the shape {samples.shape}, where one channel of 1 to {MAX_SAMPLES:,} samples is needed."
        )
    if not np.abs(samples).max() <= 1:  # also false for NaN
        raise DataError(f"it has samples from {samples.min():g} to {samples.max():g}; they must lie in -1..1.")
    if type(own_rate) is not int or not 1 <= own_rate <= 1 << 20:
        raise DataError(f"its sampling rate is {shown(own_rate)}, where samples a second are needed.")
    if samples.size * rate > MAX_SAMPLES * own_rate:  # a file may say one sample a second
        raise DataError(
            f"its {samples.size:,} samples at {own_rate:,} a second would be more than {MAX_SAMPLES:,} at {rate:,}. "
            "Cut it, or mend its sampling rate."
        )
    return resampled(samples, own_rate, rate).astype("float32")


def resampled(samples: np.ndarray, own_rate: int, rate: int) -> np.ndarray:
    """The same sound at another rate, by its spectrum: what both rates can hold stays, the rest is left out."""
    import numpy as np

    if own_rate == rate:
        return samples
    count = max(1, round(len(samples) * rate / own_rate))
    spectrum = np.fft.rfft(samples)[: count // 2 + 1]
    return np.fft.irfft(spectrum, count) * (count / len(samples))
