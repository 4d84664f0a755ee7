"""How much faster a fused MobileOne-S0 is than its train-time form, in each engine and layout; and how long `xbench cost` takes to answer.

    python benchmarks/cost.py

The target is a ratio of 2 at batch 1 in ONNX Runtime and in eager torch, and 10 s for the answer. Both forms are timed one after the
other in one process, twice over; the ratio is of medians over the rounds.
"""
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from xbench.latency import device_name, latency, versions

ROUNDS = 2
CASES = {'eager, channels_last': dict(engine='eager', layout='channels_last'),
         'eager, contiguous': dict(engine='eager', layout='contiguous'),
         'compiled, channels_last': dict(engine='compiled'), 'onnxruntime': dict(engine='onnxruntime')}

if __name__ == '__main__':
    found = {'device': device_name(), 'versions': versions(), 'threads': 1, 'batch': 1, 'target': 2, 'cases': {}}
    for case, conditions in CASES.items():
        p50 = {'train-time': [], 'fused': []}
        for _ in range(ROUNDS):
            for row in latency('mobileone_s0', **conditions): p50[row['form']].append(row['p50_ms'])
        before, after = (statistics.median(p50[f]) for f in p50)
        found['cases'][case] = {'train_time_ms': round(before, 2), 'fused_ms': round(after, 2), 'ratio': round(before/after, 2)}
        print(case, found['cases'][case])
    answers = {}
    for name in ('mobilenet_v3_small', 'resnet18', 'starnet', 'mobileone_s1'):    # ResNet-18 has 1.8 GMACs, the others less than 1
        begun = time.perf_counter()
        subprocess.run([sys.executable, '-m', 'xbench.cli', 'cost', name], check=True, capture_output=True)
        answers[name] = round(time.perf_counter() - begun, 1)
    found |= {'answer_target_s': 10, 'answer_s': answers}
    print(json.dumps(found, indent=1))
    (Path(__file__).parent/'results'/'cost.json').write_text(json.dumps(found, indent=1) + '\n')
