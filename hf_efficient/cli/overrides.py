"""Recipe keys as options: `--prune.ratio 0.5 --data.limit=200`.

parse_overrides(["--prune.ratio", "0.5", "--seed=1"])    # {"prune.ratio": "0.5", "seed": "1"}
"""

from collections.abc import Sequence

from ..errors import ConfigError, nearest


def parse_overrides(arguments: Sequence[str], options: Sequence[str] = ()) -> dict[str, str]:
    """Dotted key -> text, as written; ConfigError for no option, one without a value, or one that looks like a
    misspelling of `options`, the command's own ones."""
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} is not an option. Override recipe keys as `--prune.ratio 0.5`.")
        key, equals, value = word[2:].partition("=")
        near = None if "." in key else nearest(key.replace("_", "-"), options, cutoff=0.75)
        if near is not None:
            raise ConfigError(f"No such option --{key}. Did you mean --{near}?")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} needs a value: `--{key} VALUE`.")
            value = rest.pop(0)
        overrides[key] = value
    return overrides
