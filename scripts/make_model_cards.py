"""Copy the cards of finished recipe runs into `model_cards/`: the only way a file gets there.

    python scripts/make_model_cards.py                 # out/<recipe>/model of every shipped recipe that was run
    python scripts/make_model_cards.py --check         # fail if a card is not what its report says
"""

import argparse
import sys
from pathlib import Path

from hf_efficient.recipe import shipped_recipes
from hf_efficient.reporting import load_report
from hf_efficient.reporting.card import model_card
from hf_efficient.reporting.plots import save_plots

CARDS = Path(__file__).resolve().parent.parent / "model_cards"


def card_text(folder: Path, name: str) -> str:
    """The card of the report in `folder`, showing the plots that lie there."""
    images = tuple(path.name for path in sorted(folder.glob("*.png")))
    return str(model_card(load_report(folder), repo_id=f"hf-efficient/{name}", images=images))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("out"), help="folder with the runs (default: out)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a card has drifted")
    options = parser.parse_args()
    drifted = []
    for name in shipped_recipes():
        folder, run = CARDS / name, options.runs / name / "model"
        if not options.check and run.is_dir():
            report = load_report(run)
            report.save(folder)
            save_plots(report, folder)
            (folder / "README.md").write_text(card_text(folder, name), encoding="utf-8")
            print(f"wrote {folder / 'README.md'}")
        if options.check and (folder / "README.md").read_text(encoding="utf-8") != card_text(folder, name):
            drifted.append(name)
    if drifted:
        print(f"Not what the report says, run `make cards`: {', '.join(drifted)}", file=sys.stderr)
    return 1 if drifted else 0


if __name__ == "__main__":
    raise SystemExit(main())
