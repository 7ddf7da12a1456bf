"""Numbers as people read them."""

import math


def figure(value: float) -> str:
    """Write three or four digits that matter: 12,345, 193.2, 4.07, 0.0312, 3.1e-06."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100 or value == 0:
        return f"{value:.0f}" if value == int(value) else f"{value:.1f}"
    if size >= 0.001:
        return f"{value:.3g}"
    return f"{value:.1e}"


def short(value: float) -> str:
    """Write an axis label: 250, 1.5k, 20k, 3M, 0.05, 5e-4."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    if 0 < abs(value) < 0.001:
        digits, power = f"{value:.1e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def ordinal(number: int) -> str:
    """Write 1st, 2nd, 3rd, 4th, 11th, 1,022nd."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10)
    return f"{number:,}{ending or 'th'}"
