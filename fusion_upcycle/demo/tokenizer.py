"""A byte-level tokenizer as a normal Hugging Face fast tokenizer: one token per UTF-8 byte."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"  # begin, end and padding in one
VOCABULARY_SIZE = 257  # 256 bytes, then END_OF_TEXT


def byte_tokenizer(context_length: int) -> "PreTrainedTokenizerFast":
    """Tokenizer with an exact round trip of any text; ``save_pretrained`` makes it loadable.

    It adds no special token by itself. Text that spells ``<|endoftext|>`` out becomes the special
    token unless ``split_special_tokens=True`` is given.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # A BPE without merges leaves the symbols of the byte-level alphabet, which stand for bytes.
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
