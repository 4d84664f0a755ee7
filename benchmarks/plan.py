"""What `xbench train --dry-run` says of time and memory against what the run then takes, and what the papers' recipes would take here.

    python benchmarks/plan.py [accuracy] [PROFILE ...] [RECIPE ...]

Targets: estimate over truth between 0.85 and 1.15 in time and between 0.9 and 1.1 in memory, for each cell, the shortest included.
Estimate and run take turns, three times; a ratio is of their medians. Time is from start to end of the process, on the clock and, for
a machine that others use, of the processor; memory is the most that the process had resident. One cell is not packed when it begins.
A profile: the last row of `xbench plan`. A recipe: a few steps of one cell as it stands, but float32 in place of fp16, which a CPU has
not, and for `mobileone` eight passes a step, for 256 images at once need more than 24 GB.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from xbench import pack, paths, settings
from xbench.latency import device_name, versions

PROFILES = ('lite', 'full')
ROUNDS = 3
CELLS = [('demo', 'starnet', 'digits', {}), ('demo', 'starnet', 'digits', {'epochs': 1, 'warmup_epochs': 0}),
         ('demo', 'mobilevit', 'tissue', {}), ('demo', 'ghostnet', 'photographs', {'ema': 0.99}), ('lite', 'starnet', 'cifar10', {}),
         ('lite', 'mobilenet', 'scenes15', {})]
RECIPES = {'cross_dataset': ('full', 'starnet', 'cifar100', {}), 'memory_constrained': ('full', 'mobilenet_v3_small', 'cifar10', {}),
           'which_backbone': ('full', 'resnet50', 'cifar10', {}),
           'mobileone': ('full', 'mobileone_s0', 'datasets/imagenet1k', {'accumulate': 8})}


def xbench(*command):
    """The last row that a command prints; its seconds, its processor's, and the most MiB that it had resident."""
    begun = time.perf_counter()
    whole = [sys.executable, '-m', 'xbench.cli', *command, '--format', 'json']
    with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
        process = subprocess.Popen(whole, cwd=paths.root(), stdout=out, stderr=err)
        _, status, used = os.wait4(process.pid, 0)
        took, process.returncode = time.perf_counter() - begun, os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        if process.returncode: raise SystemExit(err.read() or f'{command} ended with {process.returncode}: out of memory?')
        return json.loads(out.read())[-1], took, used.ru_utime + used.ru_stime, used.ru_maxrss/1024


def accuracy(cells=CELLS, rounds=ROUNDS):
    rows = []
    for profile, backbone, dataset, changes in cells:
        ready = pack.prepare(settings.resolve(settings.load(), profile, backbone, dataset))
        cell = ['train', backbone, dataset, '--profile', profile, '--seed', '91']
        for k, v in changes.items(): cell += ['--set', f'{k}={v}']
        guesses, truths = [], []
        for _ in range(rounds):
            row, *_ = xbench(*cell, '--dry-run')
            guesses.append((60*row['minutes'], row['memory_mib']))
            truths.append(xbench(*cell, '--again')[1:])
        rows.append(_ratios(f'{profile}, {backbone} on {dataset}' + ''.join(f', {k} {v}' for k, v in changes.items()), guesses, truths))
    shutil.rmtree(ready)
    row, *_ = xbench(*cell, '--dry-run')
    rows.append(_ratios(f'{rows[-1]["cell"]}, packed by the run', [(60*row['minutes'], row['memory_mib'])], [xbench(*cell, '--again')[1:]]))
    return rows


def _ratios(cell, guesses, truths):
    middle = lambda rows, k: statistics.median(r[k] for r in rows)
    row = {'cell': cell, 'estimated_s': [round(g[0], 1) for g in guesses], 'true_s': [round(t[0], 1) for t in truths],
           'processor_s': [round(t[1], 1) for t in truths], 'median_ratio': round(middle(guesses, 0)/middle(truths, 0), 3),
           'estimated_mib': round(middle(guesses, 1)), 'true_mib': round(middle(truths, 2)),
           'memory_ratio': round(middle(guesses, 1)/middle(truths, 2), 3)}
    print(row, flush=True)
    return row


def takes(name):
    profile, backbone, dataset, changes = RECIPES[name]
    if settings.load().recipe[name].precision == 'fp16' and not torch.cuda.is_available(): changes = {**changes, 'precision': 'float32'}
    args = [a for k, v in changes.items() for a in ('--set', f'{k}={v}')]
    row, took, *_ = xbench('train', backbone, dataset, '--profile', profile, '--recipe', name, *args, '--dry-run')
    row |= {'changed': changes, 'profile': profile, 'px': settings.load().profiles[profile].images.size}
    print(name, row, f'({took:.0f} s to find out)', flush=True)
    return row


def whole(profile):
    row, took, *_ = xbench('plan', profile)
    row |= {'px': settings.load().profiles[profile].images.size}
    print(profile, row, f'({took:.0f} s to find out)', flush=True)
    return row


if __name__ == '__main__':
    target = paths.root()/'benchmarks'/'results'/'plan.json'
    found = json.loads(target.read_text()) if target.exists() else {'recipes': {}}
    for part in sys.argv[1:] or ('accuracy', *PROFILES, *RECIPES):
        if part == 'accuracy': found[part] = accuracy()
        elif part in PROFILES: found.setdefault('profiles', {})[part] = whole(part)
        else: found['recipes'][part] = takes(part)
        found |= {'device': device_name('cpu'), 'threads_of_a_run': 1, 'versions': versions()}
        with paths.whole(target) as part: part.write_text(json.dumps(found, indent=1) + '\n')
