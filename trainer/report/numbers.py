"""Numbers for people: short forms, clocks, ticks on an axis, and curves thinned to what a picture can show."""

import math
from collections.abc import Sequence
from datetime import datetime

Points = Sequence[tuple[float, float]]
"""(tokens, value), tokens increasing."""

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def short(value: float, digits: int = 3) -> str:
    """`digits` significant digits with k, M, B, T: 334848 is 335k; below a thousandth as 1.2e-6."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    size = abs(value)
    if size == 0:
        return "0"
    for limit, unit in _UNITS:
        if size >= limit * (1 - 0.5 * 10**-digits):
            return f"{_plain(value / limit, digits)}{unit}"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    return _plain(value, digits)


def tick(value: float, digits: int = 3) -> str:
    """A round value at an axis, without needless zeros."""
    number = short(value, digits)
    unit = number[-1] if number[-1] in "kMBT" else ""
    plain = number.removesuffix(unit)
    return (plain.rstrip("0").rstrip(".") if "." in plain and "e" not in plain else plain) + unit


def tick_texts(values: Sequence[float]) -> list[str]:
    """As many digits for all as the closest two need."""
    for digits in range(3, 9):
        texts = [tick(value, digits) for value in values]
        if len(set(texts)) == len(texts):
            break
    return texts


def count(value: float) -> str:
    """A whole number in full where it is short, else as `short`."""
    return f"{value:.0f}" if abs(value) < 10_000 else short(value)


def percent(share: float) -> str:
    """0.031 is 3 %; below one percent with two digits, so that little is not called nothing."""
    return f"{short(100 * share, 2)} %" if 0 < share < 0.0095 else f"{100 * share:.0f} %"


def size(num_bytes: float) -> str:
    """Bytes in binary units."""
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= limit:
            return f"{_plain(num_bytes / limit, 3)} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 5 h 7 min, 12 d 3 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    for unit, small, names in ((60, 1, ("min", "s")), (3600, 60, ("h", "min")), (86400, 3600, ("d", "h"))):
        if whole < unit * (60 if unit < 3600 else 24) or unit == 86400:
            rest = whole % unit // small
            return f"{whole // unit} {names[0]}" + (f" {rest} {names[1]}" if rest else "")
    raise AssertionError


def moment(time: datetime, now: datetime) -> str:
    """Hour and minute in `now`'s zone; with the date where that is another day."""
    local = time.astimezone(now.tzinfo)
    days = (local.date() - now.date()).days
    if days == 0:
        return f"{local:%H:%M}"
    return f"{local.day} {local:%b %H:%M}" if local.year == now.year else f"{local.day} {local:%b %Y}"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values from `low` to `high` in steps of 1, 2 or 5 times a power of ten, at most `most`."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        first = math.ceil(low / (step * factor) - 1e-9)
        last = math.floor(high / (step * factor) + 1e-9)
        if last - first < most:
            return [number * step * factor for number in range(first, last + 1)]
    raise AssertionError


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Powers of ten from `low` to `high`, with 2 and 5 between them where there is room, every n-th where not."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**e for e in range(first, last + 1) for f in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def thin(points: Points, most: int = 600) -> list[tuple[float, float]]:
    """At most about `most` points with the same outline: of each bucket the lowest and the highest, in their order.

    What is not finite is kept: it is the first thing to see.
    """
    if len(points) <= most:
        return list(points)
    buckets = most // 2
    width = len(points) / buckets
    kept: set[int] = {0, len(points) - 1}
    for bucket in range(buckets):
        indices = range(int(bucket * width), min(int((bucket + 1) * width), len(points)))
        finite = [i for i in indices if math.isfinite(points[i][1])]
        kept |= {next(i for i in indices if i not in finite)} if len(finite) < len(indices) else set()
        if finite:
            kept |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def smooth(points: Points, span: int) -> list[tuple[float, float]]:
    """The mean of the `span` points around each one, as far as there are any; what is not finite is left out."""
    finite = [point for point in points if math.isfinite(point[1])]
    total = [0.0]
    for _, value in finite:
        total.append(total[-1] + value)
    means = []
    for i, (tokens, _) in enumerate(finite):
        low, high = max(i - span // 2, 0), min(i + span // 2 + 1, len(finite))
        means.append((tokens, (total[high] - total[low]) / (high - low)))
    return means


def at(points: Points, tokens: float) -> float:
    """The value at `tokens` between its neighbours, linearly; `tokens` lies inside the curve."""
    low, high = 0, len(points) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if points[middle][0] <= tokens else (low, middle)
    (left, before), (right, after) = points[low], points[high]
    share = (tokens - left) / (right - left) if right > left else 0.0
    return before + (after - before) * share


def _plain(value: float, digits: int) -> str:
    """Fixed notation with `digits` significant digits, for 1e-3 up."""
    exponent = int(f"{abs(value):.{digits - 1}e}".partition("e")[2])
    return f"{value:.{max(0, digits - 1 - exponent)}f}"
