"""Try a checkpoint in the browser: chat about videos and images, and see its expectations of the next frame.

    llava-next-ar app --model outputs/run
    llava-next-ar app --model user/model --trust-remote-code --share
    llava-next-ar app --model demo_output/model --port 8080   # the model of `llava-next-ar demo`, on a CPU

The page has two tabs. "Chat" answers with streamed text over several turns. "Expectation" shows the surprise of a clip by time
and patch, its true and predicted features and its imagined frames. It also reads a running file or a webcam frame by frame.

Endpoints for `gradio_client`: `/chat`, `/expect`, `/surprise` (with the numbers of each patch), `/run_file` and `/watch`. One
model serves all users, one call at a time. Other calls wait in a queue. `llava-next-ar push --space user/name` makes a Space.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .accelerator import IS_ZERO_GPU  # before torch

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr  # noqa: E402
import torch  # noqa: E402
from gradio.events import Dependency  # noqa: E402
from transformers.utils import logging  # noqa: E402

from ...evaluation.measures import load_checkpoint  # noqa: E402
from ...evaluation.settings import check_device  # noqa: E402
from ...hub.command_line import CommandParser, stop  # noqa: E402
from .chat import GenerationSettings  # noqa: E402
from .drawing import STYLE, note_html  # noqa: E402
from .live import MAX_LIVE_FRAMES, LiveReader  # noqa: E402
from .service import MAX_FRAMES, MAX_IMAGINED, ModelService  # noqa: E402

logger = logging.get_logger(__name__)

EXAMPLES = Path(__file__).parent / "examples"
QUESTIONS = {
    "direction.mp4": "In which direction does the shape move? Answer with left, right, up or down.",
    "bounce.mp4": "Does the shape bounce off an edge of the picture? Answer with yes or no.",
    "order.mp4": "Which of the two shapes starts to move first? Answer with red or blue.",
}
PLACEHOLDER = "Ask about a video or images"
MAX_FILE_SIZE = "200mb"
MAX_QUEUE = 32
SECONDS_OF_WEBCAM = 120
# Fonts of the system: those of gradio's themes come from another server.
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    background_fill_primary="*neutral_50",  # as in the theme: its default comes back otherwise
    # Secondary texts of the theme have a contrast of 2.5 to 1; these have more than 4.5 (WCAG AA) in both looks.
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    color_accent="*primary_600",
    block_label_background_fill="*block_background_fill",
    block_label_background_fill_dark="*block_background_fill",
    block_label_text_color="*neutral_700",
    block_label_text_color_dark="*neutral_200",
    block_title_background_fill="none",
    block_title_background_fill_dark="none",
    block_title_padding="0",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_200",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_hover_dark="*primary_700",
    slider_color="*primary_600",
    slider_color_dark="*primary_400",
)
CSS = (
    STYLE
    + """
.gradio-container { width: 100%; min-width: 0 !important; max-width: 1200px !important; margin: 0 auto; }
#title h1 { margin: .2rem 0 0; overflow-wrap: anywhere; } #title p { margin: .2rem 0 0; overflow-wrap: anywhere; }
.dark button[role=tab][aria-selected=true] { color: var(--primary-400) !important; }
.icon-button-wrapper:not(:has(button, a)) { display: none; }
/* The frame of a video is as wide as its picture: small clips are enlarged, large ones shrink. */
#chatbot .message video, #chatbot .message img { height: auto; max-height: 260px; width: auto; min-width: 160px;
  max-width: 100%; }
#chatbot .message-wrap { padding-right: 1.4rem; }  /* room for the button that clears the chat */
#chatbot .message .mirror-wrap, #chatbot .message .wrap { width: fit-content; max-width: 100%; min-width: 0; }
#chatbot [aria-label=Share] { display: none; }
/* An error is a message of its own: it does not hide the conversation. */
#chatbot > [data-testid=status-tracker]:has(.error) { display: none; }
#chatbot .placeholder { padding: 1.2rem .6rem .4rem; }
#chatbot .examples { padding: .8rem; gap: .8rem; }
#chatbot .example { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .8rem; min-width: 0; }
#chatbot .example-image-container { width: 64px; height: 64px; }
#chatbot .bot .md:not(:has(*))::after { content: "(no words)"; color: var(--body-text-color-subdued); }
#chatbot .example:hover, #chatbot .example:focus-visible { border-color: var(--color-accent); }
#settings .form { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
@media (max-width: 640px) {
  .gradio-container .main, .gradio-container .tabitem { padding: .6rem .2rem !important; }
  #chatbot .examples { grid-template-columns: 1fr; }
  #chatbot .example-content { flex-direction: row; align-items: center; gap: .8rem; }
  #chatbot .example-image-container { flex: none; margin: 0; }
}
"""
)


@contextmanager
def shown_errors() -> Iterator[None]:
    """Turn errors into messages of the page; unexpected ones go to the log, with a message that names none of their details."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise _message(without_folders(str(error))) from error
    except torch.OutOfMemoryError as error:
        raise _message(
            "the device has too little memory for this: ask for fewer frames or a shorter answer"
        ) from error
    except Exception as error:
        if isinstance(error, gr.Error):
            raise
        logger.exception("the app failed")
        raise _message(f"the model failed ({type(error).__name__}); the log of the server has the details") from error


def _message(text: str) -> gr.Error:
    return gr.Error(text, duration=20, print_exception=False)


def without_folders(text: str) -> str:
    """A message without the folders of uploaded files, whose names are hashes."""
    return re.sub(r"[^\s'\"]*[/\\][0-9a-f]{40,64}[/\\]", "", text)


def frames_of_box(value: float | None) -> int | None:
    """Number of frames of `frames_box`; None leaves it to the checkpoint."""
    return int(value) if value else None


# -- The page


def build_app(service: ModelService, title: str = "LLaVA-NeXT-AR") -> gr.Blocks:
    """The page of a model; start it with `launch`."""
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as app:
        gr.Markdown(
            f"# {title}\nChat about videos and images with `{service.name}`, and see what it expects of the next frame.",
            elem_id="title",
        )
        with gr.Tab("Chat"):
            reopen_after_errors(app, add_chat(service))
        with gr.Tab("Expectation"):
            with gr.Tab("Clip"):
                add_clip(service)
            with gr.Tab("Live: file"):
                add_running_file(service)
            with gr.Tab("Live: webcam"):
                add_webcam(service)
    return app.queue(max_size=MAX_QUEUE, default_concurrency_limit=1)


def add_chat(service: ModelService) -> gr.ChatInterface:
    """Chat with streamed answers, over several turns."""
    defaults = GenerationSettings()

    def chat(
        message: dict[str, Any],
        history: list[dict[str, Any]],
        max_new_tokens: float,
        temperature: float,
        top_p: float,
        top_k: float,
        num_frames: float | None,
        seed: float,
        request: gr.Request,
    ) -> Iterator[str]:
        with shown_errors():
            settings = GenerationSettings(
                max_new_tokens=int(max_new_tokens),
                temperature=temperature,
                top_p=top_p,
                top_k=int(top_k),
                num_frames=frames_of_box(num_frames),
                seed=int(seed or 0),
            )
            yield from service.answer(message, history, settings, request.session_hash or "")

    settings = [
        gr.Slider(1, 1024, defaults.max_new_tokens, step=1, label="Longest answer", info="tokens", render=False),
        gr.Slider(0, 2, defaults.temperature, step=0.05, label="Temperature", info="0: greedy", render=False),
        gr.Slider(0.05, 1, defaults.top_p, step=0.05, label="Top p", info="when sampling", render=False),
        gr.Slider(0, 200, defaults.top_k, step=1, label="Top k", info="when sampling; 0: all tokens", render=False),
        frames_box(render=False),
        gr.Number(defaults.seed, precision=0, label="Seed", info="when sampling", render=False),
    ]
    return gr.ChatInterface(
        chat,
        multimodal=True,
        chatbot=gr.Chatbot(
            height="52vh",
            min_height=260,
            show_label=False,
            elem_id="chatbot",
            placeholder="Add a video or images, and ask a question.",
            buttons=["copy"],
        ),
        textbox=gr.MultimodalTextbox(
            file_types=["image", "video"],
            file_count="multiple",
            sources=["upload"],
            show_label=False,
            stop_btn=True,
            placeholder=PLACEHOLDER,
        ),
        additional_inputs=settings,
        additional_inputs_accordion=gr.Accordion("Generation settings", open=False, render=False, elem_id="settings"),
        examples=[[{"text": question, "files": [str(EXAMPLES / name)]}] for name, question in QUESTIONS.items()],
        cache_examples=False,
        run_examples_on_click=False,
        api_name="chat",
        fill_height=False,
        show_progress="minimal",
    )


def reopen_after_errors(app: gr.Blocks, interface: gr.ChatInterface) -> None:
    """Enable the text box again after each turn: gradio 6.31 leaves it disabled after an error, and empties its placeholder."""

    def reopened() -> gr.MultimodalTextbox:
        return gr.MultimodalTextbox(interactive=True, submit_btn=True, stop_btn=False, placeholder=PLACEHOLDER)

    for number, event in list(app.fns.items()):
        if event.name == "_submit_fn":
            after = Dependency(None, {}, number, None)
            for end in (after.success, after.failure):
                end(reopened, None, interface.textbox, queue=False, api_visibility="private")


def frames_box(**options: Any) -> gr.Number:
    """Number of frames of a video; 0 leaves it to the checkpoint."""
    info = f"0: as many as the checkpoint reads; at most {MAX_FRAMES}"
    return gr.Number(0, precision=0, label="Frames", info=info, **options)


def video_box(name: str) -> gr.Video:
    """Upload of a video, and the examples below it; `name` is the id of its element."""
    video = gr.Video(sources=["upload"], label="Video", height=240, elem_id=name)
    gr.Examples([str(EXAMPLES / name) for name in QUESTIONS], video, label="Examples")
    return video


def add_clip(service: ModelService) -> None:
    """Predictions, surprise and imagined frames of a whole clip."""

    def expect(
        video: str | None,
        num_frames: float | None,
        num_imagined: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[str, dict[str, Any]]:
        with shown_errors():
            return service.expectation_html(
                video, frames_of_box(num_frames), int(num_imagined), lambda share, text: progress(share, text)
            )

    def surprise(video: str | None, num_frames: float | None, num_imagined: float) -> dict[str, Any]:
        with shown_errors():
            return service.surprise(video, frames_of_box(num_frames), int(num_imagined))

    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            video = video_box("clip-video")
            num_frames = frames_box()
            num_imagined = gr.Slider(
                0, MAX_IMAGINED, 3, step=1, label="Imagined frames", info="the last frames, held back from the model"
            )
            button = gr.Button("Show the expectation", variant="primary")
            for_programs = gr.Button(visible=False)
        with gr.Column(scale=3, min_width=300):
            page = gr.HTML(
                note_html(
                    "Upload a video or choose an example, then press “Show the expectation”. The surprise of each frame and "
                    "patch, the predicted features and the imagined frames appear here."
                ),
                elem_id="expectation",
            )
            with gr.Accordion("Numbers", open=False):
                numbers = gr.JSON(show_label=False, max_height=420)
    inputs = [video, num_frames, num_imagined]
    shared = {"concurrency_id": "model", "concurrency_limit": 1}
    button.click(
        expect, inputs, [page, numbers], api_name="expect", show_progress_on=page, scroll_to_output=True, **shared
    )
    for_programs.click(surprise, inputs, gr.JSON(visible=False), api_name="surprise", **shared)


def add_running_file(service: ModelService) -> None:
    """A file that is read frame by frame, as if it were running."""

    hint = note_html(
        "Upload a video or choose an example, then press “Start”: the model predicts each frame before it reads it."
    )

    def run_file(video: str | None, fps: float, at_its_pace: bool) -> Iterator[str]:
        yield note_html("Reading the video.")
        page = None
        try:
            with shown_errors():
                for page, _ in service.run_file(video, fps, at_its_pace=at_its_pace):
                    yield page
        except gr.Error:
            if page is None:
                yield hint
            raise

    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            video = video_box("file-video")
            fps = gr.Slider(
                0.25, 10, 2, step=0.25, label="Frame rate", info=f"frames per second; at most {MAX_LIVE_FRAMES} frames"
            )
            pace = gr.Checkbox(not IS_ZERO_GPU, label="At the pace of the video", visible=not IS_ZERO_GPU)
            with gr.Row():
                start = gr.Button("Start", variant="primary", min_width=100)
                stop = gr.Button("Stop", min_width=100)
        with gr.Column(scale=3, min_width=300):
            page = gr.HTML(hint, elem_id="running")
    event = start.click(
        run_file, [video, fps, pace], page, api_name="run_file", concurrency_id="live", concurrency_limit=4,
        show_progress="hidden",
    )  # fmt: skip
    stop.click(None, cancels=[event])


def add_webcam(service: ModelService) -> None:
    """Frames of a webcam, read one by one while they come."""

    def watch(image: Any, reader: LiveReader | None, start: float | None) -> tuple[str, LiveReader, float]:
        with shown_errors():
            if image is None:
                raise ValueError("no picture came: allow the page to use the camera, and record")
            if reader is None or reader.is_full:
                reader, start = service.open_live(), time.monotonic()
            reader = service.watch(image, time.monotonic() - start, reader)
            return reader.html(), reader, start

    hint = note_html("Start the webcam, then record: the model predicts each frame before it reads it.")
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            camera = gr.Image(
                sources=["webcam"], streaming=True, type="numpy", label="Webcam", height=280, elem_id="webcam"
            )
            again = gr.Button("Start again")
        with gr.Column(scale=3, min_width=300):
            page = gr.HTML(hint, elem_id="watched")
    reader, start = gr.State(None, time_to_live=3600), gr.State(None)
    camera.stream(
        watch, [camera, reader, start], [page, reader, start], api_name="stream", api_visibility="private", stream_every=0.5,
        time_limit=SECONDS_OF_WEBCAM, concurrency_id="live", concurrency_limit=4, show_progress="hidden",
    )  # fmt: skip
    # gradio_client cannot call a streaming event.
    picture = gr.Image(type="numpy", visible=False)
    gr.Button(visible=False).click(
        watch, [picture, reader, start], [page, reader, start], api_name="watch", concurrency_id="live"
    )
    again.click(lambda: (hint, None, None), None, [page, reader, start], api_visibility="private")


# -- Programs


def launch(app: gr.Blocks, **options: Any) -> Any:
    """Start the server of a page, with its look and its limits; `options` are those of gradio's `launch`."""
    return app.launch(
        **{
            "theme": THEME,
            "css": CSS,
            "allowed_paths": [str(EXAMPLES)],
            "max_file_size": MAX_FILE_SIZE,
            "ssr_mode": False,
            **options,
        }
    )


def load_service(
    model: str, *, revision: str | None, trust_remote_code: bool, device: str, dtype: str
) -> ModelService:
    """Load a checkpoint for the app.

    Raises:
        ValueError: if the device or the dtype does not exist, or the checkpoint cannot be loaded.
        OSError: if the checkpoint does not exist.
    """
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype is {dtype!r}, expected one such as float32 or bfloat16")
    check_device(device)
    loaded = load_checkpoint(model, trust_remote_code=trust_remote_code, device=device, dtype=dtype, revision=revision)
    return ModelService(*loaded, name=model)


def default_device() -> tuple[str, str]:
    """Device and dtype of this machine."""
    return ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")


def serve_space() -> None:
    """Start the app of a Space, whose variables are MODEL, REVISION, TRUST_REMOTE_CODE and DTYPE.

    Raises:
        ValueError: if MODEL is not set, or as `load_service`.
    """
    if not os.environ.get("MODEL"):
        raise ValueError("the variable MODEL is not set, expected the Hub id of a checkpoint")
    device, dtype = default_device()
    service = load_service(
        os.environ["MODEL"],
        revision=os.environ.get("REVISION") or None,
        trust_remote_code=os.environ.get("TRUST_REMOTE_CODE", "").lower() in ("1", "true"),
        device=device,
        dtype=os.environ.get("DTYPE") or dtype,
    )
    launch(build_app(service))


def make_parser() -> CommandParser:
    """The command line of `app`."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device, dtype = default_device()
    parser.add_argument("--model", required=True, help="model or adapter: a folder or a Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: main)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that the checkpoint carries (default: the installed package)",
    )
    parser.add_argument("--device", default=device, help=f"cpu, cuda, ... (default here: {device})")
    parser.add_argument("--dtype", default=dtype, help=f"float32, bfloat16 or float16 (default here: {dtype})")
    parser.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0 for all (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860 on)")
    parser.add_argument("--share", action="store_true", help="make a public link to this computer, through gradio")
    parser.add_argument(
        "--max-file-size",
        default=MAX_FILE_SIZE,
        help=f"largest upload, such as 50mb or 1gb (default: {MAX_FILE_SIZE})",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, load the checkpoint and serve until interrupted; exit with 2 and one line on an error."""
    options = make_parser().parse_args(argv)
    try:
        if not re.fullmatch(r"\d+(\.\d+)?\s*(b|kb|mb|gb)", options.max_file_size.lower()):
            raise ValueError(f"--max-file-size is {options.max_file_size!r}, expected a size such as 50mb or 1gb")
        service = load_service(
            options.model,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            device=options.device,
            dtype=options.dtype,
        )
        launch(
            build_app(service),
            server_name=options.host,
            server_port=options.port,
            share=options.share,
            max_file_size=options.max_file_size,
        )
    except (ValueError, OSError) as error:
        stop(error)


if __name__ == "__main__":
    main(sys.argv[1:])
