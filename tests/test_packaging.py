"""The wheel holds the root modules and nothing else, and what the package promises about itself is consistent."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.name for path in ROOT.glob("*.py")}


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the checkout, so that no build folder is left in it."""
    source = tmp_path_factory.mktemp("some other name") / "checkout"
    outputs = ("build", "dist", "*.egg-info", "__pycache__", "demo_output", "outputs", "runs")
    ignored = shutil.ignore_patterns(".git", ".venv", *outputs)
    shutil.copytree(ROOT, source, ignore=ignored)
    output = source.parent / "wheels"
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", str(output), "."),
        cwd=source,
    )
    (path,) = output.glob("*.whl")
    return path


def test_no_init_file_beside_the_modules():
    # With one, pytest imports each class twice or fails to collect, depending on the name of the checkout's folder.
    assert "__init__.py" not in MODULES
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_wheel_holds_exactly_the_root_modules(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    content = {name for name in names if ".dist-info/" not in name}
    assert content == {f"llava_next_ar/{module}" for module in MODULES}


def test_wheel_carries_the_licence(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert archive.read(name) == (ROOT / "LICENSE").read_bytes()
    (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    assert "License-Expression: Apache-2.0" in archive.read(name).decode()


def test_installed_wheel_finds_its_modules_from_any_folder(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # -I ignores the working folder; site-packages still hold the editable install, which must not win over the path
    code = f"import sys; sys.path.insert(0, {str(target)!r})\n"
    code += "import llava_next_ar.frame_token_layout as module; print(module.__file__)"
    path = run(sys.executable, "-I", "-c", code, cwd=elsewhere).strip()
    assert Path(path) == target / "llava_next_ar" / "frame_token_layout.py"


def test_editable_install_is_this_checkout(tmp_path):
    code = "import llava_next_ar.frame_token_layout as module; print(module.__file__)"
    path = run(sys.executable, "-c", code, cwd=tmp_path).strip()
    assert Path(path) == ROOT / "frame_token_layout.py"


def test_every_direct_dependency_is_pinned():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    names = {normalised(re.match(r"[A-Za-z0-9._-]+", line).group()) for line in wanted} - {project["name"]}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalised(line.split("==")[0]) for line in pins if "==" in line}
    assert names - pinned == set()


def test_all_extra_names_every_other_extra():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (line,) = project["optional-dependencies"]["all"]
    named = set(re.fullmatch(r"llava-next-ar\[(.*)\]", line).group(1).split(","))
    assert named == set(project["optional-dependencies"]) - {"all"}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
