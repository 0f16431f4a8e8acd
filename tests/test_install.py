"""What installs the program: requirements.lock against requirements.txt, and the Dockerfile."""

import re
from importlib.metadata import PackageNotFoundError, requires

from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def pins(name: str) -> dict[str, str]:
    """Version of each package that a file pins."""
    lines = (ROOT / name).read_text().splitlines()
    found = [re.match(r"([A-Za-z0-9][\w.-]*)==([^\s;\\#]+)", line) for line in lines]
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def test_the_lock_has_the_versions_of_requirements_and_hashes_of_all():
    wanted, locked = pins("requirements.txt"), pins("requirements.lock")
    assert len(wanted) > 10 and wanted == {name: locked.get(name) for name in wanted}
    blocks = re.split(r"^(?=[a-z0-9])", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)[1:]
    assert len(blocks) == len(locked)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)


def test_the_lock_has_all_that_the_packages_need():
    """Walk from requirements.txt over what the installed packages say they need, on Linux with Python 3.11."""
    locked, seen = pins("requirements.lock"), set()
    waiting = [Requirement(name) for name in pins("requirements.txt")]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        assert name in locked, f"requirements.lock lacks {name}: run tools/lock.sh"
        assert wanted.specifier.contains(locked[name], prereleases=True), f"{wanted} against {locked[name]}"
        if name in seen:
            continue
        seen.add(name)
        try:
            needed = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:  # another build of torch brings no CUDA packages
            continue
        place = {"python_version": "3.11", "python_full_version": "3.11.7", "sys_platform": "linux", "extra": ""}
        waiting += [one for one in needed if one.marker is None or one.marker.evaluate(place)]
    assert len(seen) > 50


def test_the_image_installs_the_lock_with_the_tested_python():
    image = (ROOT / "Dockerfile").read_text()
    assert "--require-hashes --requirement requirements.lock" in image
    version = re.search(r"on Python (\d\.\d+)", (ROOT / "requirements.txt").read_text())[1]
    assert f"python{version} -m venv" in image and f"python{version}-dev" in image
    cuda = re.search(r"^FROM nvidia/cuda:(\d+)\.", image, flags=re.MULTILINE)[1]
    assert f"nvidia-cudnn-cu{cuda}" in pins("requirements.lock")
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (\S+) ", image, flags=re.MULTILINE):
        assert (ROOT / line).exists() and line not in ignored
