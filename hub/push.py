"""Push a checkpoint to the Hub: model or adapter, with its processor, code and card, and nothing else.

    llava-next-ar push outputs/run user/model --dry-run
    llava-next-ar push outputs/run user/model --private --license apache-2.0 --results results.json
    llava-next-ar push outputs/run/checkpoint-500 user/model --branch step-500 --message "500 steps"
    llava-next-ar push outputs/lora user/adapter --base-model user/model   # if it was trained on a folder
    llava-next-ar push outputs/run user/model --endpoint --dry-run
    llava-next-ar push user/model --space user/app   # the browser app as a Space; --space user/app --help lists its options

The folder is a saved model, the output of a training, one of its checkpoints, or an adapter. It is validated before anything
is sent; the error names all missing files. Only files that a model needs are uploaded: never the state of the optimizer, logs,
data or tokens. The push is one commit, which also deletes weights of an older push that would be loaded instead. If it fails,
the repository is unchanged. A second commit then writes the hash of the first into the card, as the revision to pin. A
README.md that was written by hand is kept, in the folder and on the Hub.

`--endpoint` adds handler.py and requirements.txt, by which a Hugging Face Inference Endpoint serves the repository.

The token is that of `hf auth login`, or HF_TOKEN.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelInfo, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .command_line import CommandParser
from .hub_folder import portable_adapter_config, read_hub_folder
from .model_card import FILM, RELATIONS, CardOptions, build_card, find_base_model, is_generated
from .push_targets import ENDPOINT_FILES, ENDPOINT_MARK, endpoint_files, read_endpoint_files
from .pushed_model import commit_files, replaced_files

Files = dict[str, Path | bytes]


def collect_files(folder: Path, base_model: str | None = None) -> tuple[Files, dict[str, str]]:
    """Files to upload, without the card, and files left out: path -> reason.

    Raises:
        ValueError: if the folder is not complete, or the adapter's base is not on the Hub.
    """
    found = read_hub_folder(folder)
    files: Files = dict(found.files)
    if found.kind == "adapter":
        config = json.loads(found.files["adapter_config.json"].read_text(encoding="utf-8"))
        config = portable_adapter_config(config, base_model)
        files["adapter_config.json"] = json.dumps(config, indent=2, sort_keys=True).encode()
    return files, found.left_out


def find_repository(api: HfApi, repo_id: str, revision: str | None) -> ModelInfo | None:
    """The repository at a branch (at main for a new branch); None if it does not exist or the token cannot see it."""
    try:
        return api.model_info(repo_id, revision=revision, files_metadata=True)
    except RevisionNotFoundError:
        return api.model_info(repo_id, files_metadata=True)
    except RepositoryNotFoundError:
        return None


def keeps_card(api: HfApi, repo_id: str, repository: ModelInfo | None) -> bool:
    """Return True if the Hub holds a card that was written by hand."""
    if repository is None:
        return False
    try:
        path = api.hf_hub_download(repo_id, "README.md", revision=repository.sha)
    except EntryNotFoundError:
        return False
    return not is_generated(Path(path).read_text(encoding="utf-8"))


def add_endpoint(
    folder: Path, files: Files, left_out: dict[str, str], on_hub: Mapping[str, str], is_wanted: bool
) -> None:
    """Add the files of an Inference Endpoint to a push, or list those of an earlier push as kept on the Hub.

    Args:
        files, left_out: of `collect_files`; changed in place.
        on_hub: of `read_endpoint_files`.
        is_wanted: `--endpoint` was given.

    Raises:
        ValueError: if the folder or the Hub holds a file of the same name that this package did not write.
    """
    if not is_wanted:
        kept = [name for name, text in on_hub.items() if ENDPOINT_MARK in text]
        left_out |= dict.fromkeys(kept, "stays on the Hub, of an earlier push with --endpoint, which replaces it")
        return
    here = {
        path.name: path.read_text(encoding="utf-8", errors="replace")
        for path in map(folder.joinpath, ENDPOINT_FILES)
        if path.is_file()
    }
    for where, found in ((str(folder), here), ("the repository", on_hub)):
        foreign = [name for name, text in found.items() if ENDPOINT_MARK not in text]
        if foreign:
            raise ValueError(
                f"{where} holds {' and '.join(foreign)}, not written by an earlier push with --endpoint: delete or rename it, "
                "or push without --endpoint"
            )
    added = endpoint_files(*(["peft"] if "adapter_config.json" in files else []))
    files |= added
    for name in added:
        left_out.pop(name, None)


def describe(files: Mapping[str, Path | bytes], stale: Sequence[str], left_out: Mapping[str, str]) -> str:
    """Table of the files to upload, the files to delete on the Hub, and each file or folder left out with the reason."""
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    lines = [f"upload    {size:>16,}  {name}" for name, size in sizes.items()]
    lines += [f"delete    {'':>16}  {name} (of an older push)" for name in stale]
    folders: dict[str, Counter[str]] = {}
    for name, why in left_out.items():
        top, slash, _ = name.partition("/")
        folders.setdefault(top + slash, Counter())[why] += 1
    for name, reasons in folders.items():
        counted = (f"{number} {'file' if number == 1 else 'files'}: {why}" for why, number in reasons.items())
        why = "; ".join(counted if name.endswith("/") else reasons)
        lines.append(f"left out  {'':>16}  {name} ({why})")
    return "\n".join([*lines, f"{len(files)} files, {sum(sizes.values()):,} bytes"])


def push(folder: Path, repo_id: str, options: argparse.Namespace) -> CommitInfo | None:
    """Push a folder and print the files and the commit.

    Raises:
        ValueError: if the folder is not complete, `--private` is given for a public repository, or `--endpoint` would replace
            a file that this package did not write.
    """
    files, left_out = collect_files(folder, options.base_model)
    if options.film is not None:
        files[FILM] = read_film(options.film)
    api, repository, unreachable = HfApi(), None, None
    try:
        repository = find_repository(api, repo_id, options.branch)
    except (HTTPError, OSError) as error:
        unreachable = f"the Hub at {api.endpoint} cannot be reached ({' '.join(str(error).split())})"
        if isinstance(error, HfHubHTTPError):  # the Hub answered with an error
            raise
        if not options.dry_run:
            raise ValueError(unreachable) from error
    add_endpoint(folder, files, left_out, read_endpoint_files(api, repository), options.endpoint)
    if repository is not None and options.private and not repository.private:
        raise ValueError(f"{repo_id} is there already and is public: make it private on its page first")
    base = None if unreachable else find_base_model(folder, options.base_model)
    license_of_base, base_revision = look_up_base(base)
    card = CardOptions(
        base_model=options.base_model,
        base_revision=base_revision,
        relation=options.relation,
        license=options.license or license_of_base,
        language=options.language,
        datasets=options.dataset,
        results=options.results,
        has_film=FILM in files,
    )
    writes_card = "README.md" not in files or is_generated(files["README.md"].read_text(encoding="utf-8"))
    if writes_card and not options.overwrite_card and keeps_card(api, repo_id, repository):
        files.pop("README.md", None)
        left_out["README.md"] = "the Hub's was written by hand; --overwrite-card replaces it"
        writes_card = False
    if writes_card:
        files["README.md"] = str(build_card(folder, repo_id, card)).encode()
    stale = replaced_files(api, repository, files) if repository else []
    print(describe(dict(sorted(files.items())), stale, left_out))
    if writes_card and card.license is None:
        print("the card names no license: give one with --license")
    if unreachable:
        print(f"{unreachable}: only the local files are listed, without what a push would delete or keep there")
    if options.dry_run:
        print("dry run: nothing was sent")
        return None

    if repository is None:
        api.create_repo(repo_id, private=options.private, exist_ok=True)
    where: dict[str, Any] = {"revision": options.branch, "create_pr": options.pull_request}
    commit = commit_files(repo_id, files, commit_message=options.message, **where)
    print(f"pushed: {commit.pr_url or commit.commit_url}")
    if writes_card and not options.pull_request:
        pinned = str(build_card(folder, repo_id, card, revision=commit.oid)).encode()
        message = f"Model card: pin {commit.oid[:8]}"
        commit_files(repo_id, {"README.md": pinned}, commit_message=message, revision=options.branch)
    pin = f'revision="{commit.oid}"'
    if "adapter_config.json" in files:  # `revision` is then that of the base
        pin = f'revision="{base_revision or "main"}", adapter_kwargs={{"revision": "{commit.oid}"}}'
    print(f'to pin it: from_pretrained("{repo_id}", {pin}, trust_remote_code=True)')
    return commit


def read_film(path: Path) -> bytes:
    """The bytes of a picture for the card.

    Raises:
        ValueError: if it is not a PNG file.
    """
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG\r\n"):
        raise ValueError(f"--film is {path}, expected a PNG file")
    return content


def look_up_base(base: str | None) -> tuple[str | None, str | None]:
    """License and newest commit of the base on the Hub; None for a value that is not found, and for the license "other"."""
    commit = found = None
    try:
        if base is not None:
            commit = HfApi().model_info(base).sha
            found = ModelCard.load(base, ignore_metadata_errors=True).data.license
    except (HTTPError, OSError, ValueError):  # no such repository, no card in it, or no network
        pass
    return (None if found == "other" else found), commit


def main(argv: Sequence[str] | None = None) -> CommitInfo | None:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="saved model, output of a training, checkpoint of it, or adapter")
    parser.add_argument("repo_id", help="user/name on the Hub; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--branch", help="made from main if it does not exist; main by default")
    target.add_argument("--pull-request", "--pull_request", action="store_true", help="open one instead of pushing")
    parser.add_argument("--message", default="Upload with llava-next-ar push", help="of the commit")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="list all changes; send nothing")
    serving = parser.add_argument_group("serving")
    serving.add_argument(
        "--endpoint", action="store_true", help="add handler.py and requirements.txt for an Inference Endpoint"
    )
    card = parser.add_argument_group("model card (facts that the folder does not hold)")
    card.add_argument("--base-model", "--base_model", help="Hub id; needed for an adapter of a local folder")
    card.add_argument("--relation", choices=RELATIONS, help="to the base; read from the folder by default")
    card.add_argument("--license", help="such as apache-2.0; that of the base's card by default")
    card.add_argument("--language", nargs="+", default=(), help="ISO 639 codes, such as en")
    card.add_argument("--dataset", nargs="+", default=(), help="Hub ids of the training data")
    card.add_argument(
        "--results", type=Path, help="JSON of `llava-next-ar evaluate`; results.json of the folder by default"
    )
    card.add_argument(
        "--film",
        type=Path,
        help="PNG file to show, as `llava-next-ar visualize` draws; film.png of the folder by default",
    )
    card.add_argument(
        "--overwrite-card",
        "--overwrite_card",
        action="store_true",
        help="replace one on the Hub that was written by hand",
    )
    options = parser.parse_args(argv)
    if not options.dry_run and get_token() is None:
        sys.exit(f"{parser.prog}: no token: run `hf auth login`, or set HF_TOKEN to one that can write")
    try:
        return push(options.folder, options.repo_id, options)
    except (ValueError, OSError, HTTPError, RuntimeError) as error:  # the last is the client's, for a failed upload
        because = f" {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else ""
        sys.exit(f"{parser.prog}: {error}{because}")


if __name__ == "__main__":
    main()
