r"""The one place where text of strangers is made fit to be shown: in a terminal, Markdown, a plot, or as code.

for_terminal("a\x1b[2Jb")         # a\x1b[2Jb, visible: nothing that a terminal obeys
for_markdown("*a* <b>")           # \*a\* &lt;b&gt;: as it was typed
for_plot("my$\frac{$model")       # matplotlib draws it, and reads no mathematics in it
python_literal('a"\nimport os')   # 'a"\nimport os' in quotes: one Python string, whatever it holds
"""

import json
import re

# What changes a screen instead of being shown: C0 and C1 controls but tab and newline, marks that turn the direction
# of text, invisible separators of lines, and halves of characters, which cannot be encoded.
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def for_terminal(text: str) -> str:
    """The text with every control character shown as its escape; lines and tabs stay."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def for_line(text: str) -> str:
    """As `for_terminal`, on one line."""
    return " ".join(for_terminal(text).split())


def for_markdown(text: str) -> str:
    """One line that Markdown shows as it is: no emphasis, link, image, table cell, HTML or formula begins in it."""
    line = "".join(_ENTITIES.get(character, character) for character in for_line(text))
    return _MARKDOWN.sub(r"\\\1", line)


def for_plot(text: str) -> str:
    """One line for matplotlib, which reads what stands between two dollars as mathematics."""
    return for_line(text).replace("$", r"\$")


def python_literal(text: str) -> str:
    """A Python string in double quotes, of ASCII characters."""
    return json.dumps(text)
