"""Measure the memory of three training steps of a small model, by the peak of this process.

python tests/memory_run.py <whether the tower trains> <whether activations are checkpointed>   # True or False
"""

import sys

import torch
from tiny import tiny_model

from llava_next_ar.configuration.configuration_llava_next_ar import LlavaNextARConfig
from llava_next_ar.modeling.modeling_llava_next_ar import LlavaNextARForConditionalGeneration

NUM_VIDEOS, NUM_FRAMES, NUM_TEXT, NUM_TARGETS = 2, 16, 60, 40


def memory_config() -> LlavaNextARConfig:
    """Configuration of a model that is large against Python and torch themselves."""
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 512,
        "vision_use_head": False,
    }
    vision |= {"num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 112, "patch_size": 8}
    text = {"model_type": "qwen2", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20000, "tie_word_embeddings": False}
    return LlavaNextARConfig(
        vision_config=vision,
        text_config={**text, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
        image_token_index=19998,
        video_token_index=19999,
        image_grid_pinpoints=[[112, 112]],
        autoregressive_config={"num_heads": 4, "num_layers": 2},
        tie_word_embeddings=False,
    )


def memory_of_process(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def measure(tower_trains: bool, checkpointing: bool) -> int:
    """Peak memory in bytes above that of the process before it had a model."""
    torch.set_num_threads(1)
    small = tiny_model().train()  # memory that the first step of any model loads is not counted
    small(input_ids=torch.ones(1, 9, dtype=torch.long), labels=torch.ones(1, 9, dtype=torch.long)).loss.backward()
    torch.optim.AdamW(small.parameters()).step()
    before = memory_of_process("VmRSS")
    config = memory_config()
    model = LlavaNextARForConditionalGeneration._from_config(config, dtype=torch.float32)
    model.model.vision_tower.requires_grad_(tower_trains)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    num_tokens = config.frame_token_layout.num_tokens(NUM_FRAMES)
    ids = torch.randint(1, 19990, (NUM_VIDEOS, num_tokens + NUM_TEXT))
    ids[:, 5 : 5 + num_tokens] = config.video_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -NUM_TARGETS:] = ids[:, -NUM_TARGETS:]
    for _ in range(3):
        pixels = torch.randn(NUM_VIDEOS, NUM_FRAMES, 3, 112, 112)
        model(input_ids=ids, labels=labels, pixel_values_videos=pixels, skip_logits=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return memory_of_process("VmHWM") - before


if __name__ == "__main__":
    print("PEAK", measure(*(word == "True" for word in sys.argv[1:])))
