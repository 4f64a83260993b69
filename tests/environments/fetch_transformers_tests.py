"""The installed transformers' own test files, for tests/modeling/test_transformers_common.py.

    python tests/environments/fetch_transformers_tests.py
    TRANSFORMERS_REPO=../transformers python tests/environments/fetch_transformers_tests.py

They are not part of the installed package. The source distribution, which pip downloads once into `.cache/`, holds the
files right under tests/ whose names begin with `test_`; tests/generation and the rest come only with a checkout of the
repository, named by `TRANSFORMERS_REPO`, which is then read instead. Prints what could be had and what could not.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

from filelock import FileLock

REPO_VARIABLE = "TRANSFORMERS_REPO"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "transformers_tests"
TIMEOUT = 120  # seconds for a download of 10 MB
# File -> what it is for. The first four are in the source distribution.
WANTED = {
    "tests/test_modeling_common.py": "ModelTesterMixin",
    "tests/test_configuration_common.py": "ConfigTester",
    "tests/test_processing_common.py": "ProcessorTesterMixin",
    "tests/test_video_processing_common.py": "VideoProcessingTestMixin",
    "tests/generation/test_utils.py": "GenerationTesterMixin",
    "tests/exporters/test_export.py": "ExportTesterMixin",
    "tests/utils/test_configuration_utils.py": "the list of keys that every configuration takes",
}


class TestsUnavailableError(RuntimeError):
    """The test files cannot be downloaded; the message holds the cause."""


def installed_version() -> str:
    return metadata.version("transformers")


def fetch(cache: Path = CACHE) -> Path:
    """A folder that holds `tests/test_modeling_common.py`, downloaded if it is not there yet.

    Raises:
        TestsUnavailableError: if neither a checkout nor the source distribution can be had.
    """
    if os.environ.get(REPO_VARIABLE):
        folder = Path(os.environ[REPO_VARIABLE]).expanduser().resolve()
        if not (folder / "tests/test_modeling_common.py").is_file():
            raise TestsUnavailableError(f"{REPO_VARIABLE}={folder} holds no tests/test_modeling_common.py")
        return folder
    folder = cache / installed_version()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):  # several processes may run the tests
        if not (folder / "tests/test_modeling_common.py").is_file():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                source = _unpack(_download(Path(scratch)), Path(scratch))
                shutil.rmtree(folder, ignore_errors=True)
                source.rename(folder)
    return folder


def missing(folder: Path) -> list[str]:
    """Required files that `folder` lacks, one line for each."""
    return [f"{name} ({what})" for name, what in WANTED.items() if not (folder / name).is_file()]


def describe(folder: Path) -> list[str]:
    """Lines that say which files are used and which could not be had."""
    if os.environ.get(REPO_VARIABLE):
        lines = [f"from the checkout {folder}, run against the installed transformers {installed_version()}"]
    else:
        lines = [f"from the source distribution of transformers {folder.name}"]
    lines += [f"not to be had: {line}" for line in missing(folder)]
    if len(lines) > 1 and not os.environ.get(REPO_VARIABLE):
        lines.append(f"{REPO_VARIABLE}=<checkout of the repository> adds what is missing")
    return lines


def _download(scratch: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise TestsUnavailableError("pip is not installed, with which the source distribution is fetched")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "0"]
    # pip builds the metadata even of what it only keeps: in an environment of its own, as the setuptools that is installed
    # here may be too old for it.
    command += ["--no-deps", "--no-binary", "transformers", "--dest", str(scratch)]
    try:
        subprocess.run(
            [*command, f"transformers=={installed_version()}"],
            check=True,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.CalledProcessError as error:
        last = [line for line in error.stderr.splitlines() if "error" in line.lower()] or ["no message"]
        raise TestsUnavailableError(
            f"the source distribution of transformers {installed_version()} cannot be downloaded: {last[-1].strip()}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise TestsUnavailableError(
            f"the source distribution of transformers {installed_version()} did not come within {TIMEOUT} s"
        ) from error
    (archive,) = scratch.glob("transformers-*.tar.gz")
    return archive


def _unpack(archive: Path, scratch: Path) -> Path:
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(f"{root}/tests/") and ".." not in member.name:
                # By hand, since extractall is safe on any archive from Python 3.11.4 on only.
                target = scratch / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    folder = scratch / root
    if not (folder / "tests/test_modeling_common.py").is_file():
        raise TestsUnavailableError(f"{archive.name} holds no tests/test_modeling_common.py")
    (folder / "tests/__init__.py").touch()
    return folder


def main() -> None:
    try:
        folder = fetch()
    except TestsUnavailableError as error:
        sys.exit(f"transformers' own tests: {error}")
    print("\n".join([str(folder), *describe(folder)]))


if __name__ == "__main__":
    main()
