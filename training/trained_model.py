"""The model of a recipe: its configuration, its weights and its trainable parts."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, TrainingArguments, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import is_bitsandbytes_available, logging

from ..configuration.configuration_llava_next_ar import LlavaNextARConfig
from ..hub.pushed_model import hub_id
from ..modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration
from .own_code import check_own_code
from .recipes import ModelArguments
from .trainer import HEAD, prepare_for_training

logger = logging.get_logger(__name__)

# Keys of the head that determine the shape or the meaning of its weights.
HEAD_SHAPE = ("embedding_dim", "num_heads", "num_layers")
# Parts between tower and language model, which `full` and `projector_and_head` train.
BRIDGE = ("multi_modal_projector", "image_newline", "faster_token")


def load_config(args: ModelArguments, sections: dict[str, dict[str, Any]]) -> tuple[Any, dict[str, tuple[Any, Any]]]:
    """Returns the model's configuration with the recipe's keys, and the changed keys: `{key: (old, new)}`.

    Raises:
        ValueError: if the checkpoint has another model type or untrusted code, or a key does not fit.
    """
    check_own_code(args.model, args.trust_remote_code)
    model_type = LlavaNextARConfig.get_config_dict(args.model)[0].get("model_type")
    if model_type not in ("llava_next_ar", "llava_onevision"):
        raise ValueError(f"{args.model} is a {model_type} model, expected llava_next_ar or llava_onevision")
    config_class = LlavaNextARConfig
    if args.trust_remote_code and model_type == "llava_next_ar":
        config_class = type(AutoConfig.from_pretrained(args.model, trust_remote_code=True))
    saved = config_class.from_pretrained(args.model)
    overrides = dict(sections["model_config"])
    has_head = overrides.pop("enable_autoregressive", True)
    if model_type == "llava_next_ar" and not has_head:
        has_head = saved.enable_autoregressive  # a head that does not train is kept
    if sections["autoregressive_config"]:
        overrides["autoregressive_config"] = sections["autoregressive_config"]
    config = config_class.from_pretrained(args.model, enable_autoregressive=has_head, **overrides)
    old, new = ({**c.to_dict(), **c.autoregressive_config.to_dict()} for c in (saved, config))
    changed = {key: (old.get(key), value) for key, value in new.items() if old.get(key) != value}
    changed.pop("autoregressive_config", None)  # its keys are listed one by one
    reshaped = {key: changed[key] for key in HEAD_SHAPE if key in changed}
    if model_type == "llava_next_ar" and saved.enable_autoregressive and has_head and reshaped:
        if "embedding_dim" in reshaped:
            old, new = reshaped["embedding_dim"]
            raise ValueError(
                f"the head of {args.model} has embedding_dim {old}, the recipe asks for {new}, and its weights fit no other "
                f"size: set embedding_dim to {old}, or start from a checkpoint without a head"
            )
        before = ", ".join(f"{key}={old}" for key, (old, _) in reshaped.items())
        after = ", ".join(f"{key}={new}" for key, (_, new) in reshaped.items())
        logger.warning(
            f"the head of {args.model} was made with {before}, but the recipe asks for {after}: its weights do not fit "
            "the new shape, and are kept where they do. To train it further, give its own values, such as "
            + " ".join(f"--{key} {old}" for key, (old, _) in reshaped.items())
        )
    if model_type == "llava_onevision":
        changed["model_type"] = (model_type, "llava_next_ar")
    return config, changed


def check_quantization(args: ModelArguments) -> None:
    """Validates `load_in_4bit`.

    Raises:
        ValueError: naming a missing requirement or a contradicting key.
    """
    if not args.load_in_4bit:
        return
    if args.trainable != "lora":
        raise ValueError(f"load_in_4bit needs trainable: lora, got {args.trainable}: weights of 4 bits do not train")
    if args.merge_lora:
        raise ValueError(
            "merge_lora would merge the adapter into rounded weights: save the adapter, and merge it into the checkpoint "
            "in its own precision"
        )
    if not torch.cuda.is_available():
        raise ValueError("load_in_4bit needs an NVIDIA GPU, and torch finds none here: use scripts/configs/lora.yaml")
    if not is_bitsandbytes_available():
        raise ValueError("load_in_4bit needs bitsandbytes: pip install bitsandbytes")


def quantization_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Returns the configuration for 4-bit linear layers in the language model.

    Not quantized are the tower, whose features are the targets; projector and head, which train; and the vocabulary.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", HEAD, "lm_head"],
    )


def weights_dtype(args: ModelArguments, training_args: TrainingArguments) -> torch.dtype:
    """Returns the precision in which the checkpoint is loaded."""
    return getattr(torch, args.dtype or ("bfloat16" if training_args.bf16 else "float32"))


def load_model(args: ModelArguments, config: Any, training_args: TrainingArguments) -> Any:
    """Loads the checkpoint in the precision of its frozen parts.

    Raises:
        ValueError: if the checkpoint lacks weights other than those of the head, or a faster token that would not train.
    """
    _join_deepspeed(training_args)
    dtype = weights_dtype(args, training_args)
    remote = args.trust_remote_code and not isinstance(config, LlavaNextARConfig)
    model_class = AutoModelForImageTextToText if remote else LlavaNextARForConditionalGeneration
    model, report = model_class.from_pretrained(
        args.model,
        config=config,
        dtype=dtype,
        output_loading_info=True,
        **({"quantization_config": quantization_config(dtype)} if args.load_in_4bit else {}),
        **({"attn_implementation": args.attn_implementation} if args.attn_implementation else {}),
        **({"trust_remote_code": True} if remote else {}),
    )
    missing = sorted(key for key in report["missing_keys"] if not {HEAD, "faster_token"} & set(key.split(".")))
    if missing:
        raise ValueError(f"{args.model} lacks {len(missing)} weights of the model, the first of them {missing[0]}")
    if args.trainable in ("lora", "head") and "model.faster_token" in report["missing_keys"]:
        raise ValueError(
            f"{args.model} has no faster_token, which the layout needs and trainable: {args.trainable} leaves as it is: "
            "train it first with trainable: projector_and_head or full"
        )
    return model


def _join_deepspeed(training_args: TrainingArguments) -> None:
    """Passes the process group of the ranks to DeepSpeed, as accelerate does on GPUs only.

    ZeRO-3 splits the weights while they load. Without a group of DeepSpeed it would assume a single process.
    """
    if not (training_args.use_cpu and "DEEPSPEED" in sharding_asked_for(training_args)):
        return
    if torch.distributed.is_initialized():
        try:
            import deepspeed
        except ImportError as error:
            raise ValueError("the launch file or recipe asks for DeepSpeed: pip install deepspeed") from error
        deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False)


def check_teacher(args: ModelArguments, config: Any) -> None:
    """Validates a tower that trains under ZeRO-3: the checkpoint must hold its copy, the head's teacher.

    Raises:
        ValueError: without that copy, naming alternatives.
    """
    if args.trainable == "lora" or args.freeze_vision_tower or not is_deepspeed_zero3_enabled():
        return  # adapters on the tower are turned off for the teacher
    if config.enable_autoregressive and not config.autoregressive_config.separate_teacher:
        raise ValueError(
            "ZeRO-3 splits the vision tower, of which the head needs a frozen copy: use ZeRO-2, or make the copy first "
            "(load the checkpoint without DeepSpeed, unfreeze the tower, model.create_teacher(), model.save_pretrained) and "
            "train from that folder"
        )


def check_attention(args: ModelArguments, config: Any) -> None:
    """Raises ValueError or ImportError, as loading would, if the attention of the recipe cannot run here."""
    if args.attn_implementation is not None and isinstance(config, LlavaNextARConfig):
        with torch.device("meta"):
            asked = copy.deepcopy(config)
            LlavaNextARForConditionalGeneration._from_config(asked, attn_implementation=args.attn_implementation)


def model_without_weights(args: ModelArguments, config: Any, training_args: TrainingArguments) -> tuple[Any, int]:
    """Returns the model of the recipe on the meta device, and the number of its weights that would have 4 bits."""
    dtype = weights_dtype(args, training_args)
    with torch.device("meta"):
        if isinstance(config, LlavaNextARConfig):
            model = LlavaNextARForConditionalGeneration._from_config(config, dtype=dtype)
        else:
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True, dtype=dtype)
        num_quantized = 0
        if args.load_in_4bit:
            skipped = quantization_config(dtype).llm_int8_skip_modules
            linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
            num_quantized = sum(m.weight.numel() for name, m in linear.items() if should_convert_module(name, skipped))
        return choose_trainable(model, args, training_args), num_quantized


def choose_trainable(model: Any, args: ModelArguments, training_args: TrainingArguments) -> Any:
    """Freezes the parts that do not train and returns the model, in a PEFT model for `lora`."""
    if args.trainable == "lora":
        # The same adapters after any number of random draws while loading, such as those of a new head under ZeRO-3.
        set_seed(training_args.seed)
        is_split = "DEEPSPEED" in sharding_asked_for(training_args)
        model = add_adapters(model, args, keep_dtype=is_split)
    else:
        head_only, bridge_too = args.trainable == "head", args.trainable == "projector_and_head"
        for name, parameter in model.named_parameters():
            parts = set(name.split("."))
            trains = HEAD in parts or (not head_only and (not bridge_too or bool(parts & set(BRIDGE))))
            if "vision_tower" in parts:
                trains = not args.freeze_vision_tower
            parameter.requires_grad_(trains)
    # Small updates are lost in 16 bits. DeepSpeed keeps a copy in float32 itself and rejects weights of another precision.
    if (training_args.bf16 or training_args.fp16) and "DEEPSPEED" not in sharding_asked_for(training_args):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return prepare_for_training(model)


def add_adapters(model: Any, args: ModelArguments, keep_dtype: bool = False) -> Any:
    """Adds LoRA to the language model's linear layers (and the tower's, unless frozen); projector and head train whole.

    The newline and faster tokens stay frozen: PEFT saves whole modules only, and they are bare parameters.

    Args:
        model: the base.
        args: the recipe.
        keep_dtype: adapters in the precision of the base, where PEFT makes them float32. DeepSpeed's ZeRO-3 fails on
            trainable parameters of two precisions, and keeps its own copy of each in float32.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = args.lora_target_modules
    if targets is None:
        targets = r".*\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        if not args.freeze_vision_tower:
            targets = rf"({targets}|.*\.vision_tower\.encoder\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2))"
    has_head = getattr(model, HEAD, None) is not None
    lora = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        modules_to_save=["multi_modal_projector", *([HEAD] if has_head else [])],
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=not keep_dtype)


def check_adapter_base(
    args: ModelArguments, changed: dict[str, tuple[Any, Any]], training_args: TrainingArguments
) -> None:
    """Validates the base of an adapter: it must persist, be found by others, and have the adapter's configuration.

    Raises:
        ValueError: naming the keys that the adapter would lose, or the folder of a base that would be lost or not be found.
    """
    if not args.merge_lora and Path(args.model).resolve() == Path(training_args.output_dir).resolve():
        raise ValueError(
            f"output_dir {training_args.output_dir} is the adapter's base itself, whose weights it would replace: choose "
            "another folder"
        )
    if training_args.push_to_hub and hub_id(args.model) is None:
        raise ValueError(
            f"others cannot load an adapter whose base is the folder {args.model}: push the base first, and give its id as "
            "model"
        )
    changed = {key: pair for key, pair in changed.items() if key != "loss_weight"}  # has no effect after training
    if changed and not args.merge_lora:
        keys = ", ".join(f"{key} ({old!r} there, {new!r} here)" for key, (old, new) in sorted(changed.items()))
        raise ValueError(
            f"the adapter would be loaded on {args.model} with that checkpoint's own configuration, which differs in "
            f"{keys}: set merge_lora: true to save the whole model, or save a base with this configuration first "
            "(scripts/convert.py)"
        )


def sharding_asked_for(training_args: TrainingArguments) -> list[str]:
    """Returns the sharding of the launch file (by the environment) or the recipe: FSDP, DEEPSPEED or an empty list."""
    options = {"FSDP": training_args.fsdp, "DEEPSPEED": training_args.deepspeed}
    environment = {name: os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in options}
    return [name for name in options if options[name] or environment[name]]
