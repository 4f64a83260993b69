# Copyright 2026 The LLaVA-NeXT-AR authors. Licensed under the Apache License, Version 2.0.
"""Entry point of the group `vllm.general_plugins`: makes vLLM load and serve checkpoints of this package.

vLLM calls `register` in each of its processes. Nothing else imports vLLM: without a call of `register` this package does
not depend on it.
"""

import logging

logger = logging.getLogger(__name__)

ARCHITECTURE = "LlavaNextARForConditionalGeneration"
SERVED_MODEL = "llava_next_ar.serving.vllm_plugin.served_model:LlavaNextARForVLLM"


def register() -> None:
    """Registers configuration, processor, model and video loader. May be called several times.

    The installed classes are registered with the auto classes of transformers, so that `--trust-remote-code` is not
    needed. A release of transformers or vLLM that lacks what the plugin imports disables the plugin with a warning: vLLM
    calls this function for the models of other packages, too.
    """
    try:
        from transformers import AutoConfig, AutoProcessor
        from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
        from vllm import ModelRegistry
        from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

        from ...configuration.configuration_llava_next_ar import LlavaNextARConfig
        from ...processing.processing_llava_next_ar import LlavaNextARProcessor
        from ...processing.video_processing_llava_next_ar import LlavaNextARVideoProcessor
        from .file_loader import LOADER_NAME, WholeFileLoader
    except ImportError as error:
        logger.warning("vLLM will not serve LLaVA-NeXT-AR checkpoints: %s", error)
        return
    video_processor = LlavaNextARVideoProcessor.__name__
    AutoConfig.register(LlavaNextARConfig.model_type, LlavaNextARConfig, exist_ok=True)
    AutoProcessor.register(LlavaNextARConfig, LlavaNextARProcessor, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, SERVED_MODEL)
    VIDEO_LOADER_REGISTRY.register(LOADER_NAME, video_processor=video_processor)(WholeFileLoader)
    # vLLM looks up the name of a checkpoint's video processor here, and by that name the loader.
    VIDEO_PROCESSOR_MAPPING_NAMES[LlavaNextARConfig.model_type] = {"torchvision": video_processor}
