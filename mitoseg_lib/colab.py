"""What a chapter's set-up cell calls in Colab: install what is missing, and nothing that is there."""

import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = ROOT / "pyproject.toml"

# Colab's own builds match its GPU driver; replacing one of them breaks the others.
NEVER_TOUCHED = ("torch", "torchvision", "numpy")


def installed_version(name: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def missing_requirements(
    requirements: list[str], version_of: Callable[[str], str | None] = installed_version
) -> list[str]:
    """Return those requirements that have to be installed.

    A package that is there stays, in whatever version Colab has it, unless the course pins it to an exact version;
    torch, torchvision and numpy are never among them.
    """
    missing = []
    for line in requirements:
        requirement = Requirement(line)
        version = version_of(requirement.name)
        pinned_elsewhere = "==" in str(requirement.specifier) and not requirement.specifier.contains(version or "0")
        if requirement.name not in NEVER_TOUCHED and (version is None or pinned_elsewhere):
            missing.append(line)
    return missing


def install_missing(*extras: str) -> list[str]:
    """Install what the course and some of its extras need and Colab lacks; return the names.

    pip is held to the installed torch, torchvision and numpy by a constraints file, so that a dependency's wish for
    another version is an error and never a replacement. Programs that a chapter starts (`mitoseg`, say) find the
    library by ``PYTHONPATH``, since they don't know the kernel's own path.
    """
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(path for path in paths if path not in ("", str(ROOT)))])
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    wanted = sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"])
    missing = missing_requirements(wanted)
    if not missing:
        return []
    held = [f"{name}=={version}" for name in NEVER_TOUCHED if (version := installed_version(name))]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(held) + "\n")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *missing]
        subprocess.run(command, check=True)
    return missing
