"""Seconds as people read them."""


def duration_text(seconds: float) -> str:
    """With the two units that suit, as in 2 h 05 min."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 60:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes:.0f} min"
    if hours < 48:
        return f"{minutes // 60:.0f} h {minutes % 60:02.0f} min"
    return f"{hours // 24:.0f} d {hours % 24:02.0f} h"
