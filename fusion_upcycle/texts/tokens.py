"""Text as token ids, and whether they are those of the model."""

from fusion_upcycle.errors import UpcyclingError


def check_vocabulary(largest: int, embeddings: int, whose: str = "The tokenizer") -> None:
    """Refuse token ids that a model has no embedding for.

    Args:
        largest: token id of the text.
        embeddings: how many the model has.
        whose: the tokenizer, as the error's first words.

    Raises:
        UpcyclingError: the tokenizer is of another model.
    """
    if largest >= embeddings:
        raise UpcyclingError(
            f"{whose} gives token id {largest}, but the model has {embeddings} embeddings: use the "
            "tokenizer that belongs to the model."
        )
