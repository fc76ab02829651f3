"""Numbers as people say them."""


def si(number: float) -> str:
    """A number with three digits and a suffix."""
    for magnitude, suffix in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if number >= magnitude:
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
    if hours >= 1:
        return f'{hours:,.1f} hours'
    return f'{60 * hours:.1f} minutes' if hours >= 1 / 60 else f'{3600 * hours:.2g} seconds'
