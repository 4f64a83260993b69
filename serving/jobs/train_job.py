# /// script
# requires-python = ">=3.10"
# dependencies = ["llava-next-ar[train]"]
#
# [tool.hf-jobs]
# flavor = "a10g-large"
# timeout = "24h"
# secrets = ["HF_TOKEN"]
# ///
# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Train as a job on the Hub: `llava-next-ar train` on rented hardware, and a push of the result at the end.

    hf jobs uv run --secrets HF_TOKEN -v hf://datasets/user/clips:/data serving/jobs/train_job.py \\
        --repo-id user/model --config lora --model llava-hf/llava-onevision-qwen2-0.5b-ov-hf \\
        --train_data /data/train.json --video_root /data --merge_lora true

    python serving/jobs/train_job.py --repo-id user/model --dry-run --config demo --model demo_output/base \\
        --train_data demo_output/clips/train.json   # here, without training: what the job would do

`hf jobs uv run --dry-run` prints the job without starting it. Options that are not listed below are those of
`llava-next-ar train`. The repository is made, and the token tried, before the training starts. The token is the secret
HF_TOKEN of the job and never an argument: arguments are shown on the job's page.

The header above is a PEP 723 script header: uv installs its dependencies. Where the package is not on the index that uv reads,
replace `llava-next-ar[train]` by `llava-next-ar[train] @ <URL of a wheel or a git repository>`.

Exit status: 0 after the push, that of the training or the push if one fails, 2 on a wrong argument.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

PROGRAM = (sys.executable, "-m", "llava_next_ar.scripts.command")
DEFAULT_OUTPUT = "outputs/run"
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")  # a token of the Hub
_SECRET_OPTION = re.compile(r"--\w*(token|secret|password|api_key)(=|$)")


def make_parser() -> argparse.ArgumentParser:
    """The command line; all other options are those of `llava-next-ar train`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repo-id", required=True, help="user/name on the Hub to push to; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--license", help="of the model, such as apache-2.0 (default: that of the base)")
    parser.add_argument("--endpoint", action="store_true", help="push the files of an Inference Endpoint too")
    parser.add_argument("--dry-run", action="store_true", help="validate recipe and data; train and push nothing")
    return parser


def plan(options: argparse.Namespace, train_options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of `llava-next-ar` for the training and for the push.

    Raises:
        ValueError: if an argument holds a secret, or asks the training to push by itself.
    """
    for word in train_options:
        if _TOKEN.search(word) or _SECRET_OPTION.match(word.replace("-", "_").replace("__", "--", 1)):
            raise ValueError(
                f"{_TOKEN.sub('hf_...', word)}: arguments of a job are visible on its page; give the token as a secret: "
                "hf jobs uv run --secrets HF_TOKEN ..."
            )
        if word.partition("=")[0] in ("--push_to_hub", "--push-to-hub"):
            raise ValueError(f"{word}: the job pushes to --repo-id at its end; leave the option out")
    words = list(train_options)
    outputs = [word.partition("=") for word in words if word.partition("=")[0] in ("--output_dir", "--output-dir")]
    if not outputs:
        output, words = DEFAULT_OUTPUT, [*words, "--output_dir", DEFAULT_OUTPUT]
    else:
        name, is_joined, value = outputs[-1]
        place = len(words) - 1 - words[::-1].index(f"{name}{is_joined}{value}")
        if not is_joined and place + 1 == len(words):
            raise ValueError(f"{name} has no value")
        output = value if is_joined else words[place + 1]
    push = ["push", output, options.repo_id]
    push += ["--private"] * options.private + ["--endpoint"] * options.endpoint
    push += ["--license", options.license] if options.license else []
    return ["train", *words], push


def run(arguments: Sequence[str]) -> int:
    """Exit status of `llava-next-ar` with these arguments; its output goes to the log of the job line by line."""
    print(f"+ llava-next-ar {shlex.join(arguments)}", flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.run([*PROGRAM, *arguments], env=environment, check=False).returncode


def main(argv: Sequence[str] | None = None) -> None:
    """Train and push; exit with the status of the part that failed."""
    parser = make_parser()
    options, train_options = parser.parse_known_args(argv)
    try:
        train, push = plan(options, train_options)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if options.dry_run:
        status = run(["check", *train[1:]])
        print(f"dry run: after the training the job runs: llava-next-ar {shlex.join(push)}", flush=True)
        sys.exit(status)
    if get_token() is None:
        parser.exit(2, f"{parser.prog}: no token: start the job with --secrets HF_TOKEN\n")
    try:  # a wrong name or a token that only reads is found now, not after hours
        HfApi().create_repo(options.repo_id, private=options.private or None, exist_ok=True)
    except (HfHubHTTPError, HFValidationError) as error:
        parser.exit(2, f"{parser.prog}: cannot push to {options.repo_id}: {' '.join(str(error).split())}\n")
    status = run(train) or run(push)
    sys.exit(status)


if __name__ == "__main__":
    main()
