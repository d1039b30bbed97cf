"""What `mkdocs build` does beside reading docs/: the pages that lie elsewhere become pages of the site too.

The measured cards, the notebooks and the changelog are added, and links between pages, which are written so that
they work in the repository, lead to these. `mkdocs.yml` names this file under `hooks`.
"""

import ast
import json
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
RESULTS = re.compile(r"<!-- results -->.*?<!-- /results -->\n?", re.DOTALL)
LINK = re.compile(r"(\]\()([^)#\s:]+)")
COMMENT = re.compile(r"^(<!-- .*? -->)$", re.MULTILINE)


def elsewhere() -> dict[str, Path]:
    """Pages and images of the site that do not lie in docs/: the name in the site, and the file."""
    found = {"changelog.md": ROOT / "CHANGELOG.md", "contributing.md": ROOT / "CONTRIBUTING.md"}
    for card in sorted((ROOT / "model_cards").glob("*/README.md")):
        found[f"model_cards/{card.parent.name}.md"] = card
        for picture in sorted(card.parent.glob("*.png")):
            found[f"model_cards/{card.parent.name}/{picture.name}"] = picture
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        found[f"notebooks/{notebook.stem}.md"] = notebook
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the section `Measured cards` of the navigation."""
    for title, entries in (next(iter(section.items())) for section in config.nav if isinstance(section, dict)):
        for entry in entries if title == "Results" else []:
            if isinstance(entry, dict):
                entry["Measured cards"] = [name for name in elsewhere() if re.fullmatch(r"model_cards/.*\.md", name)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them."""
    for name, path in elsewhere().items():
        if path.suffix == ".ipynb":
            files.append(File.generated(config, name, content=notebook_text(path)))
            files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
        else:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of a page with the results of the README where it asks for them, and with links of the site."""
    if page.file.src_uri == "index.md":
        table = RESULTS.search((ROOT / "README.md").read_text(encoding="utf-8"))
        shown = table[0].replace("](model_cards/", "](../model_cards/").replace(".\n", ".  \n")  # a line each
        markdown = RESULTS.sub(lambda _: shown, markdown)
    if page.file.src_uri == "api.md":
        markdown = markdown.replace("<!-- arguments -->", arguments_table())
    source = elsewhere().get(page.file.src_uri)
    folder = source.parent if source else (ROOT / "docs" / page.file.src_uri).parent
    markdown = LINK.sub(lambda found: found[1] + site_link(folder, found[2], page.file.src_uri), markdown)
    if source and source.suffix == ".ipynb":
        markdown += f"\n\n[This page as a notebook]({source.name})\n"
    return COMMENT.sub(r"\n\1\n", markdown)  # Python-Markdown wants a table apart from what stands before it


def site_link(folder: Path, target: str, page: str) -> str:
    """Where a link of a file in `folder` leads from `page` of the site."""
    path = Path(normpath(folder / target))
    names = {file: name for name, file in elsewhere().items()}
    if path in names:
        name = names[path]
    elif path.is_relative_to(ROOT / "docs"):
        name = path.relative_to(ROOT / "docs").as_posix()
    else:
        return target  # a strict build refuses it
    return relpath(name, PurePosixPath(page).parent)


def arguments_table() -> str:
    """The fields that `DistillationArguments` adds, with the help that the command line shows; read, not imported."""
    source = (ROOT / "hf_efficient/distillation/options.py").read_text(encoding="utf-8")
    body = next(node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    rows = ["| argument | default | |", "|---|---|---|"]
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.value.keywords}
            default = given["default"] if "default" in given else given["default_factory"].body
            meaning = ast.literal_eval(given["help"]).replace("||", "\\|\\|")
            rows.append(f"| `{ast.unparse(node.target)}` | `{ast.unparse(default)}` | {meaning} |")
    return "\n".join(rows)


def notebook_text(path: Path) -> str:
    """The cells of a notebook as a page: text as it is, code in blocks."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(
        "".join(cell["source"]) if cell["cell_type"] == "markdown" else f"```python\n{''.join(cell['source'])}\n```"
        for cell in cells
    )
