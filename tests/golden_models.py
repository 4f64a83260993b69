"""Runs a model of ours on what the reference code was given: placeholders become as many tokens as the media take."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from golden_data import MEDIA_PLACEHOLDER
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Seen:
    """What passed through a model in one call.

    Attributes:
        projector: (vision features, projected) of each call of the projector.
        inputs_embeds: what the language model read.
    """

    projector: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    inputs_embeds: torch.Tensor | None = None


def watch(base_model: torch.nn.Module) -> Seen:
    """Records what passes through a `LlavaNextARModel`, the last call winning."""
    seen = Seen()

    def embeds(module, args, kwargs):
        seen.inputs_embeds = kwargs["inputs_embeds"]

    base_model.language_model.register_forward_pre_hook(embeds, with_kwargs=True)
    base_model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: seen.projector.append((args[0], output))
    )
    return seen


def expand(row: Sequence[int], placeholder_ids: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Each reference placeholder becomes its own id, as often as its medium has tokens."""
    ids, counts = iter(placeholder_ids), iter(counts)
    out = []
    for token in row:
        if token == MEDIA_PLACEHOLDER:
            out += [next(ids)] * next(counts)
        else:
            out.append(token)
    return out


def expand_batch(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    placeholder_ids: Sequence[Sequence[int]],
    counts: Sequence[Sequence[int]],
    padding_side: str = "right",
) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` (-100 on media) as our processor and collator would give them.

    Args:
        input_ids, attention_mask, labels: `[B, S]` of the reference; all is real without a mask.
        placeholder_ids, counts: for each sample, the token id and the number of tokens of each of its media.
        padding_side: of the result.
    """
    rows: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for sample, row in enumerate(input_ids):
        real = torch.ones_like(row).bool() if attention_mask is None else attention_mask[sample].bool()
        ids = row[real].tolist()
        targets = [-100] * len(ids) if labels is None else labels[sample][real].tolist()
        marked = [MEDIA_PLACEHOLDER if i == MEDIA_PLACEHOLDER else t for i, t in zip(ids, targets, strict=True)]
        expanded = expand(ids, placeholder_ids[sample], counts[sample])
        rows["input_ids"].append(torch.tensor(expanded))
        rows["attention_mask"].append(torch.ones(len(expanded), dtype=torch.long))
        rows["labels"].append(torch.tensor(expand(marked, [-100] * len(counts[sample]), counts[sample])))
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: pad_sequence(values, batch_first=True, padding_value=fill[name], padding_side=padding_side)
        for name, values in rows.items()
    }
