"""A store whose bytes are damaged on purpose."""

from pathlib import Path

from expert_store.store import Store


def damage(store: Path, layer: int, expert: int) -> None:
    """Flip one bit in the middle of the span of (layer, expert)."""
    with Store.open(store) as opened:
        deep = opened.deep_expert(layer, expert)
        spans = [spec.span_bytes for spec in opened.manifest.layers]
    at = deep.data_offset + sum(spans[:layer]) + spans[layer] // 2
    with open(store / deep.file, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
