"""Everything that needs a GPU, in ten minutes: the tests marked `gpu`, then `benchmarks/gpu.py` part by part.

    make gpu                                                          # in the virtual environment of the checkout
    make gpu PYTHON=python3 GPU_OUT=gpu.json                          # in an interpreter that has torch for the GPU
    python scripts/gpu.py --output gpu.json --parts kinds decode
    python scripts/gpu.py --output cpu.json --device cpu              # tries this program: tiny, without a GPU

Each part is a process with a limit of its own; one that fails or is cut off does not keep the others from running, and
one for which no time is left is not begun. The JSON is written anew after each part: machine, versions, commit, and of
each part its state (`passed`, `failed`, `cut off`, `no time left`), seconds, numbers, and the end of what it printed
where it did not pass. Ends with 1 if a part did not pass, and with 2, having run nothing, where there is no GPU.

Nothing is installed and nothing downloaded. hf_efficient is that of this checkout; what it needs is torch,
transformers, accelerate, peft and pytest. Without flash-linear-attention the road through its kernels is not tried,
and the JSON says so.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 600  # seconds
LIMITS = {
    "machine": 60,
    "tests": 200,
    "kinds": 120,
    "speed": 90,
    "decode": 90,
    "compile": 120,
    "prune": 90,
    "distill": 90,
}
TAIL = 4000  # characters of what a failed part printed
CPU = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def gpu_tests() -> list[str]:
    """The files with tests marked `gpu`: the others may import what is not installed there."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def command(part: str, device: str, answer: Path) -> list[str]:
    if part == "tests":
        return [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", *gpu_tests()]
    program = str(ROOT / "benchmarks" / "gpu.py")
    return [sys.executable, program, part, "--device", device, "--output", str(answer)]


def run(part: str, device: str, limit: float) -> dict:
    """One part: what goes into the report."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "answer.json"), Path(folder, "log.txt")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(part, device, answer),
                cwd=ROOT,
                env={**os.environ, **CPU},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it starts ends with it
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
        text = log.read_text(encoding="utf-8", errors="replace")
        numbers = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}
    if part == "tests":
        numbers = {"summary": text.strip().rpartition("\n")[2], "files": gpu_tests()}
        ran = " passed" in numbers["summary"]
        code = 1 if code == 0 and device == "cuda" and not ran else code  # all skipped is not passed
    state = "cut off" if code is None else "failed" if code else "passed"
    report = {"state": state, "seconds": round(time.monotonic() - start, 1), "limit": round(limit), **numbers}
    return report if state == "passed" else report | {"output": text[-TAIL:]}


def has_cuda() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/gpu.json"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for everything, which all limits go by")
    options = parser.parse_args()
    if options.device == "cuda" and not has_cuda():
        print(
            f"{sys.executable} has a torch that finds no CUDA device, or none at all: nothing was run. With "
            "--device cpu this program can be tried without one.",
            file=sys.stderr,
        )
        sys.exit(2)
    end = time.monotonic() + options.total
    parts = [part for part in LIMITS if part in {"machine", *options.parts}]
    report: dict = {"device": options.device, "total_limit": options.total, "parts": {}}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        left = end - time.monotonic()
        limit = min(LIMITS[part] * options.total / TOTAL, left)
        done = {"state": "no time left"} if left < 5 else run(part, options.device, limit)
        report["parts"][part] = done
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{part:<9}{done['state']:<13}{done.get('seconds', 0):>7.1f} s  {done.get('summary', '')}", flush=True)
        if "output" in done:
            print(done["output"].rstrip()[-1500:], flush=True)
    print(f"{options.output} has it all.")
    sys.exit(int(any(done["state"] != "passed" for done in report["parts"].values())))


if __name__ == "__main__":
    main()
