"""Push the app as a Space of the Hub, for a model that is there already or is pushed first.

    llava-next-ar push user/model --space user/app --dry-run
    llava-next-ar push user/model --space user/app --revision v1 --private
    llava-next-ar push outputs/run user/model --space user/app --license apache-2.0   # the model, then its Space

The Space holds app.py, requirements.txt, README.md, the modules of this package that the app needs, and its example clips. It
installs public packages alone. Its variables MODEL and REVISION name the checkpoint; REVISION is the newest commit unless
`--revision` is given. A README.md that was written by hand stays. All files are one commit, which also deletes modules of an
older push. Options for the push of a model are those of `llava-next-ar push --help`.

A private model needs the secret HF_TOKEN in the settings of the Space. The token of the push is that of `hf auth login`, or
HF_TOKEN.
"""

import argparse
import ast
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, SpaceInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from packaging.requirements import Requirement

from ...hub import push as model_push
from ...hub.command_line import CommandParser, stop
from ...hub.push_targets import DISTRIBUTION, requirements

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "llava_next_ar"
APP = Path(__file__).with_name("app.py")
EXTRA = "eval"  # packages of the app beside gradio, which the Space installs by its `sdk_version`
SPACE_MARK = "llava-next-ar push --space"  # in each file of a push; files without it belong to the Space's owner
PYTHON_VERSION = "3.10.13"  # that of ZeroGPU
SUGGESTED_HARDWARE = "zero-a10g"
Files = dict[str, Path | bytes]

PROGRAM = f"""# Written by {SPACE_MARK}. The variables MODEL and REVISION of the Space name the checkpoint.
try:
    import spaces  # noqa: F401  before torch: on ZeroGPU it replaces parts of it
except ImportError:  # hardware without ZeroGPU
    pass

from {PACKAGE}.serving.space.app import serve_space

serve_space()
"""
README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
python_version: {python}
app_file: app.py
models:
- {model}
suggested_hardware: {hardware}
short_description: Chat about videos, and expectations of the next frame
tags:
- video
- next-frame-prediction
---

# {title}

Chat about videos and images with [{model}](https://huggingface.co/{model}), and see its expectations of the next frame:
surprise by time and patch, true and predicted features, imagined frames.

The variables `MODEL` and `REVISION` of the Space name the checkpoint. A private checkpoint needs the secret `HF_TOKEN`.

<!-- Written by {mark}; a README.md without this line is kept by later pushes. -->
"""


def package_modules(start: Path) -> list[Path]:
    """Modules of this package that a module imports, directly or not, itself included; sorted."""
    found, waiting = set(), [start.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                modules = [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
                waiting += [module for module in modules if module.is_file()]
    return sorted(found)


def space_files(space_id: str, model_id: str, hardware: str = SUGGESTED_HARDWARE) -> Files:
    """Path in a Space -> file or content."""
    extras = [
        one.name
        for one in map(Requirement, importlib.metadata.requires(DISTRIBUTION) or ())
        if one.marker is not None and one.marker.evaluate({"extra": EXTRA}) and not one.marker.evaluate({"extra": ""})
    ]
    lines = [f"# Written by {SPACE_MARK}", *requirements(*extras)]
    readme = README.format(
        title=space_id.partition("/")[2],
        gradio=importlib.metadata.version("gradio"),
        python=PYTHON_VERSION,
        model=model_id,
        hardware=hardware,
        mark=SPACE_MARK,
    )
    files: Files = {
        "README.md": readme.encode(),
        "app.py": PROGRAM.encode(),
        "requirements.txt": ("\n".join(lines) + "\n").encode(),
    }
    examples = sorted(APP.parent.glob("examples/*.mp4"))
    for path in (*package_modules(APP), *examples, ROOT / "LICENSE"):
        if path.is_file():  # an installed package has no LICENSE here
            files[f"{PACKAGE}/{path.relative_to(ROOT).as_posix()}"] = path
    return files


def find_space(api: HfApi, space_id: str) -> SpaceInfo | None:
    """The Space, or None if it does not exist or the token cannot see it."""
    try:
        return api.space_info(space_id)
    except RepositoryNotFoundError:
        return None


def keep_own_files(api: HfApi, space: SpaceInfo, files: Files) -> dict[str, str]:
    """Take a README.md that was written by hand out of `files`; return the files left out, with the reason.

    Raises:
        ValueError: if another file of the Space would be replaced that this package did not write.
    """
    existing = {sibling.rfilename for sibling in space.siblings or ()}
    for name in sorted(existing & {"README.md", "app.py", "requirements.txt"}):
        path = api.hf_hub_download(space.id, name, revision=space.sha, repo_type="space")
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        if SPACE_MARK in text or name == "README.md" and _is_of_the_hub(text):
            continue
        if name != "README.md":
            raise ValueError(
                f"the Space {space.id} holds {name}, not written by an earlier push with --space: choose another Space, or "
                "delete the file there"
            )
        del files[name]
        return {name: "the Space's was written by hand"}
    return {}


def _is_of_the_hub(readme: str) -> bool:
    """Return True for the README.md that the Hub writes into a new Space: metadata, and a link to their reference."""
    text = readme.rpartition("---")[2]
    return "spaces-config-reference" in text and len(text.strip().splitlines()) <= 1


def push_space(space_id: str, model_id: str, options: argparse.Namespace, revision: str | None) -> CommitInfo | None:
    """Push the app for a model, and print the files and the commit.

    Args:
        revision: of the model; the newest commit if None.

    Raises:
        ValueError: if the model is not on the Hub, the Space holds files of its owner's with the same names, or `--private` is
            given for a public Space.
    """
    api, space, unreachable, model_is_private = HfApi(), None, None, False
    try:
        space = find_space(api, space_id)
        if not options.dry_run or not options.pushes_model:
            model = api.model_info(model_id, revision=revision)
            revision, model_is_private = model.sha if revision is None else revision, bool(model.private)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the model {model_id} is not on the Hub, or this token cannot read it: push it first"
        ) from error
    except (HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError):  # the Hub answered with an error
            raise
        unreachable = f"the Hub at {api.endpoint} cannot be reached ({' '.join(str(error).split())})"
        if not options.dry_run:
            raise ValueError(unreachable) from error
    if space is not None and options.private and not space.private:
        raise ValueError(f"the Space {space_id} exists and is public: make it private in its settings first")
    files = space_files(space_id, model_id, options.hardware or SUGGESTED_HARDWARE)
    left_out = keep_own_files(api, space, files) if space is not None else {}
    siblings = [sibling.rfilename for sibling in (space.siblings if space else None) or ()]
    stale = sorted(name for name in siblings if name.startswith(f"{PACKAGE}/") and name not in files)
    variables = {"MODEL": model_id, "REVISION": revision or "main"}
    if options.trust_remote_code:
        variables["TRUST_REMOTE_CODE"] = "1"
    print(model_push.describe(dict(sorted(files.items())), stale, left_out))
    print(f"variables: {', '.join(f'{name}={value}' for name, value in variables.items())}")
    if unreachable:
        print(f"{unreachable}: only the local files are listed")
    if options.dry_run:
        print("dry run: nothing was sent")
        return None
    if model_is_private:
        print(
            f"{model_id} is private: set the secret HF_TOKEN in the settings of the Space, with a token that can read it"
        )
    return _send(api, space_id, files, stale, variables, options)


def _send(
    api: HfApi,
    space_id: str,
    files: Mapping[str, Path | bytes],
    stale: Sequence[str],
    variables: Mapping[str, str],
    options: argparse.Namespace,
) -> CommitInfo:
    """Make the Space if needed, set its variables, and commit all files at once."""
    api.create_repo(
        space_id,
        repo_type="space",
        space_sdk="gradio",
        private=options.private or None,
        exist_ok=True,
        space_hardware=options.hardware,
        space_variables=[{"key": name, "value": value} for name, value in variables.items()],
    )
    for name, value in variables.items():  # a Space that existed keeps its old ones
        api.add_space_variable(space_id, name, value)
    commit = api.create_commit(
        space_id,
        [
            *(
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=file if isinstance(file, bytes) else str(file))
                for name, file in files.items()
            ),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        commit_message=options.message,
        repo_type="space",
    )
    print(f"pushed: {commit.commit_url}\nSpace: {api.endpoint}/spaces/{space_id}")
    return commit


def make_parser() -> CommandParser:
    """The command line of `push --space`."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="+", help="user/name of a model on the Hub; or a folder, and the name to push it to"
    )
    parser.add_argument("--space", required=True, help="user/name of the Space; made if it does not exist")
    parser.add_argument("--revision", help="branch, tag or commit of the model (default: its newest commit)")
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that the checkpoint carries (default: that of the Space)",
    )
    parser.add_argument(
        "--hardware",
        help=f"hardware to request for a new Space, which may cost (default: suggest {SUGGESTED_HARDWARE})",
    )
    parser.add_argument("--message", default="Upload with llava-next-ar push --space", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="list what would be done; send nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> CommitInfo | None:
    """Push a model if a folder is given, then its Space; exit with one line on an error."""
    parser = make_parser()
    options, rest = parser.parse_known_args(argv)
    options.pushes_model = len(options.model) == 2
    if len(options.model) > 2:
        parser.error(f"expected a model on the Hub, or a folder and a name, got {' '.join(options.model)}")
    if rest and not options.pushes_model:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    model_id, revision = options.model[-1], options.revision
    for value, what in ((options.space, "--space"), (model_id, "the model")):
        if value.count("/") != 1 or Path(value).exists():
            parser.error(f"{what} is {value!r}, expected user/name on the Hub")
    if not options.dry_run and get_token() is None:
        stop("no token: run `hf auth login`, or set HF_TOKEN to one that can write")
    if options.pushes_model:
        flags = ["--private"] * options.private + ["--dry-run"] * options.dry_run
        pushed: Any = model_push.main([*options.model, *flags, *rest])
        revision = revision or getattr(pushed, "oid", None)
    try:
        return push_space(options.space, model_id, options, revision)
    except (ValueError, OSError, HTTPError, RuntimeError) as error:  # RuntimeError: of the client, for a failed upload
        stop(error)


if __name__ == "__main__":
    main()
