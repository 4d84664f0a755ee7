"""How much faster a fused MobileOne-S0 is than its train-time form, in each engine and layout; and how long `xbench cost` takes to answer.

    python benchmarks/cost.py

The target is a ratio of 2 at batch 1 in ONNX Runtime and in eager torch, and 10 s for the answer. Both forms are timed one after the
other in one process, three times over; the ratio is of the least disturbed median of each, and `spread` says how far the rounds lie
apart. What README says of folding comes from results/cost/latency.csv, whose figure stands beside as `stored`.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from xbench.latency import device_name, latency, versions

ROUNDS = 3
CASES = {'eager, channels_last': dict(engine='eager', layout='channels_last'),
         'eager, contiguous': dict(engine='eager', layout='contiguous'),
         'compiled, channels_last': dict(engine='compiled'), 'onnxruntime': dict(engine='onnxruntime')}



def stored(case):
    """The ratio in results/cost/latency.csv; None for a case that is not measured there."""
    engine, _, layout = case.partition(', ')
    clock = pd.read_csv(Path(__file__).parents[1]/'results'/'cost'/'latency.csv')
    of = clock[(clock.backbone == 'mobileone_s0') & (clock.engine == engine) & (clock.dtype == 'float32') & (clock.batch == 1)]
    p50 = of[of.layout == (layout or 'nchw')].set_index('form').p50_ms
    return round(p50['train-time']/p50['fused'], 2) if len(p50) else None


if __name__ == '__main__':
    found = {'device': device_name(), 'versions': versions(), 'threads': 1, 'batch': 1, 'target': 2, 'cases': {}}
    for case, conditions in CASES.items():
        p50 = {'train-time': [], 'fused': []}
        for _ in range(ROUNDS):
            for row in latency('mobileone_s0', **conditions): p50[row['form']].append(row['p50_ms'])
        before, after = map(min, p50.values())
        spread = max(max(v)/min(v) for v in p50.values())
        found['cases'][case] = {'train_time_ms': round(before, 2), 'fused_ms': round(after, 2), 'ratio': round(before/after, 2),
                                'spread': round(spread, 2), 'stored': stored(case)}
        print(case, found['cases'][case])
    answers = {}
    for name in ('mobilenet_v3_small', 'resnet18', 'starnet', 'mobileone_s1'):    # ResNet-18 has 1.8 GMACs, the others less than 1
        begun = time.perf_counter()
        subprocess.run([sys.executable, '-m', 'xbench.cli', 'cost', name], check=True, capture_output=True)
        answers[name] = round(time.perf_counter() - begun, 1)
    found |= {'answer_target_s': 10, 'answer_s': answers}
    print(json.dumps(found, indent=1))
    (Path(__file__).parent/'results'/'cost.json').write_text(json.dumps(found, indent=1) + '\n')
