"""Text of others is shown as it is: nothing of it is obeyed by a terminal, Markdown, a plot or Python."""

import ast
import io
import os
import re
from pathlib import Path

import pytest

import hf_efficient
from hf_efficient.errors import CheckpointError, ConfigError
from hf_efficient.io.secrets import REMOVED, is_secret, without_secrets
from hf_efficient.io.text import (
    PLAIN,
    Markup,
    for_line,
    for_markdown,
    for_plot,
    for_terminal,
    markdown_code,
    python_literal,
)


@pytest.mark.parametrize(
    "control",
    ["\x07", "\x08", "\r", "\x1b]0;t", "\x9b2J", "\x7f", "\u202e", "\u2066", "\u2028", "\udcff", "\U000e0041"],
)
def test_a_terminal_is_shown_controls_and_obeys_none(control):
    told = for_terminal(f"a{control}b")
    assert told.isprintable() and told.startswith("a\\") and told.endswith("b")
    told.encode("utf-8")


def test_letters_lines_and_tabs_stay():
    text = "ünï 目录 🤗 ±\tx\n$ * <b>"
    assert for_terminal(text) == text
    assert for_line("a\n b", 3) == "a b" and for_line("abcdef", 4) == "abc…"


@pytest.mark.parametrize(
    "text",
    [
        "*a*",
        "_a_ __b__",
        "[a](b)",
        "![a](b)",
        "a | b",
        "`a`",
        "<i>a</i>",
        "&lt;",
        "~~a~~",
        "$a$",
        "# a",
        "- a",
        "+ a",
        "1. a",
    ]
    + ["12) a", "---", "===", "a\\*b", "{: .x }", "| - |", ":-", "[^1]: a", "a\n# b", "> a", "___"],
)
def test_markdown_shows_what_was_typed(text):
    markdown = pytest.importorskip("markdown")
    html = markdown.markdown(for_markdown(text), extensions=["tables", "attr_list", "footnotes", "def_list"])
    assert set(re.findall(r"<(\w+)", html)) == {"p"}
    typed = html[3:-4].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").replace("\\~", "~")
    assert re.sub(r"\\([|$=:])", r"\1", typed) == for_line(text)


@pytest.mark.parametrize(
    "text", ["batch_size 16, learning_rate 0.0001", "-0.7 ± 0.5 points", "2.13.0+cpu", "org/model-1.5"]
)
def test_plain_words_and_numbers_have_no_backslash(text):
    assert for_markdown(text) == text


def test_what_is_markdown_already_is_not_escaped_twice():
    once = for_markdown("a*b")
    assert for_markdown(once) == once == "a\\*b" and for_markdown(Markup("[a](b)")) == "[a](b)"


@pytest.mark.parametrize("text", ["a`b", "``", "`", "a\n```\nb", ""])
def test_a_code_span_ends_where_it_should(text):
    ticks = re.match("`+", markdown_code(text))[0]
    assert markdown_code(text).count(ticks) == 2 or not text


@pytest.mark.parametrize("text", ["a$b$c", r"\$x$", "$", r"$\undefined{$ $"])
def test_matplotlib_reads_no_mathematics(text):
    cbook = pytest.importorskip("matplotlib.cbook")
    assert not cbook.is_math_text(for_plot(text)) and for_plot(text).replace(r"\$", "$") == text


@pytest.mark.parametrize("text", ['a"\nimport os', "🤗 é", "a\\", '\\"', "\r\x00", "'''"])
def test_a_literal_is_the_text_and_nothing_more(text):
    literal = python_literal(text)
    assert ast.literal_eval(literal) == text and literal.isascii() and "\n" not in literal


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_terminal_shows_it(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=PLAIN)
    stream.write("1.0 ± 0.1 → 目 \udcff")
    stream.flush()
    told = stream.buffer.getvalue().decode(encoding)
    assert "目" in told if encoding == "utf-8" else "\\u76ee" in told
    assert ("+-" in told) == (encoding == "ascii") and "\\udcff" in told


def test_an_error_tells_neither_controls_nor_secrets():
    told = str(ConfigError("no \x1b[2Jsuch https://me:word@host/a"))
    assert told == "no \\x1b[2Jsuch https://host/a"
    assert str(CheckpointError("plain ± words\nof two lines")) == "plain ± words\nof two lines"


SECRETS = [
    *(
        "ghu_" + "Ab1" * 12,
        "github_pat_11ABCDEFG0aaaaaaaaaaaa_b",
        "glpat-aB3_aB3_aB3_aB3_aB3",
        "sk-proj-Ab_1Ab_1Ab_1Ab_1Ab",
    ),
    *("sk-ant-api03-Ab_1-Ab_1-Ab_1-Ab_1", "sk-" + "aB3d" * 12, "ASIAABCDEFGHIJKLMNOP", "AIzaSy" + "aB3d" * 8),
    *(
        "xoxp-1234567890-abcdef",
        "eyJhbGciOiJub25lIn0.eyJhIjoxMjM0NTY3fQ.c2lnbmVk",
        "hf_" + "aBcD" * 9,
        "npm_" + "aB3d" * 9,
    ),
    "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n-----END OPENSSH PRIVATE KEY-----",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_keys_of_providers_are_removed(secret):
    told = without_secrets(f"got {secret} here")
    assert told == f"got {REMOVED} here" and without_secrets(told) == told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("redis://u:p@ss@db:6379/0", "redis://db:6379/0"),
        ("git+https://abc@host/x.git", "git+https://host/x.git"),
        ("proxy-authorization: Basic dXNlcjpwdw==", f"proxy-authorization: Basic {REMOVED}"),
        ("DB_PASSWORD=a1 next", f"DB_PASSWORD={REMOVED} next"),
        ('{"clientSecret": "x"}', f'{{"clientSecret": "{REMOVED}"}}'),
        ("GET /a?n=1&access_token=zz&m=2", f"GET /a?n=1&access_token={REMOVED}&m=2"),
        ("run --hub-token zz --epochs 3", f"run --hub-token {REMOVED} --epochs 3"),
        ("wandb_api_key: " + "0a" * 20, f"wandb_api_key: {REMOVED}"),
    ],
)
def test_credentials_in_text_are_removed(given, told):
    assert without_secrets(given) == told == without_secrets(told)


@pytest.mark.parametrize(
    "text",
    ["commit 58b0bcfbe208d5fcfc5691e3a69abbac39a6e661", "sha256 " + "0a" * 32, "eos_token=</s> pad_token='[PAD]'"]
    + ["max_tokens=8000, global_tokens: 4", "unknown token: 'abc'", "git@github.com:org/name", "mail me@host.org"]
    + ["task-specific-tokenization-of-texts", "Basic tokenization", "https://host/a@b", "sk-learn", "token: 5"],
)
def test_what_is_no_secret_stays(text):
    assert without_secrets(text) == text


@pytest.mark.parametrize("secret", ["ab cd\nefgh12345", "tökén-12345", "p/w+12345"])
def test_a_known_secret_goes_in_every_form(secret):
    for form in (secret, repr(secret), repr(secret.encode()), secret.splitlines()[-1], secret.strip()):
        assert "12345" not in without_secrets(f"Illegal header value {form}", [secret, None, ""])
    assert without_secrets("nothing here", [secret]) == "nothing here"


def test_names_of_secrets_in_any_spelling():
    for name in (
        "hubTokens",
        "HFToken",
        "x-api-key",
        "awsSecretAccessKey",
        "Proxy-Authorization",
        "sshKey",
        "userPasswords",
    ):
        assert is_secret(name, "abc"), name
    for name in (
        "unk_token",
        "padToken",
        "max-new-tokens",
        "token_type_ids",
        "num_key_value_heads",
        "author",
        "tokenizer",
    ):
        assert not is_secret(name, "abc"), name
    assert is_secret("tokens", "abc") and not is_secret("tokens", 4096) and is_secret("password", 4096)


def test_the_command_line_prints_through_one_function():
    folder = Path(hf_efficient.__file__).parent / "cli"
    printing = {path.name for path in folder.glob("*.py") if re.search(r"typer\.echo\(|\bprint\(", path.read_text())}
    assert printing == {"base.py"}


def test_a_name_that_is_no_text_is_written_and_shown(tmp_path):
    from hf_efficient.reporting.card import save_card
    from hf_efficient.reporting.page import save_page
    from hf_efficient.reporting.schema import load_report

    from ..reporting.samples import sample_report

    name = os.fsdecode(b"mod\xe9l")
    report = sample_report(base_model=name, recipe={"name": name}, warnings=(f"about {name}",))
    report.save(tmp_path)
    assert load_report(tmp_path) == report and report.base_model == "mod\\udce9l"
    for path in (save_card(report, tmp_path, name), save_page(report, tmp_path, name)):
        assert "udce9l" in path.read_text(encoding="utf-8")
