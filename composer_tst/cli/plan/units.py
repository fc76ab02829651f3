"""Numbers as people say them."""


def si(number: float) -> str:
    """A number with three digits and a suffix."""
    for magnitude, suffix in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if number >= 0.9995 * magnitude:  # which three digits round up
            return f'{number / magnitude:.3g}{suffix}'
    return f'{number:.3g}'


def size(number: float) -> str:
    """Bytes as people say them."""
    for magnitude, unit in ((1e12, 'TB'), (1e9, 'GB')):
        if number >= magnitude:
            return f'{number / magnitude:,.1f} {unit}'
    return f'{number / 1e6:,.1f} MB'


def span(hours: float) -> str:
    """Hours as people say them."""
    for length, unit in ((24, 'days'), (1, 'hours'), (1 / 60, 'minutes')):
        if hours >= 2 * length or (unit == 'minutes' and hours >= length):
            return f'{hours / length:,.1f} {unit}'
    seconds = 3600 * hours
    return f'{seconds:.0f} seconds' if seconds >= 1.5 else 'about a second' if seconds >= 0.5 else 'less than a second'


def times(ratio: float, what: str) -> str:
    """How many more or fewer of something there are here than there."""
    if 0.9 < ratio < 1.1:
        return f'about as many {what}'
    if ratio < 0.1:
        return f'1/{1 / ratio:,.0f} of its {what}'
    return f'{ratio:,.0f} times its {what}' if ratio >= 10 else f'{ratio:.2g} times its {what}'
