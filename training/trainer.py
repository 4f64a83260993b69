# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""`AutoregressiveTrainer`: a transformers Trainer for a model with two losses.

It depends on the outputs of the model alone: any model that returns `loss`, `main_loss` and `autoregressive_loss` can
be trained.

Trainer divides a sum of token losses by the number of tokens in the whole optimizer step (all micro-batches, all
ranks), so that gradients do not depend on the split of the step. This trainer does the same for the reconstruction
loss, which is a sum over videos: it counts the videos of the step, and the model divides by their number. Both losses
are logged in the same way, so that the logged components sum to the trained loss.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, has_length
from transformers.utils import logging

from .checkpoints import ResumableTrainer, last_complete_checkpoint
from .collator import LlavaVideoCollator
from .data import BadSampleError, LlavaVideoDataset
from .guards import RECOMMENDED_SHARE, BadStepError, BadStepPolicy, NamingCollator, ShareWatch, StepGuard
from .hub_trainer import HubTrainer
from .mixture import EpochSampler, FollowEpoch
from .termination import StopOnSigterm
from .throughput import StepFlops, ThroughputMeter, TimedIterator, count_batch, peak_flops

logger = logging.get_logger(__name__)

HEAD = "autoregressive_module"  # attribute of a model that holds its reconstruction head


def prepare_for_training(model: nn.Module) -> nn.Module:
    """Sets training mode; freezes unused parts, and creates the teacher if the vision tower trains.

    To be called after choosing the trainable parts and before wrapping the model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name in ("freeze_unused_parts", "create_teacher"):  # other models may have neither
        getattr(base, name, lambda: None)()
    return model.train()


class AutoregressiveTrainer(ResumableTrainer, HubTrainer):
    """Trains language modeling and next-frame reconstruction together.

    Logs at every logging step, beside the entries of Trainer:

    - `main_loss`, `autoregressive_loss` (unweighted; 0 if no video of the window has two frames) and `total_loss` (equal to
      Trainer's `loss`);
    - `autoregressive_share`, of the weighted reconstruction in the total;
    - `skill`, 1 - mse / copy_mse of the predictions: 0 for copying the last frame;
    - the throughput of the window, see `ThroughputMeter.pop`.

    Evaluation logs `eval_main_loss` (mean over tokens), `eval_autoregressive_loss` (mean over videos), `eval_skill`, and as
    `eval_loss` their weighted sum: means over the whole set, whatever the batches. (On several ranks, samples that
    accelerate repeats to fill the last batch count twice.)

    Args:
        model: the model, or the PEFT model around it.
        args: `TrainingArguments`.
        train_dataset: usually a `LlavaVideoDataset`; its processor serves as `processing_class` and for the collator
            unless others are given. With the processor, every checkpoint is a complete Hub folder.
        enable_autoregressive: train the head. If False, a head is neither run nor trained, and only `main_loss` is logged.
        head_learning_rate: learning rate of the head; by default that of the model.
        bad_steps: reaction to a step whose loss or gradient is not finite or explodes; by default, stop. Samples are named by
            their `sample_name`.
        recommended_share: lowest and highest share of the reconstruction in the loss without a warning.
        kwargs: further arguments of `Trainer`.

    Raises:
        ValueError: if the model has no head to train, its head is new and frozen, several GPUs would be used by one
            process, or label smoothing or a loss function is asked for, which would replace both losses.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        train_dataset: Any = None,
        *,
        enable_autoregressive: bool = True,
        head_learning_rate: float | None = None,
        bad_steps: BadStepPolicy | None = None,
        recommended_share: Sequence[float] = RECOMMENDED_SHARE,
        **kwargs: Any,
    ) -> None:
        processor = getattr(train_dataset, "processor", None)
        if kwargs.get("processing_class") is None and processor is not None:
            kwargs["processing_class"] = processor
        processor = kwargs.get("processing_class")
        if kwargs.get("data_collator") is None and processor is not None:
            kwargs["data_collator"] = LlavaVideoCollator(processor)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func would replace main_loss and autoregressive_loss, which the model computes"
            )
        args = TrainingArguments("tmp_trainer") if args is None else args  # as in Trainer
        if args.accelerator_config.dispatch_batches:
            raise ValueError("dispatch_batches=True would cut batches into rows, and a batch of videos has none")
        args.accelerator_config.dispatch_batches = False  # the default is True for streams, also in evaluations
        if head_learning_rate is not None and (kwargs.get("optimizers") or (None,))[0] is not None:
            raise ValueError("head_learning_rate has no effect on an optimizer that is given; set it there")
        if args.dataloader_pin_memory:
            args.accelerator_config.non_blocking = True  # pixels go to the device while the step before still runs
        # Trainer calls model_init here, and again in train().
        self.enable_autoregressive = enable_autoregressive
        self.head_learning_rate = head_learning_rate
        self.recommended_share = recommended_share
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor} would replace main_loss and "
                "autoregressive_loss, which the model computes; it must be 0"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"this process would use {self.args.n_gpu} GPUs by DataParallel, which cannot split videos by sample: "
                "start one process per GPU with `accelerate launch` or torchrun, or set CUDA_VISIBLE_DEVICES"
            )
        if self.model_init is None:
            self._prepare_model(self.model)
        self._bad_steps = BadStepPolicy() if bad_steps is None else bad_steps
        if self._bad_steps.action == "skip" and self.is_deepspeed_enabled:
            raise ValueError("bad steps cannot be skipped under DeepSpeed, which makes them in the backward pass")
        self._follow_epoch = FollowEpoch()
        self.add_callback(self._follow_epoch)
        self._num_videos_in_batch: torch.Tensor | None = None  # of the batches counted last
        self._num_videos_in_step: torch.Tensor | None = None
        self._eval_sums = _LossSums()
        self._reset_run()

    def _prepare_model(self, model: nn.Module) -> None:
        """Validates a model before training, and freezes its head without `enable_autoregressive`."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._forward_names = set(inspect.signature(base.forward).parameters)
        head = getattr(base, HEAD, None)
        if self.enable_autoregressive and head is None:
            raise ValueError(
                f"enable_autoregressive=True, but {type(base).__name__} has no reconstruction head ({HEAD}): load it "
                "with enable_autoregressive=True in its configuration, or pass enable_autoregressive=False"
            )
        if self.enable_autoregressive and "num_videos_in_batch" not in self._forward_names:
            raise ValueError(
                f"{type(base).__name__}.forward takes no num_videos_in_batch, so its reconstruction loss would depend "
                "on how a step is split into batches"
            )
        if self.enable_autoregressive:
            _check_objective_trains(head)
        elif head is not None:
            head.requires_grad_(False)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in Trainer; the model is prepared as one that is passed to the constructor."""
        model = super().call_model_init(trial)
        self._prepare_model(model)
        prepare_for_training(model)
        return model

    # ---- runs -------------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer."""
        # Before Trainer wraps the model for several ranks: DDP would wait for gradients of unused parts, and a tower that FSDP
        # has sharded cannot be copied.
        if self.model_init is None:
            prepare_for_training(self.model)
        return super().train(*args, **kwargs)

    def _begin_run(self, checkpoint: str | None) -> None:
        super()._begin_run(checkpoint)
        self._reset_run()

    def _reset_run(self) -> None:
        """Creates the state of a run, so that none is left of an earlier one that broke off or ran out of memory."""
        self._train_sums = _LossSums()
        self._share_watch = ShareWatch(recommended=self.recommended_share)
        self._guard = StepGuard(self._bad_steps, self.args.output_dir)
        self._before_step: tuple[torch.Tensor, _LossSums] | None = None
        self._meter = self._make_meter()

    def _make_meter(self) -> ThroughputMeter:
        try:
            flops = StepFlops(self.model, self.enable_autoregressive)
        except AttributeError:  # another model
            flops = None
        is_16_bit = self.args.bf16 or self.args.fp16 or next(self.model.parameters()).dtype.itemsize == 2
        is_cuda = self.args.device.type == "cuda"
        peak = peak_flops(torch.cuda.get_device_name(self.args.device)) if is_cuda and is_16_bit else None
        config = getattr(self.model, "config", None)
        ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
        self._visual_token_ids = [token for token in ids if token is not None]
        return ThroughputMeter(flops, peak)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """As in Trainer, with an order that depends on seed and epoch alone, and lengths from headers."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        is_grouped = strategy == "group_by_length" and hasattr(dataset, "lengths")
        if not (is_grouped or strategy == "random") or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        sampler = EpochSampler(
            dataset,
            seed=args.seed if args.data_seed is None else args.data_seed,
            group_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            if is_grouped
            else None,
            num_workers=args.dataloader_num_workers,
        )
        sampler.set_epoch(int(self.state.epoch or 0))  # the data set may be in use already
        self._follow_epoch.add(sampler)
        return sampler

    # ---- counting ---------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """As in Trainer: returns the batches of one optimizer step, and the number of their targets."""
        self._meter.begin_step()
        timed = TimedIterator(epoch_iterator)
        batches, num_items = super().get_batch_samples(timed, num_batches, device)
        self._num_videos_in_step = self._num_videos_in_batch
        if self._guard.policy.action == "skip":
            self._before_step = self._tr_loss.clone(), copy.copy(self._train_sums)
        num_samples = self._guard.begin(batches)
        self._meter.add_data(
            [
                count_batch(batch, number, self._visual_token_ids)
                for batch, number in zip(batches, num_samples, strict=True)
                if "input_ids" in batch
            ],
            timed.seconds,
        )
        self._train_sums.steps += bool(batches)
        return batches, num_items

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log and self._tr_loss.device.type != "cpu":
            self._tr_loss.item()  # waits for the device before the clock stops; the log reads it anyway
        self._meter.end_step()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        # Called once for each optimizer step, and for each batch of an evaluation; counts the videos too.
        num_items = super()._get_num_items_in_batch(batch_samples, device)
        self._num_videos_in_batch = None
        if self.enable_autoregressive and num_items is not None:
            count = torch.tensor(sum(map(_count_videos, batch_samples)), device=device)
            # As Trainer treats the number of targets. On all ranks alike, `num_items` is None or not.
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                count = self.accelerator.gather(count).sum()
            self._num_videos_in_batch = count / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())
        if isinstance(num_items, torch.Tensor):
            num_items = num_items.clamp(min=1)  # else a step without targets would divide by zero
        return num_items

    # ---- losses -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """As in Trainer; passes the number of videos of the step to the model, and keeps the components for the log."""
        # An evaluation within a step counts its own batches.
        num_videos_in_batch = self._num_videos_in_step if model.training else self._num_videos_in_batch
        options = {
            "num_items_in_batch": num_items_in_batch if self.model_accepts_loss_kwargs else None,
            "num_videos_in_batch": num_videos_in_batch,
            "return_reconstruction": self.enable_autoregressive or None,
            "skip_reconstruction": not self.enable_autoregressive or None,
            "skip_logits": model.training or None,
        }
        options = {
            name: value
            for name, value in options.items()
            if value is not None and (name in self._forward_names or name == "num_items_in_batch")
        }
        outputs = model(**{**inputs, **options})
        loss = outputs["loss"]
        if loss is None:
            raise ValueError("the model returned no loss: the batch has no labels")
        main_loss, autoregressive_loss = outputs.get("main_loss", loss), outputs.get("autoregressive_loss")
        if model.training:
            self._guard.add(loss)
            # Trainer logs the mean of the returned loss over ranks, so the sums are those of the scaled losses.
            scale = self._loss_scale(num_items_in_batch)
            loss = loss * scale
            share = 1 if self._is_step_loss(num_items_in_batch) else 1 / self.current_gradient_accumulation_steps
            self._train_sums.add(
                loss.device,
                total_loss=loss * share,
                main_loss=main_loss * scale * share,
                autoregressive_loss=None if autoregressive_loss is None else autoregressive_loss * scale * share,
                **_squared_errors(outputs),
            )
        else:
            # Sums, so that the means over the set do not depend on its batches.
            num_items, num_videos = (inputs["labels"][..., 1:] != -100).sum(), _count_videos(inputs)
            items_divisor = num_items_in_batch if "num_items_in_batch" in options else num_items
            videos_divisor = num_videos_in_batch if "num_videos_in_batch" in options else num_videos
            self._eval_sums.add(
                loss.device,
                num_items=num_items,
                main_loss=main_loss * items_divisor,
                **_squared_errors(outputs),
            )
            if autoregressive_loss is not None:
                self._eval_sums.add(
                    loss.device,
                    num_videos=num_videos,
                    autoregressive_loss=autoregressive_loss * videos_divisor,
                    weighted_loss=(loss - main_loss) * videos_divisor,
                )
            loss = loss * self._loss_scale(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _is_step_loss(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """True if the loss is divided by a count over the whole optimizer step; else batches are averaged."""
        return self.model_accepts_loss_kwargs and num_items_in_batch is not None

    def _loss_scale(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """Undoes the mean that data-parallel training takes over ranks: losses divided by global counts add up."""
        if not (self.args.average_tokens_across_devices and self._is_step_loss(num_items_in_batch)):
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """As in Trainer; computes no logits where the loss alone is used."""
        if prediction_loss_only and "skip_logits" in self._forward_names:
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    # ---- logs -------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer, with the components of the training loss."""
        if "loss" in logs and self._train_sums.steps:
            steps = self._train_sums.steps * self.accelerator.num_processes
            sums = self._train_sums.pop(self.accelerator)
            logs["total_loss"], logs["main_loss"] = sums["total_loss"] / steps, sums["main_loss"] / steps
            if self.enable_autoregressive:
                logs["autoregressive_loss"] = sums["autoregressive_loss"] / steps
                if sums["total_loss"]:
                    logs["autoregressive_share"] = 1 - sums["main_loss"] / sums["total_loss"]
                logs.update(_skill(sums))
                advice = self._share_watch.add(logs["main_loss"], logs["total_loss"])
                if advice is not None and self.is_world_process_zero():
                    logger.warning(advice)
            if self._guard.skipped:
                logs["skipped_steps"] = self._guard.skipped
            logs.update(self._meter.pop(self.accelerator))
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in Trainer, with the components of the loss as means over the whole set."""
        self._eval_sums = _LossSums()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        sums = self._eval_sums.pop(self.accelerator)
        metrics: dict[str, float] = {}
        if sums["num_items"] or sums["num_videos"]:
            metrics["main_loss"] = sums["main_loss"] / max(sums["num_items"], 1)
            metrics["loss"] = metrics["main_loss"]
        if sums["num_videos"]:
            metrics["autoregressive_loss"] = sums["autoregressive_loss"] / sums["num_videos"]
            metrics["loss"] += sums["weighted_loss"] / sums["num_videos"]
            metrics.update(_skill(sums))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    # ---- saving -----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; saves configuration and processor beside sharded weights, for `llava-next-ar consolidate`."""
        super().save_model(output_dir, _internal_call)
        if not (self.is_fsdp_enabled and self.args.should_save):
            return
        if "SHARDED_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            folder = self.args.output_dir if output_dir is None else output_dir
            model = self.accelerator.unwrap_model(self.model)
            model.config.save_pretrained(folder)
            for adapter in getattr(model, "peft_config", {}).values():
                adapter.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    # ---- bad steps --------------------------------------------------------------------------------------------------

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        collator = super()._get_collator_with_removed_columns(data_collator, description)
        return NamingCollator(collator) if description == "Training" else collator  # the guard removes the names again

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As in Trainer, which calls it before each optimizer step; drops the gradients of a bad step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        norm, loss = self._exchange_step(grad_norm)
        if self.accelerator.scaler is None and grad_norm is not None:
            loss = None  # with a scaler the loss is judged: the norm may be infinite while it searches a scale
        problem = self._guard.judge(norm, loss)
        if problem is not None:
            self._drop_step(model, problem, norm)
        return grad_norm

    def _exchange_step(self, grad_norm: Any) -> tuple[float, float]:
        """Returns the gradient norm, NaN if unknown, and the loss of the step, both the same on all ranks.

        Requests to stop are exchanged with them. So a step needs one collective and waits for the device once.
        """
        stopping = [callback for callback in self.callback_handler.callbacks if isinstance(callback, StopOnSigterm)]
        if hasattr(grad_norm, "full_tensor"):
            grad_norm = grad_norm.full_tensor()
        loss, device = self._guard.loss, self.args.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        values = [float("nan") if grad_norm is None else grad_norm, loss, *(r for s in stopping for r in s.requests)]
        row = torch.stack([torch.as_tensor(value).to(device, dtype).reshape(()) for value in values])
        norm, loss, *requests = self.accelerator.reduce(row, reduction="sum").tolist()
        for callback in stopping:
            callback.agree(requests[: len(callback.SIGNALS)])
            requests = requests[len(callback.SIGNALS) :]
        return norm / self.accelerator.num_processes, loss

    def _drop_step(self, model: nn.Module, problem: str, norm: float) -> None:
        message = self._guard.act(
            problem,
            step=self.state.global_step + 1,
            norm=norm,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        if self.is_world_process_zero():
            logger.warning(message)
        model.zero_grad(set_to_none=True)  # an optimizer skips parameters without a gradient
        tr_loss, self._train_sums = self._before_step
        self._tr_loss.copy_(tr_loss)
        # Trainer divides its sums by the number of steps since the last log entry, and since the start.
        self._globalstep_last_logged += 1
        self._initial_global_step += 1

    # ---- resuming ---------------------------------------------------------------------------------------------------

    def _progress(self) -> dict[str, Any]:
        return {**super()._progress(), "sums": self._train_sums.state(), "guard": self._guard.state()}

    def _restore_progress(self, progress: dict[str, Any]) -> None:
        super()._restore_progress(progress)
        self._train_sums.load_state(progress["sums"], self.args.device)
        self._guard.load_state(progress["guard"])

    # ---- optimizer --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in Trainer; with `head_learning_rate`, the head's parameters form separate groups."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not is_new or self.head_learning_rate is None:
            return optimizer
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"head_learning_rate needs an optimizer made by Trainer, got {type(optimizer).__name__}: remove the "
                "optimizer from the DeepSpeed configuration"
            )
        model = self.model if model is None else model
        of_head = {id(p) for name, p in model.named_parameters() if HEAD in name.split(".")}
        for group in list(optimizer.param_groups):
            head = [p for p in group["params"] if id(p) in of_head]
            if head:
                group["params"] = [p for p in group["params"] if id(p) not in of_head]
                optimizer.add_param_group({**group, "params": head, "lr": self.head_learning_rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer


def _check_objective_trains(head: nn.Module) -> None:
    """Raises ValueError for a frozen head that still predicts a copy: it passes no gradient to the language model."""
    parameters = [parameter for name, parameter in head.named_parameters() if ".teacher." not in f".{name}"]
    if any(parameter.requires_grad for parameter in parameters):
        return
    change = getattr(getattr(head, "change", None), "weight", None)
    if change is not None and change.numel() and not change.any():  # ZeRO-3 leaves empty weights behind
        raise ValueError(
            f"enable_autoregressive=True, but the reconstruction head ({HEAD}) is new and frozen: its skill stays 0, and "
            f"the language model gets no gradient from it. Name {HEAD!r} in modules_to_save of the PEFT configuration, "
            "unfreeze it, or pass enable_autoregressive=False"
        )
    logger.warning(
        f"the reconstruction head ({HEAD}) is frozen: its loss trains the language model alone. With PEFT, name {HEAD!r} "
        "in modules_to_save to train it"
    )


class _LossSums:
    """Detached sums of one window of training or one evaluation, on the device until they are read."""

    NAMES = (
        *("total_loss", "main_loss", "autoregressive_loss", "weighted_loss", "mse", "copy_mse"),
        *("num_items", "num_videos"),
    )

    def __init__(self) -> None:
        self.steps = 0
        self._sums: torch.Tensor | None = None

    def add(self, device: torch.device, **values: "torch.Tensor | int | None") -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        row = [torch.as_tensor(0 if values.get(name) is None else values[name]) for name in self.NAMES]
        row = torch.stack([value.detach().to(device=device, dtype=dtype).reshape(()) for value in row])
        self._sums = row if self._sums is None else self._sums + row

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "sums": None if self._sums is None else self._sums.tolist()}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self.steps = state["steps"]
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = None if state["sums"] is None else torch.tensor(state["sums"], dtype=dtype, device=device)

    def pop(self, accelerator: Any) -> dict[str, float]:
        """Returns the sums over all ranks and starts a new window; every rank must call it."""
        sums = torch.zeros(len(self.NAMES)) if self._sums is None else self._sums
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        sums = accelerator.reduce(sums.to(device=accelerator.device, dtype=dtype), reduction="sum")
        self.steps, self._sums = 0, None
        return dict(zip(self.NAMES, sums.tolist(), strict=True))


def _count_videos(batch: dict[str, Any]) -> int:
    """Number of videos with at least two real frames, which have a frame to predict."""
    mask, pixels = batch.get("video_frame_mask"), batch.get("pixel_values_videos")
    if mask is not None:
        return int((mask.sum(1) >= 2).sum())
    return 0 if pixels is None or pixels.shape[1] < 2 else len(pixels)


def _squared_errors(outputs: Any) -> dict[str, torch.Tensor]:
    """Squared errors of predictions and of the copy baseline, means over patches, summed over frames."""
    reconstruction = outputs.get("reconstruction")
    if reconstruction is None:
        return {}
    num_patches = reconstruction.patch_mask.sum(1)
    mse, copy_mse = ((errors.sum(1) / num_patches).sum() for errors in reconstruction.patch_errors())
    return {"mse": mse, "copy_mse": copy_mse}


def _skill(sums: dict[str, float]) -> dict[str, float]:
    """The skill, absent for static videos: their copy baseline has no error to improve on."""
    return {"skill": 1 - sums["mse"] / sums["copy_mse"]} if sums["copy_mse"] > 0 else {}


__all__ = [
    "AutoregressiveTrainer",
    "BadSampleError",
    "BadStepError",
    "BadStepPolicy",
    "LlavaVideoCollator",
    "LlavaVideoDataset",
    "StopOnSigterm",
    "last_complete_checkpoint",
]
