"""Means by position: bins equally wide on a logarithmic axis, each with enough tokens."""

import numpy as np

BINS_PER_OCTAVE = 3
LEAST_SHARE = 0.005  # of all tokens, in a bin: fewer would show noise


def edges_of(count: np.ndarray) -> np.ndarray:
    """Borders of bins of positions: equally wide on a log axis, merged until each holds enough."""
    length = len(count)
    octaves = np.log2(length)
    borders = np.ceil(2 ** np.linspace(0, octaves, round(octaves * BINS_PER_OCTAVE) + 1) - 1e-9)
    before = np.cumsum(count)  # tokens up to and including a position
    kept = [1]
    for border in np.unique(borders.astype(int)):
        if before[border - 1] - before[kept[-1] - 1] >= LEAST_SHARE * before[-1]:
            kept.append(int(border))
    kept[1 if len(kept) == 1 else -1 :] = [length]
    return np.array(kept)


def binned(count: np.ndarray, gain: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean gain per token in each bin."""
    return np.add.reduceat(gain, edges[:-1]) / np.add.reduceat(count, edges[:-1])
