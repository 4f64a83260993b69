"""Entry point `lmms_eval.models`, by which lmms-eval finds the model; see lmms_eval_model.py.

lmms-eval 0.7.3 turns the pair that `loglikelihood` returns into a string unless it comes in a `GenerationResult`, as here. Its
response cache (`--use_cache`) cannot store these, and serves generated answers only.
"""

from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from llava_next_ar.evaluation.lmms_eval_model import RequestAnswerer
from llava_next_ar.evaluation.settings import device_of_process


class LlavaNextAR(lmms):
    """`--model llava_next_ar`; `--model_args` are the arguments of `RequestAnswerer`.

    It is a model of the kind that lmms-eval calls simple: the interface of its chat models has no likelihoods.
    """

    is_simple = True

    def __init__(self, *, device: str | None = None, max_batch_size: None = None, **options: Any) -> None:
        super().__init__()
        if max_batch_size is not None:
            raise ValueError(
                f"max_batch_size is {max_batch_size!r}, but the batch size is never chosen automatically: give batch_size"
            )
        processes = PartialState()
        if device is None and processes.num_processes > 1:
            device = processes.device.type
        elif device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = str(device_of_process(device, processes))
        self.device = torch.device(device)
        self.answerer = RequestAnswerer(device=device, **options)
        self.batch_size = self.answerer.batch_size

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self.answerer.generate_until(requests, self.task_dict, progress=self.rank == 0)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        return self.answerer.generate_until_multi_round(requests, self.task_dict, progress=self.rank == 0)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        scores = self.answerer.loglikelihood(requests, self.task_dict, progress=self.rank == 0)
        return [GenerationResult(text=score) for score in scores]

    def clean(self) -> None:
        """Frees the model's memory; lmms-eval calls it before a judge is loaded."""
        del self.answerer
        super().clean()


MANIFEST = ModelManifest("llava_next_ar", simple_class_path=f"{__name__}.{LlavaNextAR.__name__}")
