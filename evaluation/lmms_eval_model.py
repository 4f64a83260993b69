"""Answer the requests of lmms-eval with a checkpoint of this package; imports nothing of lmms-eval.

    # the entry point of llava-next-ar[eval] registers the model; nothing else is installed
    lmms-eval --model llava_next_ar --model_args pretrained=outputs/run --tasks mvbench --batch_size 4
    lmms-eval --model llava_next_ar --tasks egoschema_subset_mcppl --batch_size 4 --device cuda \
        --model_args pretrained=user/checkpoint,revision=<commit>,trust_remote_code=True,dtype=bfloat16,num_frames=32
    accelerate launch --num_processes 8 -m lmms_eval --model llava_next_ar --model_args pretrained=outputs/run ...

The plugin (lmms_eval_plugin) registers the model by lmms-eval's entry point. A request names a document of a task. Its content
becomes one turn of the checkpoint's own chat template: its images and videos (in the place of `<image>` and `<video>` if the
text holds these, else before the text), then the text. With greedy decoding, in float32, the answer to a document depends
neither on the batch size nor on the other documents of the batch.

The arguments (`--model_args`) are those of `RequestAnswerer`.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from ..processing.llava_conversation import IMAGE_TOKEN, VIDEO_TOKEN, llava_conversation_to_messages
from ..processing.video_frames import IMAGE_SUFFIXES
from ..training.collator import LlavaVideoCollator
from .measures import answer_tokens, load_checkpoint, prompt_positions, score_choices
from .questions import prompt_sample, sampling_options
from .settings import EvaluationSettings, VideoOptions, resolved_revisions

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
LIKELIHOODS = ("sum", "mean")
# Tasks were written for many models; this is an option of the preprocessing of the original LLaVA, not of decoding.
_NOT_FOR_DECODING = {"image_aspect_ratio"}
_OF_SAMPLING = ("temperature", "top_p", "top_k")
# lmms-eval writes this into every task that names no stop strings.
_DEFAULT_STOP = "\n\n"


@dataclass
class RequestAnswerer:
    """Model interface of lmms-eval for a checkpoint.

    Requests are lmms-eval's `Instance`s, of which the tuple `args` is read, and documents come from its `task_dict`: task
    name -> split -> index -> document. Answers come back in the order of the requests.

    Args:
        pretrained: a folder or a Hub id: a checkpoint, or a PEFT adapter, which brings its base.
        peft: a PEFT adapter, as a folder or a Hub id, to put on `pretrained`.
        revision: branch, tag or commit of `pretrained` on the Hub.
        base_revision: the same of its base, if it is an adapter.
        trust_remote_code: run the code that the checkpoint carries, not that of the installed package.
        device, dtype: such as `cuda` and `bfloat16`.
        batch_size: documents in a batch.
        max_new_tokens: where a task sets none.
        sampling, num_frames, fps, max_frames, sample_rate, short_clip, video_backend: reading of videos, where not as the
            checkpoint's processor does (`VideoOptions`).
        likelihood: `sum` (of the log-probabilities of a choice's tokens, its end of turn included, as `llava-next-ar evaluate`
            does) or `mean` (as lmms-eval's own LLaVA models do: choices are not judged by their length).
        stop_at_blank_line: also stop at a blank line. lmms-eval gives it as stop string to all tasks that name none, where
            it would cut a chat answer after its first paragraph, so that it is left out unless asked for.

    Raises:
        ValueError: if an argument is out of range, or the processor rejects the sampling.
    """

    pretrained: str
    _: KW_ONLY
    peft: str | None = None
    revision: str | None = None
    base_revision: str | None = None
    trust_remote_code: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int | str = 1
    max_new_tokens: int = 1024
    sampling: str | None = None
    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    sample_rate: int | None = None
    short_clip: str | None = None
    video_backend: str | None = None
    likelihood: str = "sum"
    stop_at_blank_line: bool = False

    def __post_init__(self) -> None:
        for name in ("pretrained", "peft", "revision", "base_revision", "dtype"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):  # lmms-eval reads 1e5 and 123 as numbers
                raise ValueError(f"{name} is {value!r}, expected a string")
        if not str(self.batch_size).isdecimal():
            raise ValueError(f"batch_size is {self.batch_size!r}, expected a number")
        if self.likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood is {self.likelihood!r}, expected one of {', '.join(LIKELIHOODS)}")
        self.batch_size = int(self.batch_size)
        self.revision, self.base_revision = resolved_revisions(self.pretrained, self.revision, self.base_revision)
        names = ("trust_remote_code", "device", "dtype", "revision", "base_revision")
        options = {name: getattr(self, name) for name in names}
        # Validates them.
        settings = EvaluationSettings(
            model=self.pretrained,
            data="",
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            **{field.name: getattr(self, field.name) for field in fields(VideoOptions)},
            **options,
        )
        self.model, self.processor = load_checkpoint(self.pretrained, **options)
        if self.peft is not None:
            self.model.load_adapter(self.peft)
            self.model.eval()
        self.video_options = sampling_options(self.processor, **settings.video_options())
        self.collate = LlavaVideoCollator(self.processor, padding_side="left")

    # -- lmms-eval's request types

    def generate_until(self, requests: Sequence[Any], task_dict: Any, *, progress: bool = True) -> list[str]:
        """Texts for requests `(context, generation_kwargs, doc_to_visual, doc_id, task, split)`.

        Greedy unless a task asks for sampling. A text ends before the first of the stop strings in `until`.

        Raises:
            ValueError: naming the document, if its images and videos cannot be read or do not fit its text.
        """
        prompts = []
        for context, _, doc_to_visual, doc_id, task, split in (request.args for request in requests):
            prompts.append(partial(_prompt_of, task_dict, context, doc_to_visual, doc_id, task, split))
        kwargs = [request.args[1] for request in requests]
        with tqdm(total=len(requests), desc="answering", unit="request", disable=not progress) as bar:
            return self._generate(prompts, kwargs, bar)

    def generate_until_multi_round(
        self, requests: Sequence[Any], task_dict: Any, *, progress: bool = True
    ) -> list[list[str]]:
        """All texts of each request `(context, generation_kwargs, doc_to_visual, doc_to_text, doc_id, task, split)`.

        After each round `doc_to_text` returns the next one, `(visuals, context, is_over, texts, state)`. Each round is a
        conversation of its own.

        Raises:
            ValueError: as `generate_until`.
        """
        prompts, texts, states = {}, [[] for _ in requests], [None] * len(requests)
        for place, request in enumerate(requests):
            context, _, doc_to_visual, _, *where = request.args
            prompts[place] = partial(_prompt_of, task_dict, context, doc_to_visual, *where)
        number = 0
        with tqdm(desc="answering", unit="round", disable=not progress) as bar:
            while prompts:
                said = self._generate(list(prompts.values()), [requests[place].args[1] for place in prompts], bar)
                number += 1
                following = {}
                for place, text in zip(prompts, said, strict=True):
                    _, _, _, doc_to_text, doc_id, task, split = requests[place].args
                    visuals, context, is_over, texts[place], states[place] = doc_to_text(
                        task_dict[task][split][doc_id],
                        previous_output=[*texts[place], text],
                        round_idx=number,
                        previous_round_info=states[place],
                    )
                    if not is_over:
                        following[place] = partial(Prompt, f"{task}/{split}/{doc_id}", context, visuals)
                prompts = following
        return [list(own) for own in texts]

    def loglikelihood(
        self, requests: Sequence[Any], task_dict: Any, *, progress: bool = True
    ) -> list[tuple[float, bool]]:
        """Loss of each request `(context, choice, doc_to_visual, doc_id, task, split)`, and True if greedy decoding gives
        its choice.

        The loss is minus the log-probability of the choice as an answer: lmms-eval's interface names the log-probability, but
        its tasks take the choice with the smallest number. Outer spaces, which lmms-eval puts before a choice, do not belong to
        an answer in a chat.

        Raises:
            ValueError: as `generate_until`; for the unconditional requests of the metric `acc_mutual_info`, for which
                lmms-eval would take the largest number.
        """
        documents: dict[tuple[Any, ...], list[int]] = {}  # requests of each prompt: the choices of a question
        for place, request in enumerate(requests):
            if len(request.args) != 6:
                raise ValueError(
                    f"a request without a document, {request.args!r}: the metric acc_mutual_info is not supported, "
                    "since lmms-eval takes the smallest loss for acc, but the largest difference of losses for this one"
                )
            context, _, doc_to_visual, doc_id, task, split = request.args
            documents.setdefault((context, doc_to_visual, doc_id, task, split), []).append(place)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="scoring", unit="request", disable=not progress) as bar:
            for some in _batches(list(documents.items()), self.batch_size):
                prompts, choices = [], []
                for (context, doc_to_visual, doc_id, task, split), places in some:
                    prompts.append(_prompt_of(task_dict, context, doc_to_visual, doc_id, task, split))
                    document, own = task_dict[task][split][doc_id], [requests[place].args[1] for place in places]
                    choices.append([choice(document) if callable(choice) else choice for choice in own])
                scores = self._score(prompts, choices)
                for (_, places), own in zip(some, scores, strict=True):
                    for place, score in zip(places, own, strict=True):
                        results[place] = score
                    bar.update(len(places))
        return results

    # -- Batches

    def batch_of(self, prompts: Sequence["Prompt"]) -> dict[str, torch.Tensor]:
        samples = []
        for prompt in prompts:
            try:
                samples.append(prompt_sample(self.processor, prompt.messages, **self.video_options))
            except (ValueError, OSError) as error:
                raise ValueError(f"document {prompt.name}: {error}") from error
        batch = self.collate(samples)
        return {name: value.to(self.model.device) for name, value in batch.items() if name != "labels"}

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[Callable[[], "Prompt"]], kwargs: Sequence[dict[str, Any]], bar: tqdm
    ) -> list[str]:
        """A text for each prompt. Batches hold requests of the same generation options only.

        Prompts are functions, so that the images of no more than one batch are in memory.
        """
        by_options: dict[str, list[int]] = {}
        for place, own in enumerate(kwargs):
            by_options.setdefault(json.dumps(own, sort_keys=True, default=str), []).append(place)
        texts = [""] * len(prompts)
        for places in by_options.values():
            options, stops = self.decoding_options(kwargs[places[0]])
            for some in _batches(places, self.batch_size):
                batch = self.batch_of([prompts[place]() for place in some])
                length = batch["input_ids"].shape[1]
                criteria = StoppingCriteriaList([_StopStrings(self._decode, length, stops)] if stops else [])
                generated = self.model.generate(**batch, **options, stopping_criteria=criteria)
                for place, text in zip(some, self._decode(generated[:, length:]), strict=True):
                    texts[place] = _before(stops, text).strip()
                bar.update(len(some))
        return texts

    def _decode(self, tokens: torch.Tensor) -> list[str]:
        return self.processor.tokenizer.batch_decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def decoding_options(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A task's generation options as those of `generate`, and its stop strings."""
        options = {"max_new_tokens": self.max_new_tokens, "num_beams": 1, **kwargs}
        until = options.pop("until", None) or []
        stops = [until] if isinstance(until, str) else [text for text in until if text]
        if not self.stop_at_blank_line:
            stops = [text for text in stops if text != _DEFAULT_STOP]
        for name in _NOT_FOR_DECODING & options.keys():
            value = options.pop(name)
            logger.warning("the task's option %s=%r does nothing here", name, value)
        temperature = options.get("temperature")
        # Tasks set do_sample=True with temperature 0, and temperature 1 without do_sample.
        options["do_sample"] = bool(options.get("do_sample", temperature)) and temperature != 0
        if not options["do_sample"]:
            options = {name: value for name, value in options.items() if name not in _OF_SAMPLING}
        return options, stops

    @torch.inference_mode()
    def _score(self, prompts: Sequence["Prompt"], choices: Sequence[Sequence[str]]) -> list[list[tuple[float, bool]]]:
        """For each prompt the loss of each choice, and True if greedy decoding gives the choice."""
        batch = self.batch_of(prompts)
        tokens = [
            [answer_tokens(self.processor, prompt.messages, choice.strip()) for choice in own]
            for prompt, own in zip(prompts, choices, strict=True)
        ]
        outputs = self.model(
            **batch,
            position_ids=prompt_positions(batch["attention_mask"]),
            past_key_values=DynamicCache(config=self.model.config.get_text_config()),
            use_cache=True,
            skip_reconstruction=True,
            logits_to_keep=1,
        )
        scores = score_choices(
            self.model, outputs.past_key_values, outputs.logits[:, -1], batch["attention_mask"], tokens
        )
        return [
            [
                (-log_likelihood / (len(answer) if self.likelihood == "mean" else 1), is_greedy)
                for (log_likelihood, is_greedy), answer in zip(own, answers, strict=True)
            ]
            for own, answers in zip(scores, tokens, strict=True)
        ]


class Prompt:
    """One turn of a user: a text and its images and videos, as a document gives them."""

    def __init__(self, name: str, context: str, visuals: Any) -> None:
        self.name = name
        try:
            self.messages = to_messages(context, visuals)
        except ValueError as error:
            raise ValueError(f"document {name}: {error}") from error


def _prompt_of(
    task_dict: Any, context: str, doc_to_visual: Callable[[Any], Any], doc_id: int, task: str, split: str
) -> Prompt:
    return Prompt(f"{task}/{split}/{doc_id}", context, doc_to_visual(task_dict[task][split][doc_id]))


class _StopStrings(StoppingCriteria):
    """Ends a row once its text, decoded as it will be in the end, holds a stop string."""

    def __init__(self, decode: Callable[[torch.Tensor], list[str]], prompt_length: int, stops: Sequence[str]) -> None:
        self.decode, self.prompt_length, self.stops = decode, prompt_length, stops

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        texts = self.decode(input_ids[:, self.prompt_length :])
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def _before(stops: Sequence[str], text: str) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))


# -- Documents -> messages


def to_messages(context: str, visuals: Any) -> Messages:
    """A task's text and its visuals as one turn of a user.

    Args:
        context: with as many `<image>` and `<video>` as there are images and videos, in whose place they come; or with
            neither, and they come first.
        visuals: one or a list of what `media_of` understands; None or an empty list for text alone.

    Raises:
        ValueError: for another number of placeholders, and as `media_of`.
    """
    visuals = visuals if isinstance(visuals, (list, tuple)) else [] if visuals is None else [visuals]
    media = [media_of(visual) for visual in visuals]
    if IMAGE_TOKEN not in context and VIDEO_TOKEN not in context:
        tokens = {"image": IMAGE_TOKEN, "video": VIDEO_TOKEN}
        context = "".join(f"{tokens[kind]}\n" for kind, _ in media) + context
    of_kind = {kind: [item for other, item in media if other == kind] for kind in ("image", "video")}
    turn = {"from": "human", "value": context}
    return llava_conversation_to_messages([turn], videos=of_kind["video"], images=of_kind["image"])


def media_of(visual: Any) -> tuple[str, Any]:
    """`image` or `video`, and what a message may hold: a path, a PIL image, frames.

    Args:
        visual: a path or URL (an image if its name ends like one), a PIL image, a list of frames or an array with four
            dimensions (a video), or `{"type": "image" | "video", "url" | "path": ...}`.

    Raises:
        ValueError: for anything else: sound, a part of a video.
    """
    if isinstance(visual, Image.Image):
        return "image", visual
    if isinstance(visual, (str, os.PathLike)):
        path = os.fspath(visual)
        return ("image" if path.lower().endswith(IMAGE_SUFFIXES) else "video"), path
    if isinstance(visual, (list, tuple)) and visual:
        return "video", list(visual)
    if isinstance(visual, (np.ndarray, torch.Tensor)) and visual.ndim == 4:
        return "video", visual
    if isinstance(visual, dict) and visual.get("type") in ("image", "video") and len(visual) == 2:
        source = visual.get("url") or visual.get("path")
        if source is not None:
            return visual["type"], source
    raise ValueError(
        f"a visual is a path, a PIL image, a list of frames, an array with four dimensions or a dict with type and url, "
        f"got {type(visual).__name__}: {str(visual)[:200]}"
    )
