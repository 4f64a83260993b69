# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""`HubTrainer`: a transformers Trainer that pushes a complete model, and nothing else, in one commit.

transformers uploads the whole output folder, with logs and the pickled arguments, which hold the Hub token. Weights of an older
push stay, and with Xet a large folder takes several commits. Here a push holds the files that `hub_folder` finds in the folder,
and no saved file holds the token.
"""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers import Trainer
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..hub.hub_folder import is_library_card, portable_adapter_config, read_hub_folder
from ..hub.model_card import PIPELINE_TAG
from ..hub.pushed_model import MODEL_TAGS, commit_files, hub_id

logger = logging.get_logger(__name__)

_SNAPSHOT = "_pushing_"  # a folder's name begins so


class HubTrainer(Trainer):
    """A Trainer that saves complete adapters and pushes complete folders.

    With `hub_strategy` "checkpoint" or "all_checkpoints" the state of the training is pushed too, in a separate folder.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        card = folder / "README.md"
        text = card.read_bytes() if card.is_file() else None
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        # transformers pickles the token with the other arguments, readable for each user of the folder.
        args = copy.copy(self.args)
        args.hub_token = None
        torch.save(args, folder / TRAINING_ARGS_NAME)
        if text is not None:  # PEFT would rewrite it
            card.write_bytes(text)
        elif card.is_file():
            _complete_card(card)
        adapter = folder / "adapter_config.json"
        if adapter.is_file() and hasattr(self.model, "get_base_model"):
            self._complete_adapter(adapter)

    def _complete_adapter(self, path: Path) -> None:
        """Adds the code to an adapter, and names its base by its Hub id if it has one."""
        base = self.model.get_base_model()
        if hasattr(base, "save_code"):
            base.save_code(path.parent)
        elif getattr(base, "_auto_class", None) is not None:  # remote code of a release without this method
            custom_object_save(base, path.parent)
        config = json.loads(path.read_text(encoding="utf-8"))
        base_path = config["base_model_name_or_path"]
        if hub_id(base_path) is not None:
            config = portable_adapter_config(config)
        elif base_path and os.path.isdir(base_path):  # found from any folder of this computer, and in any process
            config.update(base_model_name_or_path=os.path.abspath(base_path), auto_mapping=None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

    def create_model_card(self, *args: Any, tags: str | list[str] | None = None, **kwargs: Any) -> None:
        """As in transformers, unless the folder has a card that no library wrote: the card of a training has more content."""
        path = Path(self.args.output_dir) / "README.md"
        is_kept = path.is_file() and not is_library_card(path.read_text(encoding="utf-8"))
        if is_kept or not self.is_world_process_zero():
            return
        tags = [tags] if isinstance(tags, str) else list(tags or ())
        super().create_model_card(*args, tags=sorted({*tags, *MODEL_TAGS}), **kwargs)
        _complete_card(path)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Any:
        """As in Trainer: saves, writes the card and uploads; see there for the arguments.

        Returns:
            the commit, or a `Future` of it if not `blocking`; None on all ranks but the first.

        Raises:
            ValueError: if the output folder is not a complete checkpoint, or an adapter's base is a local folder.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs.setdefault("model_name", self.hub_model_id.split("/")[-1])
        self.create_model_card(**kwargs)
        self._finish_current_push()
        options = {"commit_message": commit_message, "token": token, "revision": revision or self.args.hub_revision}
        files = self._files_to_push(Path(self.args.output_dir))
        if blocking:
            return commit_files(self.hub_model_id, files, **options)
        return HfApi().run_as_future(commit_files, self.hub_model_id, files, **options)

    def _files_to_push(self, folder: Path) -> dict[str, Path | bytes]:
        files: dict[str, Path | bytes] = dict(read_hub_folder(folder).files)
        if "adapter_config.json" in files:
            config = portable_adapter_config(json.loads(files["adapter_config.json"].read_text(encoding="utf-8")))
            files["adapter_config.json"] = json.dumps(config, indent=2, sort_keys=True).encode()
        return files

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in Trainer; one commit for the model and, depending on `hub_strategy`, the state of the training."""
        strategy, checkpoint, output = self.args.hub_strategy, Path(checkpoint_folder), Path(self.args.output_dir)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not is_busy:
            self._finish_current_push()  # reports one that failed
            for left_over in output.glob(f"{_SNAPSHOT}*"):  # of a run that was killed
                shutil.rmtree(left_over, ignore_errors=True)
        snapshot = _snapshot(checkpoint, output)
        try:
            files, replaced = self._files_to_push(snapshot), None
        except ValueError as error:  # training goes on; sharded checkpoints of FSDP, for example, are not Hub folders
            logger.warning(f"{checkpoint.name} is not pushed: {error}")
            shutil.rmtree(snapshot)
            return
        if (output / "README.md").is_file():
            files["README.md"] = (output / "README.md").read_bytes()
        step, epoch = self.state.global_step, int(self.state.epoch)
        progress = f"step {step}" if self.args.save_strategy == SaveStrategy.STEPS else f"epoch {epoch}"
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            replaced = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            for path in (p for p in snapshot.rglob("*") if p.is_file()):
                files[f"{replaced}/{path.relative_to(snapshot).as_posix()}"] = path
        job = HfApi().run_as_future(
            commit_files,
            self.hub_model_id,
            files,
            commit_message=f"Training in progress, {progress}",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            replaced_folder=replaced,
        )
        job.add_done_callback(lambda _: shutil.rmtree(snapshot, ignore_errors=True))
        if is_busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        for job in self.push_in_progress.jobs if getattr(self, "push_in_progress", None) is not None else ():
            if job.exception() is not None:
                logger.warning(f"a push during the training failed: {job.exception()}")
        self.push_in_progress = None


def _snapshot(checkpoint: Path, output: Path) -> Path:
    """Links the files of a checkpoint into a new folder, so that they last through the upload if it is deleted."""
    snapshot = Path(tempfile.mkdtemp(prefix=_SNAPSHOT, dir=output))
    for path in (p for p in checkpoint.rglob("*") if p.is_file()):
        target = snapshot / path.relative_to(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)  # takes neither time nor space
        except OSError:  # where the file system has no hard links
            shutil.copy(path, target)
    return snapshot


def _complete_card(path: Path) -> None:
    """Names the base in a library's card by its Hub id, if it has one: PEFT writes its folder, which the Hub rejects."""
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data.pipeline_tag = card.data.pipeline_tag or PIPELINE_TAG
    card.data.base_model = hub_id(card.data.base_model)
    # PEFT's tag for the base holds the folder too. The Hub makes one itself, from `base_model`.
    card.data.tags = [tag for tag in card.data.tags or () if not tag.startswith("base_model:")]
    card.save(path)
