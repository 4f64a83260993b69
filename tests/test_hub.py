"""Pushed and loaded back through a real client and a local Hub: every process has caches of its own."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from card_metadata import check_card
from hub_processes import TESTS, Finished, run_with_hub
from hub_server import HubServer
from video_clips import write_clip

TOKEN = "hf_ann"
ROWS = ("model", "sharded model", "adapter", "merged", "processor")
COLUMNS = ("main", "pinned revision", "offline", "without this package")

PUSHING = f"""
    sys.path[:0] = [{str(TESTS)!r}]
    from tiny import tiny_model
    from tiny_processor import tiny_processor

    clip, = arguments
    question = [{{"role": "user", "content": [{{"type": "video", "path": clip}}, {{"type": "text", "text": "What moves?"}}]}}]

    def measure(model, processor):
        inputs = processor.apply_chat_template(question, tokenize=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -4:]
        return logits.tolist(), model.predict_next_frames(**inputs)[0].metrics["mse"]

    expected = {{}}
    def note(row, version, commit, measured):
        expected.setdefault(row, {{}})[version] = {{"commit": commit.oid, "measured": measured}}
"""

PUSH_MODELS = (
    PUSHING
    + """
    def new_model(seed):
        model = tiny_model(seed=seed)
        torch.nn.init.normal_(model.autoregressive_module.change.weight, std=0.1)
        return model

    processor = tiny_processor(new_model(0).config, num_frames=4)
    new_model(9).push_to_hub("sharded")  # in one file, which must not be what loads
    for version, seed, size in (("first", 1, "40KB"), ("last", 2, "90KB")):
        model = new_model(seed)
        measured = measure(model, processor)
        processor.push_to_hub("model")
        note("model", version, model.push_to_hub("model"), measured)
        processor.push_to_hub("sharded")
        note("sharded model", version, model.push_to_hub("sharded", max_shard_size=size), measured)
    # The weights for these are those of `model` at main.
    for version, num_frames in (("first", 3), ("last", 5)):
        processor = tiny_processor(model.config, num_frames=num_frames)
        note("processor", version, processor.push_to_hub("processor"), measure(model, processor))
    print(json.dumps(expected))
"""
)

PUSH_ADAPTERS = (
    PUSHING
    + """
    from peft import LoraConfig, get_peft_model
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from llava_next_ar.hub_files import commit_files, portable_adapter_config, read_hub_folder

    # From its folder in the cache: the adapter must name the base by its id all the same.
    base = snapshot_download("ann/model")
    for version, seed in (("first", 1), ("last", 2)):
        model = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(base, trust_remote_code=True)
        targets = r".*language_model.*(q_proj|v_proj)"
        lora = LoraConfig(r=2, target_modules=targets, modules_to_save=["autoregressive_module"], init_lora_weights=False)
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, lora).eval()
        torch.nn.init.normal_(peft_model.base_model.model.autoregressive_module.change.weight, std=0.1)
        folder = f"adapter_{version}"
        peft_model.save_pretrained(folder)
        processor.save_pretrained(folder)
        measured = measure(peft_model.base_model.model, processor)
        import push_to_hub
        push_to_hub.main([folder, "ann/adapter", "--license", "apache-2.0"])
        from huggingface_hub import HfApi
        # The newest but one: the last only writes into the card what the pin is.
        commits = HfApi().list_repo_commits("ann/adapter")
        class Commit: oid = commits[1].commit_id
        note("adapter", version, Commit, measured)

        # Merged from what others get.
        loaded = AutoModelForImageTextToText.from_pretrained(
            "ann/adapter", trust_remote_code=True, adapter_kwargs={"revision": Commit.oid}
        )
        merged = peft_model.merge_and_unload()
        processor.push_to_hub("merged")
        note("merged", version, merged.push_to_hub("merged"), measure(merged, processor))
    print(json.dumps(expected))
"""
)

LOADING = f"""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    hidden, pins, clip = arguments
    question = [{{"role": "user", "content": [{{"type": "video", "path": clip}}, {{"type": "text", "text": "What moves?"}}]}}]
    trust = {{"trust_remote_code": True}}
    if hidden:
        try:
            import llava_next_ar
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError("this package can be imported")

    def load_model(row):
        pin = {{}} if pins is None else {{"revision": pins[row]}}
        if row == "adapter" and pins is not None:
            pin = {{"adapter_kwargs": {{"revision": pins[row]}}}}
        repo = {{"sharded model": "ann/sharded"}}.get(row, f"ann/{{row}}")
        return AutoModelForImageTextToText.from_pretrained(repo, **trust, **pin).eval()

    def load_processor(row):
        repo = {{"sharded model": "ann/sharded"}}.get(row, f"ann/{{row}}")
        return AutoProcessor.from_pretrained(repo, **trust, **({{}} if pins is None else {{"revision": pins[row]}}))

    results = {{}}
    for row in {ROWS!r}:
        processor = load_processor(row)
        if row == "processor":
            model = AutoModelForImageTextToText.from_pretrained("ann/model", **trust)
        else:
            model = load_model(row)
        inputs = processor.apply_chat_template(question, tokenize=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -4:]
        results[row] = [logits.tolist(), model.predict_next_frames(**inputs)[0].metrics["mse"]]
    assert not hidden or not any(name.split(".")[0] == "llava_next_ar" for name in sys.modules)
    print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer(check_card=check_card) as server:
        server.add_user("ann", TOKEN)
        yield server


class World:
    """What was pushed, and, for each column, what was loaded back: each by a process of its own, when first asked for."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        self.clip = str(write_clip(folder / "clip.mp4", 24))
        self.expected: dict[str, Any] = {}
        for name, program in (("push_models", PUSH_MODELS), ("push_adapters", PUSH_ADAPTERS)):
            program = f"    sys.path[:0] = [{str(TESTS.parent / 'scripts')!r}]\n" + program.lstrip("\n")
            self.expected |= self.run(name, program, self.clip, token=TOKEN).result

    def run(self, home: str, program: str, *arguments: Any, **options: Any) -> Finished:
        return run_with_hub(program, *arguments, endpoint=self.hub.endpoint, home=self.folder / home, **options)

    @functools.cache  # noqa: B019
    def loaded(self, column: str) -> Finished:
        if column == "offline":
            self.loaded("main")
        pins = {row: versions["first"]["commit"] for row, versions in self.expected.items()}
        return self.run(
            {"offline": "main"}.get(column, column),
            LOADING,
            column == "without this package",
            pins if column == "pinned revision" else None,
            self.clip,
            offline=column == "offline",
            hide_package=column == "without this package",
        )


@pytest.fixture(scope="module")
def world(hub, tmp_path_factory):
    return World(hub, tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS)
def test_what_was_pushed_loads_back_with_equal_logits(world, hub_cell, row, column):
    version = "first" if column == "pinned revision" else "last"
    num_requests = len(world.hub.log)
    logits, mse = world.loaded(column).result[row]
    if column == "offline":
        assert len(world.hub.log) == num_requests or world.loaded.cache_info().misses
    expected_logits, expected_mse = world.expected[row][version]["measured"]
    hub_cell(row, column, f"equal ({len(logits) * len(logits[0])} logits)")
    assert logits == expected_logits
    assert mse == expected_mse
    assert world.expected[row]["first"]["measured"] != world.expected[row]["last"]["measured"]
