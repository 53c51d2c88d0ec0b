"""Bytes as `keel plan` prints them."""


def unit(largest: float) -> tuple[float, str]:
    """Size and name of the unit for a table whose largest number of bytes this is."""
    return (1e9, "GB") if largest >= 1e9 else (1e6, "MB")


def rounded(size: float) -> str:
    """Bytes as billions or millions with two digits."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
