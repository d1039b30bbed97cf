"""The one place that knows what a secret looks like: keys of providers, credentials in URLs, and names of settings.

without_secrets("https://me:pw@host/a")              # https://host/a
is_secret("hubToken", "abc")                         # True; is_secret("pad_token", "[PAD]") is not

What only looks like one stays: commits, digests, the tokens that tokenizers have.
"""

import re
import urllib.parse
from collections.abc import Iterable
from typing import Any

REMOVED = "[removed]"

# Patterns are strings, which `re` compiles at the first use and keeps: whoever imports the package waits for none.
_KEYS = (
    r"(?<![A-Za-z0-9])(?:"
    r"(?:hf|api_org)_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|gl[a-z]{1,5}-[\w-]{16,}"  # GitHub, GitLab
    r"|sk-(?:ant|proj|or|svcacct|admin)-[\w-]{16,}"  # Anthropic, OpenAI
    r"|sk-(?:[A-Za-z0-9]{1,20}[-_]){0,4}[A-Za-z0-9]{16,}[\w-]*|[sr]k_(?:live|test)_[A-Za-z0-9]{10,}"
    r"|(?:gsk|r8|npm|dop_v1)_[A-Za-z0-9]{20,}|(?:nvapi|pypi|xapp)-[\w-]{16,}|SG\.[\w-]{16,}\.[\w-]{16,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])|AIza[\w-]{30,}|ya29\.[\w-]{20,}|xox[a-z]-[\w-]{10,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # a JSON web token
    r")"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)"
)
_IN_URL = r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]{0,20}://)[^\s/?#]{1,200}@"
_BEARER = r"(?i)\b(bearer\s+)(?=\S{0,500}[0-9._=])[\w.~+/=-]{8,}"
_HEADER = r"(?i)\b(authorization[\"']?\s{0,3}[:=]\s{0,3}[\"']?(?:(?:basic|token|digest|bearer)\s+)?)[^\s\"',;]{6,}"
_ASSIGNED = r"(?<![\w.-])([\w.-]{1,64})([\"']?\s{0,3}[=:]\s{0,3}[\"']?)([^\s\"'&,;()\[\]{}<>]{1,200})"
_OPTION = r"(?<!\S)(--[\w.-]{1,64})(\s{1,3})([^\s\"'-][^\s\"']{0,200})"
_REST = r"[^\s\"'&,;()\[\]{}<>]*"

_PART = r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+"
_OWNERS = (
    "hub|hf|huggingface|api|auth|access|refresh|session|bearer|oauth|github|gitlab|slack|secret|jwt|csrf|wandb|openai"
)
_OWNERS += "|anthropic|aws|azure|google|personal|client|private|account|signing|ssh|encryption|shared|storage|service"
# In a name without its separators.
_NAME = (
    r"passw(?:or)?ds?|passphrase|pwds?$|secrets?(?!ary)|credential|authori[sz]ation|cookies?$|auth$|signature$|^sig$"
    rf"|(?:{_OWNERS})(?:keys?(?:id|value)?$|tokens?(?!i[sz]))"
)
# What stands before `token` where it is one of a tokenizer, or a count of them.
_OF_TOKENIZERS = (
    r"pad|padding|eos|bos|unk|unknown|mask|cls|sep|special|image|video|audio|boi|eoi|boa|eoa|start|end"
    r"|begin|max|min|num|new|global|sink|target|source|input|output|generated|prompt|extra|added|additional"
    r"|stop|prefix|suffix|text|real|first|last|next|previous|query|total|per|all|number|of|language|lang"
    r"|decoder|forced|suppress|sentinel"
    r"|\d+"
)


def is_secret(name: str, value: Any = "") -> bool:
    """Whether a setting of this name holds a secret: `hub_token`, `apiKeys`, `Authorization`, in any spelling."""
    words = [word.lower() for word in re.findall(_PART, name[:200])]
    if not words or value is None or isinstance(value, bool):
        return False
    if re.search(_NAME, "".join(words)):
        return not (isinstance(value, (int, float)) and words[-1].startswith("token"))
    if words[-1] not in ("token", "tokens") or isinstance(value, (int, float)):
        return False
    of_tokenizer = len(words) > 1 and re.fullmatch(_OF_TOKENIZERS, words[-2]) is not None
    shown_as_one = isinstance(value, str) and re.fullmatch(r"[<\[].{0,40}[>\]]|\d*", value)
    return not of_tokenizer and not shown_as_one and (words[-1] == "token" or len(words) == 1)


def without_secrets(text: str, secrets: Iterable[str | None] = ()) -> str:
    """The text with `[removed]` in the place of each secret; done twice it changes nothing more.

    Parameters:
        secrets: to remove in whatever form they appear: as they are, one line of them, quoted or escaped.
    """
    forms: set[str] = set()
    for secret in filter(None, secrets):
        forms |= {secret, secret.strip(), repr(secret)[1:-1], repr(secret.encode("utf-8", "replace"))[2:-1]}
        forms |= {urllib.parse.quote(secret, safe="", errors="replace"), *secret.split()}
    for form in sorted((form for form in forms if len(form) >= 4), key=len, reverse=True):
        text = text.replace(form, REMOVED)
    text = re.sub(_IN_URL, r"\1", re.sub(_KEYS, REMOVED, text))
    text = re.sub(_HEADER, rf"\1{REMOVED}", re.sub(_BEARER, rf"\1{REMOVED}", text))
    return _without_values(_OPTION, _without_values(_ASSIGNED, text))


def _without_values(pattern: str, text: str) -> str:
    """The text without the values of secrets that `pattern` finds: (name, what stands between, value)."""
    parts, end, place = [], 0, 0
    while match := re.compile(pattern).search(text, place):
        if _is_secret_value(*match.groups()):
            parts += [text[end : match.start(3)], REMOVED]
            rest = re.compile(_REST).match(text, match.end())
            end = place = rest.end() if rest else match.end()
        else:
            place = match.end(2)  # the value may be a name of the next: `error: token=...`
    return "".join([*parts, text[end:]])


def _is_secret_value(name: str, between: str, value: str) -> bool:
    """Whether a secret stands there: in `token=...`, `"token": ...`, `token: 1f9c2...`; `token: a word` is prose."""
    of_tokens = "token" in name.lower()
    sure = "=" in between or between[0] in "\"'" or name.startswith("--") or (not of_tokens and between[-1] in "\"'")
    sure = sure or (len(value) >= 8 and any(map(str.isdigit, value)) and any(map(str.isalpha, value)))
    return sure and not (of_tokens and value.replace(".", "").isdigit()) and is_secret(name, value)
