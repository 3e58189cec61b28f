"""Runs the benchmarks one after another and puts what they found together in ``bench/RESULTS.md``.

python -m bench                              # all of them, small
python -m bench --full --only storage,record_models
python -m bench --only none                  # only writes RESULTS.md anew, from bench/results
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bench.report import RESULTS

# In the order of the page; those with a --full size, and pages in bench/results.
SCRIPTS = (
    "storage",
    "p2p",
    "p2b",
    "record_models",
    "mislabelled",
    "wrong_labels",
    "cleaning",
    "hydra",
    "sign_vectors",
    "lds",
    "left_out",
    "elite",
    "elite_labels",
    "elite_time",
    "peers",
    "growth",
    "floor",
)


def main() -> int:
    """0 when every benchmark ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the larger sizes")
    parser.add_argument("--only", help="some of them, separated by commas")
    options = parser.parse_args()
    chosen = SCRIPTS if options.only is None else [name for name in SCRIPTS if name in options.only.split(",")]
    failed = []
    for name in chosen:
        print(f"=== {name}", flush=True)
        arguments = ["--full"] if options.full else []
        if subprocess.run([sys.executable, "-m", f"bench.{name}", *arguments], check=False).returncode:
            failed.append(name)
    write_page()
    if chosen:
        print(f"Missed a promise or failed: {', '.join(failed)}" if failed else "All kept.")
    return 1 if failed else 0


def write_page() -> None:
    """``RESULTS.md``, from the pages in ``bench/results``: what was missed first."""
    pages = [RESULTS / f"{name}.md" for name in SCRIPTS if (RESULTS / f"{name}.md").exists()]
    raw = [json.loads(page.with_suffix(".json").read_text()) for page in pages]
    missed = [
        f"- `{page.stem}`: {one['text']}: {one['measured']}."
        for page, found in zip(pages, raw, strict=True)
        for one in found["promises"]
        if not one["kept"]
    ]
    lines = [
        "# Results",
        "",
        "Written by `python -m bench` from the files in `bench/results`, which hold the raw numbers. Each section says",
        "when and on what it was measured, and with which command. Wall times are of the machine as it was, with other",
        "work beside; ratios are of paired rounds, in turns.",
        "",
        "## What fell short",
        "",
        *(missed or ["Nothing that was measured."]),
        "",
    ]
    Path(__file__).with_name("RESULTS.md").write_text("\n".join(lines) + "\n" + "\n".join(map(Path.read_text, pages)))


if __name__ == "__main__":
    sys.exit(main())
