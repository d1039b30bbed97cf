"""Bring the results of finished recipe runs into `model_cards/` and the table of the README, from their reports alone.

python scripts/make_model_cards.py                 # out/<recipe>/model of every shipped recipe that was run
python scripts/make_model_cards.py --check         # fail if a card or the table is not what the reports say
"""

import argparse
import sys
from pathlib import Path

from hf_efficient.recipes.recipe import shipped_recipes
from hf_efficient.reporting import load_report
from hf_efficient.reporting.card import model_card
from hf_efficient.reporting.plots import save_plots
from hf_efficient.reporting.tables import markdown_results

ROOT = Path(__file__).resolve().parent.parent
CARDS, README = ROOT / "model_cards", ROOT / "README.md"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"


def card_text(folder: Path, name: str) -> str:
    """The card of the report in `folder`, showing the plots that lie there."""
    images = tuple(path.name for path in sorted(folder.glob("*.png")))
    return str(model_card(load_report(folder), repo_id=f"hf-efficient/{name}", images=images))


def readme_text() -> str:
    """The README with the table of all cards between its two marks."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    reports = {name: load_report(CARDS / name) for name in shipped_recipes() if (CARDS / name).is_dir()}
    return f"{before}{BEGIN}{markdown_results(reports)}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("out"), help="folder with the runs (default: out)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something has drifted")
    options = parser.parse_args()
    wanted: dict[Path, str] = {}
    for name in shipped_recipes():
        folder, run = CARDS / name, options.runs / name / "model"
        if not options.check and run.is_dir():
            report = load_report(run)
            report.save(folder)
            save_plots(report, folder)
        if not folder.is_dir():
            continue  # a recipe that has not been run yet
        wanted[folder / "README.md"] = card_text(folder, name)
    wanted[README] = readme_text()
    drifted = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if options.check and drifted:
        print(f"Not what the reports say, run `make cards`: {', '.join(map(str, drifted))}", file=sys.stderr)
        return 1
    for path in drifted:
        path.write_text(wanted[path], encoding="utf-8")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
