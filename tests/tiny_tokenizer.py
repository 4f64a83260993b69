"""Small fast tokenizers, built offline. The one of characters fits the vocabulary of tiny.py."""

from tiny import IMAGE_TOKEN, PAD_TOKEN, VIDEO_TOKEN, VOCAB_SIZE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<image>", "<video>", "<|endoftext|>")


def character_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """One token for each printable ASCII character; placeholders and padding have the ids of `tiny_config`."""
    special = {"<|endoftext|>": PAD_TOKEN, "<image>": IMAGE_TOKEN, "<video>": VIDEO_TOKEN}
    names = ["<|im_start|>", "<|im_end|>", "<unk>", "\n", *map(chr, range(32, 127))]
    free = [token_id for token_id in range(VOCAB_SIZE) if token_id not in special.values()]
    vocab = special | dict(zip(names, free, strict=False))
    vocab |= {f"<unused_{token_id}>": token_id for token_id in set(free) - set(vocab.values())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    return _with_special_tokens(backend, unk_token="<unk>", **kwargs)


def byte_tokenizer(*, placeholders: bool = True, **kwargs) -> PreTrainedTokenizerFast:
    """One token for each byte, as Qwen's falls back to; so a character may be several tokens."""
    vocab = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _with_special_tokens(backend, placeholders=placeholders, **kwargs)


def _with_special_tokens(backend: Tokenizer, *, placeholders: bool = True, **kwargs) -> PreTrainedTokenizerFast:
    names = [name for name in SPECIAL_TOKENS if placeholders or name not in ("<image>", "<video>")]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>", **kwargs
    )
    assert tokenizer.decode(tokenizer("<|im_start|>Hi!\n")["input_ids"]) == "<|im_start|>Hi!\n"
    return tokenizer
