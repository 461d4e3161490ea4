"""Bytes as people read them."""


def size_text(n_bytes: float) -> str:
    """With the unit that suits."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.2f} GiB"
