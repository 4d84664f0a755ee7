"""Time xScore of 10,000 backbones on 100 datasets, checks included, beside scikit-learn's scaler with numpy's moments.

    python benchmarks/xscore.py

The target is under 100 ms. Times are medians of runs taken in turn, so that the ratio holds on a noisy machine.
"""
import json
import statistics
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.preprocessing import minmax_scale

from xbench.xscore import search, xscore

RUNS = 15


def seconds(*functions):
    """Median seconds of each function, called in turn."""
    taken = [[] for _ in functions]
    for k in range(RUNS + 1):
        for f, t in zip(functions, taken):
            start = time.perf_counter()
            f()
            if k: t.append(time.perf_counter() - start)
    return [statistics.median(t) for t in taken]


def peer(values):
    """The same score without checks and labels."""
    norm = minmax_scale(values)
    return norm.mean(1) - .5*norm.var(1, ddof=1)


if __name__ == '__main__':
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.uniform(1, 99, (10_000, 100)), [f'b{i}' for i in range(10_000)], [f'd{j}' for j in range(100)])
    assert np.allclose(xscore(table).xscore, peer(table.to_numpy()))
    eleven = table.iloc[:11, :12]
    ours, theirs, subsets = seconds(lambda: xscore(table), lambda: peer(table.to_numpy()), lambda: search(eleven))
    found = {'xscore_10000x100_ms': round(1000*ours, 1), 'target_ms': 100, 'peer_ms': round(1000*theirs, 1),
             'ratio_to_peer': round(ours/theirs, 2),
             'search_11x12_4083_subsets_ms': round(1000*subsets, 1)}
    print(json.dumps(found, indent=1))
    (Path(__file__).parent/'results'/'xscore.json').write_text(json.dumps(found, indent=1) + '\n')
