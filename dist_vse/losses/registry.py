"""The losses' names, and in what the losses differ."""

SOFTMAX = ("convse", "info_nce")
ON_LOGITS = (*SOFTMAX, "siglip")  # scaled similarities; positives are candidates
HARDEST = ("convse++", "vse++")  # once the warm-up is over
HINGES = (*HARDEST, "vse0")


def travels_rounded(name: str, *, bf16_products: bool) -> bool:
    """Tell whether captions travel in bfloat16: half the bytes, and the same products.

    The gradient of the hardest negatives is made of features themselves.
    """
    return bf16_products and name in ON_LOGITS


def caption_bytes(name: str, *, bf16_products: bool) -> int:
    """Return the bytes of a number of a caption's features on its way to other ranks."""
    return 2 if travels_rounded(name, bf16_products=bf16_products) else 4
