r"""The one place where text of strangers is made fit to be shown: in a terminal, Markdown, a plot, or as code.

for_terminal("a\x1b[2Jb")         # a\x1b[2Jb, visible: nothing that a terminal obeys
for_markdown("*a* <b>")           # \*a\* &lt;b&gt;: as it was typed
for_plot("my$\frac{$model")       # matplotlib draws it, and reads no mathematics in it
python_literal('a"\nimport os')   # 'a"\nimport os' in quotes: one Python string, whatever it holds
"""

import codecs
import re

# What changes a screen instead of being shown: C0 and C1 controls but tab and newline, marks that turn the direction
# of text, invisible separators and letters, and halves of characters, which cannot be encoded.
_CONTROLS = (
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKDOWN = r"[\\`*\[\]{}#|~$]|(?<![^\W_])_+|_+(?![^\W_])"  # an underscore within a word means nothing
# What begins a list, a rule, a heading or the rule of a table where it stands first in a line.
_FIRST = r"[-+](?=\s|$)|[-=:](?=[-=:\s]*$)|(?<=\d)[.)](?=\s|$)"
# What our own texts have beyond ASCII.
_TWINS = {"±": "+-", "→": "->", "\u00d7": "x", "…": "...", "\u2013": "-", "\u2014": "-"}
PLAIN = "hf_efficient.plain"  # an error handler for streams, as "replace" is one


def for_terminal(text: str) -> str:
    """The text with every control character shown as its escape; lines and tabs stay."""
    return re.sub(_CONTROLS, lambda match: match[0].encode("unicode_escape").decode(), text)


def show(text: str) -> None:
    """Print it; the terminal obeys nothing in it."""
    print(for_terminal(text))


def for_line(text: str, limit: int | None = None) -> str:
    """As `for_terminal`, on one line, of at most `limit` characters."""
    line = " ".join(for_terminal(text).split())
    return line if limit is None or len(line) <= limit else f"{line[: limit - 1]}…"


class Markup(str):
    """Markdown that we wrote: `for_markdown` leaves it as it is."""

    __slots__ = ()


def for_markdown(value: object) -> Markup:
    """One line that Markdown shows as it is: no emphasis, link, image, table cell, HTML or formula begins in it."""
    if isinstance(value, Markup):
        return value
    line = "".join(_ENTITIES.get(character, character) for character in for_line(str(value)))
    line = re.sub(_MARKDOWN, lambda match: "".join(f"\\{character}" for character in match[0]), line)
    first = re.compile(_FIRST).search(line, 0, 12)
    if first and (first.start() == 0 or line[: first.start()].isdigit()):
        line = f"{line[: first.start()]}\\{line[first.start() :]}"
    return Markup(line)


def markdown_code(text: str) -> Markup:
    """A code span of Markdown that holds the text, whatever backticks are in it."""
    line = for_line(text)
    ticks = "`" * (1 + longest_run("`", line))
    space = " " * (line.startswith("`") or line.endswith("`"))
    return Markup(f"{ticks}{space}{line}{space}{ticks}")


def longest_run(character: str, text: str) -> int:
    """How often the character stands in a row."""
    return max(map(len, re.findall(f"{re.escape(character)}+", text)), default=0)


def for_plot(text: str, limit: int = 40) -> str:
    """One line for matplotlib, which reads what stands between two dollars as mathematics."""
    return for_line(text, limit).replace("$", r"\$")


def python_literal(text: str) -> str:
    """A Python string in double quotes, of ASCII characters."""
    escaped = text.encode("unicode_escape").decode("ascii").replace('"', '\\"')
    return f'"{escaped}"'


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What a terminal of few characters cannot show, in ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    shown = (_TWINS.get(each) or each.encode("ascii", "backslashreplace").decode("ascii") for each in text)
    return "".join(shown), error.end


codecs.register_error(PLAIN, _plain)
