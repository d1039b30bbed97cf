"""What it costs to start: importing the package on top of transformers, and the first answer of the command line.

    python benchmarks/startup.py --output benchmarks/results/startup_cpu.json

Each command runs in a process of its own, in turns, after one uncounted round that fills the file caches. Budgets:
0.3 s on top of `import transformers`, about 0.5 s for `hf-efficient --help`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from hf_efficient.io.environment import Environment, package_commit

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import transformers": [sys.executable, "-c", "import transformers"],
    "import transformers, hf_efficient": [sys.executable, "-c", "import transformers, hf_efficient"],
    "import hf_efficient": [sys.executable, "-c", "import hf_efficient"],
    "hf-efficient --help": [sys.executable, "-m", "hf_efficient.cli", "--help"],
    "hf-efficient list": [sys.executable, "-m", "hf_efficient.cli", "list"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(options.rounds + 1):
        for name, command in COMMANDS.items():
            spent = seconds(command)
            if number:
                times[name].append(spent)
    medians = {name: statistics.median(each) for name, each in times.items()}
    pairs = zip(times["import transformers, hf_efficient"], times["import transformers"], strict=True)
    report = {
        "medians_s": medians,
        "on_top_of_transformers_s": statistics.median(ours - theirs for ours, theirs in pairs),
        "rounds": options.rounds,
        "commit": package_commit(),
        "environment": asdict(Environment.collect()),
    }
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
