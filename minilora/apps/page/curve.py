"""The curves of a run as a drawing (SVG) for the page: the loss, and with --validation the validation loss."""

import math
from collections.abc import Mapping

import numpy as np

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 230, 56, 24  # pixels; the last two are for the numbers
POINTS = 200  # at most, per curve; each is a mean of neighbours
COLOURS = {"training": "#0d9488", "validation": "#ea580c"}


def means(losses: Mapping[int, float]) -> list[tuple[float, float]]:
    """Return losses by step as at most POINTS points, (step, mean loss), without those that are not finite."""
    finite = [(step, loss) for step, loss in sorted(losses.items()) if math.isfinite(loss)]
    parts = np.array_split(np.array(finite), min(POINTS, len(finite))) if finite else []
    return [(float(part[-1, 0]), float(part[:, 1].mean())) for part in parts]  # part is (some, step and loss)


def drawing(curves: Mapping[str, Mapping[int, float]], steps: int) -> str:
    """Draw curves of losses by step, given by name, as SVG; steps go from 0 to `steps`."""
    points = {name: means(losses) for name, losses in curves.items() if losses}
    losses = [loss for each in points.values() for _, loss in each]
    if not losses:
        return ""
    low, high = min(losses), max(losses)
    low, high = (low - 0.05 * abs(low) - 1e-9, high + 0.05 * abs(high) + 1e-9) if low == high else (low, high)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 12) * step / max(1, steps)
        return round(x, 1), round(10 + (HEIGHT - BOTTOM - 10) * (high - loss) / (high - low), 1)

    parts = []
    for loss in np.linspace(low, high, 4):
        x, y = place(0, loss)
        parts.append(f'<line x1="{x}" x2="{WIDTH - 12}" y1="{y}" y2="{y}" class="grid"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{loss:.3g}</text>')
    for step in (0, steps // 2, steps):
        parts.append(f'<text x="{place(step, low)[0]}" y="{HEIGHT - 4}" text-anchor="middle">{step}</text>')
    for number, (name, each) in enumerate(points.items()):
        line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in each))
        colour, y = COLOURS[name], 24 + 16 * number
        parts.append(f'<polyline id="{name}" points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - 20}" y="{y}" text-anchor="end" style="fill: {colour}">{name} loss</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%">{"".join(parts)}</svg>'
