"""How a number is written, the same everywhere: counts, bytes, times, scores, ratios.

format_count(22_714_757), format_ms(12.34), format_speedup(8.224)          # "22.7M", "12.3 ms", "8.2x"

A number of any size and sign has a short text.
"""

import math
from decimal import Decimal

from .schema import Score

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_count(value: float) -> str:
    """Three digits and a prefix: `22.7M` parameters, `2.75G` MACs; below 1,000 as it is."""
    if abs(value) >= 1e15 and not (isinstance(value, float) and math.isinf(value)):
        return f"{Decimal(value):.2e}"  # an integer may be too large for a float
    # 0.9995: what would be written as 1000k is written as 1.00M.
    for size, prefix in _PREFIXES:
        if 1000 <= value < math.inf and value >= 0.9995 * size:
            return f"{_three_digits(value / size)}{prefix}"
    return str(value)


def format_bytes(value: float) -> str:
    """Decimal units: `90.9 MB`."""
    text = format_count(value)
    return f"{text[:-1]} {text[-1].replace('k', 'K')}B" if text[-1:] in ("k", "M", "G", "T") else f"{text} B"


def format_ms(value: float) -> str:
    """Three digits: `12.3 ms`, `0.412 ms`."""
    return f"{_three_digits(value)} ms"


def format_seconds(value: float, decimals: int = 1) -> str:
    """`41.3 s`."""
    return f"{fixed(value, decimals)} s"


def _three_digits(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{decimals}f}"


def fixed(value: float, decimals: int, sign: str = "") -> str:
    """So many decimals, or three digits where that would be a long text."""
    return f"{value:{sign}.{decimals}f}" if abs(value) < 1e9 else f"{value:{sign}.3g}"


def is_fraction(name: str) -> bool:
    """Accuracies are shown in percent, losses and perplexities as they are."""
    return name.endswith(("accuracy", "retrieval@1", "f1", "ndcg@10", "mrr@10", "spearman", "pearson"))


def scale_of(name: str) -> int:
    """What a score is multiplied by where it is shown."""
    return 100 if is_fraction(name) else 1


def format_score(score: Score) -> str:
    """`84.5% ± 0.6` or `3.214 ± 0.021`: value and standard error."""
    if is_fraction(score.name):
        return f"{fixed(100 * score.value, 1)}% ± {fixed(100 * score.standard_error, 1)}"
    return f"{fixed(score.value, 3)} ± {fixed(score.standard_error, 3)}"


def format_change(name: str, change: float, error: float) -> str:
    """`-0.9 ± 0.6 points` of an accuracy, `+0.031 ± 0.008` of a loss."""
    if is_fraction(name):
        return f"{fixed(100 * change, 1, '+')} ± {fixed(100 * error, 1)} points"
    return f"{fixed(change, 3, '+')} ± {fixed(error, 3)}"


def format_ratio(value: float) -> str:
    """Two digits after the point, more below 0.1, and never `1.00x` for what is less: `1.94x`, `0.042x`, `0.997x`."""
    if not abs(value) < 1e6 or 0 < value < 1e-4:
        return f"{value:.3g}x"
    decimals = 2 if value >= 0.1 or value <= 0 else max(3, 1 - math.floor(math.log10(value)))
    while 0 < value < 1 and decimals < 17 and float(f"{value:.{decimals}f}") == 1:
        decimals += 1
    return f"{value:.{decimals}f}x"


def format_speedup(value: float) -> str:
    """`8.2x`; with more digits where one would hide which of both is faster: `1.04x`, `0.96x`."""
    return f"{value:.1f}x" if 1.095 <= value < 1e6 else format_ratio(value)
