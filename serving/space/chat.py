"""Conversations about videos and images: from the messages of the page to prompts, and to answers that arrive word by word."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, set_seed
from transformers.cache_utils import DynamicCache

from ...evaluation.ask import media_part
from ...evaluation.questions import sampling_options

MAX_CACHED_CONVERSATIONS = 4
SECONDS_TO_WAIT = 600.0  # for the next word
# Control tokens in the words of a user are text, such as `<video>`; transformers has the option from 5.23 on.
_TEXT_IS_TEXT = {"sanitize_control_tokens": True} if Version(transformers.__version__) >= Version("5.23") else {}


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Options of an answer, validated.

    Raises:
        ValueError: naming the value that is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy decoding, without any of the options of sampling."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    num_frames: int | None = None
    """Frames of each video; None leaves them to the checkpoint's processor."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_new_tokens", 1, None),
            ("temperature", 0, None),
            ("top_k", 0, None),
            ("num_frames", 1, None),
            ("top_p", 1e-6, 1),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not (value >= low and (high is None or value <= high)):
                limit = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"{name} is {value}, expected {limit}")

    def generation_options(self) -> dict[str, Any]:
        """Options for `generate`."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": 1,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return options


@dataclass(frozen=True)
class Prompt:
    """Inputs of the model for the next answer.

    Attributes:
        inputs: of the processor, on the CPU.
        media: files in the order of the prompt, each with the number of frames asked for.
    """

    inputs: dict[str, torch.Tensor]
    media: tuple[tuple[str, int | None], ...]


def content_parts(content: Any) -> list[dict[str, Any]]:
    """Parts for the chat template of a message's content.

    Args:
        content: a text; a file, as a path in a dictionary with `path` or `file`; or a list of both.

    Raises:
        FileNotFoundError: if a file does not exist.
        OSError: if a file with the ending of an image is damaged.
    """
    if isinstance(content, str):
        return [{"type": "text", "text": content.strip()}] if content.strip() else []
    if isinstance(content, Sequence):
        return [part for entry in content for part in content_parts(entry)]
    if content.get("type") == "text":
        return content_parts(content["text"])
    return [media_part(str((content.get("file") or content)["path"]))]


def conversation_of(message: dict[str, Any], history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages for the chat template.

    A turn without an answer is left out. Otherwise a file that could not be read would fail again with each later question.

    Args:
        message: `text` and `files` (paths) of the new turn.
        history: earlier messages with `role` and `content`.

    Raises:
        ValueError: if the new turn has neither a text nor a file.
        FileNotFoundError, OSError: as `content_parts`.
    """
    turns: list[dict[str, Any]] = []
    for question, answer in itertools.pairwise(history):
        if (question["role"], answer["role"]) == ("user", "assistant"):
            turns += [{"role": own["role"], "content": content_parts(own["content"])} for own in (question, answer)]
    parts = content_parts([*({"path": file} for file in message.get("files") or ()), message.get("text") or ""])
    if not parts:
        raise ValueError("the message is empty: write a question, or add a video or an image")
    return [*turns, {"role": "user", "content": parts}]


def prepare(processor: Any, messages: list[dict[str, Any]], settings: GenerationSettings) -> Prompt:
    """Read the files of a conversation and make the model's inputs.

    Raises:
        ValueError: if a file cannot be read, or does not have the frames asked for.
    """
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=sampling_options(processor, num_frames=settings.num_frames),
        **_TEXT_IS_TEXT,
    )
    files = (part["path"] for message in messages for part in message["content"] if part["type"] != "text")
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return Prompt(tensors, tuple((file, settings.num_frames) for file in files))


@dataclass(frozen=True)
class _Conversation:
    ids: torch.Tensor  # [S] tokens that the cache holds
    media: tuple[tuple[str, int | None], ...]
    cache: DynamicCache


class ConversationCaches:
    """Key-value caches of the language model for the latest conversations, so that a further turn reads its own tokens alone.

    Not safe for threads: the caller holds the lock of the model.
    """

    def __init__(self, size: int = MAX_CACHED_CONVERSATIONS) -> None:
        self._size = size
        self._conversations: OrderedDict[str, _Conversation] = OrderedDict()

    def take(self, session: str, prompt: Prompt, config: Any) -> DynamicCache:
        """The cache of the longest common beginning with the session's last turn; an empty one if there is none.

        A layer with a sliding window has dropped its oldest tokens and cannot be cut back: its cache is not used again.
        """
        known = self._conversations.pop(session, None)
        if known is None or known.media != prompt.media[: len(known.media)]:
            return DynamicCache(config=config)
        ids = prompt.inputs["input_ids"][0]
        # At least one token is left to read: it gives the first one of the answer.
        length = min(len(known.ids), len(ids) - 1)
        differs = (known.ids[:length] != ids[:length]).nonzero()
        length = int(differs[0]) if len(differs) else length
        removed = known.cache.get_seq_length() - length
        if removed:
            if any(getattr(layer, "is_sliding", False) for layer in known.cache.layers):
                return DynamicCache(config=config)
            known.cache.crop(-removed)
        return known.cache

    def put(self, session: str, sequence: torch.Tensor, prompt: Prompt, cache: DynamicCache) -> None:
        """Keep the cache of a turn.

        Args:
            sequence: `[S]` tokens of the prompt and the answer. The cache may lack the last ones.
        """
        ids = sequence[: cache.get_seq_length()].cpu()
        self._conversations[session] = _Conversation(ids, prompt.media, cache)
        while len(self._conversations) > self._size:
            self._conversations.popitem(last=False)


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)


def stream_answer(
    model: Any,
    processor: Any,
    lock: threading.Lock,
    prompt: Prompt,
    settings: GenerationSettings,
    caches: Any,
    session: str,
) -> Iterator[str]:
    """Generate an answer in a thread, and yield its text up to each new word.

    The thread holds the lock. It stops at the next token if the iterator is closed.

    Args:
        caches: a `ConversationCaches`, or None to read the whole conversation.
        session: name of the conversation in `caches`.

    Raises:
        Exception: of `generate`.
    """
    streamer = TextIteratorStreamer(
        processor.tokenizer, skip_prompt=True, timeout=SECONDS_TO_WAIT, skip_special_tokens=True
    )
    closed, failures = threading.Event(), []

    def work() -> None:
        try:
            with lock, torch.inference_mode():
                config = model.config.get_text_config()
                cache = DynamicCache(config=config) if caches is None else caches.take(session, prompt, config)
                set_seed(settings.seed)
                sequences = model.generate(
                    **{name: value.to(model.device) for name, value in prompt.inputs.items()},
                    **settings.generation_options(),
                    past_key_values=cache,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Stopped(closed)]),
                )
                if caches is not None:
                    caches.put(session, sequences[0], prompt, cache)
        except Exception as error:  # raised again where the answer is read
            failures.append(error)
            streamer.on_finalized_text("", stream_end=True)

    thread = threading.Thread(target=work, name="answer", daemon=True)
    thread.start()
    text = ""
    try:
        for piece in streamer:
            text += piece
            yield text
    finally:
        closed.set()
    thread.join()
    if failures:
        raise failures[0]
