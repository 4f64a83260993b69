"""Run a model on the inputs of the reference code, with one placeholder for each token of a medium."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from golden_data import MEDIA_PLACEHOLDER
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Seen:
    """Inputs and outputs of the parts of a model in one call.

    Attributes:
        projector: (vision features, projected) of each call of the projector.
        inputs_embeds: input of the language model.
    """

    projector: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    inputs_embeds: torch.Tensor | None = None


def watch(base_model: torch.nn.Module) -> Seen:
    """Record inputs and outputs of the parts of a `LlavaNextARModel`; the last call wins."""
    seen = Seen()

    def embeds(module, args, kwargs):
        seen.inputs_embeds = kwargs["inputs_embeds"]

    base_model.language_model.register_forward_pre_hook(embeds, with_kwargs=True)
    base_model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: seen.projector.append((args[0], output))
    )
    return seen


def expand(row: Sequence[int], placeholder_ids: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Replace each reference placeholder by its id, once for each token of its medium."""
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
    """Return `input_ids`, `attention_mask` and `labels` (-100 on media) like processor and collator.

    Args:
        input_ids, attention_mask, labels: `[B, S]` of the reference; without a mask nothing is padding.
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
