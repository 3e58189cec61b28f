"""A virtual environment for each library, with the versions in ``requirements``."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
# What they bring along and then stumble over, where its build does not fit torch's.
UNWANTED = {"bergson": ("torchvision", "torchaudio")}
# Without what they ask for, which is in their requirements: DeepOD wants a torch of 2022, and runs with today's.
ALONE = {"deepod": "deepod==0.4.1"}


def python(folder: Path, package: str) -> Path:
    """The interpreter of the environment, made when it is missing or was made for other versions.

    Raises CalledProcessError where pip fails.
    """
    home = folder / package
    interpreter = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    requirements, made_for = REQUIREMENTS / f"{package}.txt", home / "requirements.txt"
    wanted = requirements.read_text() + ALONE.get(package, "")
    if made_for.exists() and made_for.read_text() == wanted:
        return interpreter
    print(f"installing {package} into {home}", flush=True)
    venv.create(home, with_pip=True)
    pip = [str(interpreter), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "--requirement", str(requirements)], check=True)
    if package in ALONE:
        subprocess.run([*pip, "install", "--quiet", "--no-deps", ALONE[package]], check=True)
    if package in UNWANTED:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED[package]], check=True)
    made_for.write_text(wanted)
    return interpreter
