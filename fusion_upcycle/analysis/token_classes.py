"""What kind of thing a token is, by the text that the tokenizer decodes it to.

A token is judged by itself, without its neighbours, so that the classes of a byte-level tokenizer
are those of single bytes: of "Total", `T` is capitalised and `otal` are four words.

| class | text of the token, spaces around it aside |
|---|---|
| capitalised | has a letter, and its first letter is upper case |
| word | has a letter, and its first letter is not: also parts of words, and scripts without case |
| number | has a digit and no letter |
| operator | mathematical symbols and `- * / % ^ & !=` only: also a hyphen in prose |
| bracket | opening and closing brackets only; `<` and `>` are operators |
| punctuation | punctuation and other symbols only |
| whitespace | nothing else |
| other | special tokens, parts of a UTF-8 character, control characters |
"""

import unicodedata
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_CLASSES = (
    "word",
    "capitalised",
    "number",
    "operator",
    "bracket",
    "punctuation",
    "whitespace",
    "other",
)
_OPERATORS = frozenset("-*/%^&!")  # beside those that Unicode calls mathematical
_REPLACEMENT = "\ufffd"  # what a part of a character decodes to


def token_class(text: str) -> str:
    """The class of a token's text, one of `TOKEN_CLASSES`; see the module."""
    text = text.strip()
    if not text:
        return "whitespace"
    if _REPLACEMENT in text:
        return "other"
    letters = [character for character in text if character.isalpha()]
    if letters:
        return "capitalised" if letters[0].isupper() or letters[0].istitle() else "word"
    if any(character.isnumeric() for character in text):
        return "number"
    categories = [unicodedata.category(character) for character in text]
    if text.strip("!") and all(
        category == "Sm" or character in _OPERATORS
        for character, category in zip(text, categories, strict=True)
    ):
        return "operator"
    if all(category in ("Ps", "Pe") for category in categories):
        return "bracket"
    return "punctuation" if all(category[0] in "PS" for category in categories) else "other"


class TokenClasses:
    """Classes of a tokenizer's tokens; each token is decoded once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self._known = dict.fromkeys(tokenizer.all_special_ids, TOKEN_CLASSES.index("other"))

    def __call__(self, ids: Tensor) -> Tensor:
        """Index into `TOKEN_CLASSES` of each token id, in the same shape."""
        unique, places = ids.unique(return_inverse=True)
        return torch.tensor([self._of(token) for token in unique.tolist()])[places]

    def _of(self, token: int) -> int:
        if token not in self._known:
            text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
            self._known[token] = TOKEN_CLASSES.index(token_class(text))
        return self._known[token]
