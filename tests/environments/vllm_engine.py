"""Tasks of vllm_run.py inside the environment of vLLM: each starts an engine and writes its answers as JSON.

    python tests/environments/vllm_engine.py answers FOLDER...     # as vllm_cases.py writes them
    python tests/environments/vllm_engine.py unplugged FOLDER...   # the same, with VLLM_PLUGINS=none
    python tests/environments/vllm_engine.py adapter FOLDER        # with the LoRA adapter FOLDER/adapter
    python tests/environments/vllm_engine.py throughput FOLDER

Engines run in this process, one after the other; the server of vllm_server.py has processes of its own.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ENGINE = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 32,
    "trust_remote_code": False,
    "enforce_eager": True,  # compilation takes minutes on few cores, and answers are the same
    "distributed_executor_backend": "uni",
    "disable_log_stats": True,
}


def start(folder: Path, **options: Any) -> tuple[Any, float]:
    """The engine, and the seconds that it took to start; those of the first one include the import of vLLM."""
    begin = time.perf_counter()
    from vllm import LLM

    media = str(folder.parent)
    llm = LLM(model=str(folder / "checkpoint"), allowed_local_media_path=media, **{**ENGINE, **options})
    return llm, time.perf_counter() - begin


def stop(llm: Any) -> None:
    """Ends an engine of this process, so that another one can start."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def sampling(max_tokens: int, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def ids_of(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def answers(folder: Path, max_tokens: int) -> dict[str, Any]:
    """Ids of each case: all in one batch, one at a time with empty caches, and once more from the caches."""
    cases = json.loads((folder / "conversations.json").read_text())
    llm, seconds = start(folder)
    found: dict[str, Any] = {"seconds to start": seconds}
    options = {"sampling_params": sampling(max_tokens), "use_tqdm": False}
    outputs = llm.chat(list(cases.values()), **options)
    found["batched"] = {name: ids_of(output) for name, output in zip(cases, outputs, strict=True)}
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    found["one at a time"] = {name: ids_of(llm.chat(messages, **options)[0]) for name, messages in cases.items()}
    again = {name: llm.chat(messages, **options)[0] for name, messages in reversed(cases.items())}
    found["from caches"] = {name: ids_of(output) for name, output in again.items()}
    found["cached tokens"] = {name: output.num_cached_tokens for name, output in again.items()}
    stop(llm)
    return found


def unplugged(folder: Path, max_tokens: int) -> dict[str, Any]:
    """Ids of each case, one at a time, by the remote code of the checkpoint."""
    cases = json.loads((folder / "conversations.json").read_text())
    llm, seconds = start(folder, trust_remote_code=True)
    options = {"sampling_params": sampling(max_tokens), "use_tqdm": False}
    found = {name: ids_of(llm.chat(messages, **options)[0]) for name, messages in cases.items()}
    stop(llm)
    return {"seconds to start": seconds, "ids": found}


def adapter(folder: Path, max_tokens: int) -> dict[str, Any]:
    """Ids of each case with the adapter, without it, and with it again; with an option of the processor for all of them."""
    from vllm.lora.request import LoRARequest

    cases = json.loads((folder / "conversations.json").read_text())
    options = json.loads((folder / "settings.json").read_text())["mm_processor_kwargs"]
    llm, seconds = start(folder, enable_lora=True, max_lora_rank=8, mm_processor_kwargs=options)
    request = LoRARequest("adapter", 1, str(folder / "adapter"))
    options = {"sampling_params": sampling(max_tokens), "use_tqdm": False}
    found: dict[str, Any] = {"seconds to start": seconds}
    for name, lora in (("adapter", request), ("without", None), ("adapter again", request)):
        outputs = llm.chat(list(cases.values()), lora_request=lora, **options)
        found[name] = {case: ids_of(output) for case, output in zip(cases, outputs, strict=True)}
    return found


def throughput(folder: Path, max_tokens: int) -> dict[str, Any]:
    """Seconds of wall time and of CPU time for all requests of `requests.json` at once, after a first one."""
    requests = json.loads((folder / "requests.json").read_text())
    llm, seconds = start(folder)
    options = {"sampling_params": sampling(max_tokens, ignore_eos=True), "use_tqdm": False}
    llm.chat(requests["warm-up"], **options)
    before, begin = cpu_seconds(), time.perf_counter()
    outputs = llm.chat(requests["measured"], **options)
    return {
        "wall": time.perf_counter() - begin,
        "cpu": cpu_seconds() - before,
        "seconds to start": seconds,
        "ids": [ids_of(output) for output in outputs],
    }


def cpu_seconds() -> float:
    """CPU time of this process and of its children."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return own.ru_utime + own.ru_stime + sum(one.user + one.system for one in times)


def main() -> None:
    tasks = {"answers": answers, "unplugged": unplugged, "adapter": adapter, "throughput": throughput}
    task = tasks[sys.argv[1]]
    for folder in (Path(argument).resolve() for argument in sys.argv[2:]):
        max_tokens = json.loads((folder / "settings.json").read_text())["max_tokens"]
        (folder / f"{sys.argv[1]}.json").write_text(json.dumps(task(folder, max_tokens)))


if __name__ == "__main__":
    main()
