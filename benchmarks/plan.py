"""What `xbench train --dry-run` says against the time that the run then takes, and what the papers' recipes would take on this machine.

    python benchmarks/plan.py [accuracy] [PROFILE ...] [RECIPE ...]

Target: the median of three estimates within 30 % of the true time, for three cells. Packing is done before and not counted, by either.
A profile: the last row of `xbench plan`. A recipe: a few steps of one cell as it stands, but float32 in place of fp16, which a CPU has
not, and for `mobileone` eight passes a step, for 256 images at once need more than 24 GB.
"""
import json
import statistics
import subprocess
import sys
import time

import torch

from xbench import pack, paths, settings
from xbench.latency import device_name, versions

PROFILES = ('lite', 'full')
CELLS = [('lite', 'starnet', 'cifar10'), ('lite', 'mobilenet', 'scenes15'), ('demo', 'mobilevit', 'tissue')]
RECIPES = {'cross_dataset': ('full', 'starnet', 'cifar100', {}), 'memory_constrained': ('full', 'mobilenet_v3_small', 'cifar10', {}),
           'which_backbone': ('full', 'resnet50', 'cifar10', {}),
           'mobileone': ('full', 'mobileone_s0', 'datasets/imagenet1k', {'accumulate': 8})}


def xbench(*command):
    """The last row that a command prints, and its seconds from start to end."""
    begun = time.perf_counter()
    whole = [sys.executable, '-m', 'xbench.cli', *command, '--format', 'json']
    done = subprocess.run(whole, cwd=paths.root(), capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr or f'{command} ended with {done.returncode}: out of memory?')
    return json.loads(done.stdout)[-1], time.perf_counter() - begun


def accuracy():
    rows = []
    for profile, backbone, dataset in CELLS:
        pack.prepare(settings.resolve(settings.load(), profile, backbone, dataset))
        cell = ('train', backbone, dataset, '--profile', profile, '--seed', '91')
        guesses = [60*xbench(*cell, '--dry-run')[0]['minutes'] for _ in range(3)]
        true = xbench(*cell, '--again')[1]
        rows.append({'cell': f'{profile}, {backbone} on {dataset}', 'estimated_s': [round(g, 1) for g in guesses], 'true_s': round(true, 1),
                     'median_ratio': round(statistics.median(guesses)/true, 3)})
        print(rows[-1], flush=True)
    return rows


def takes(name):
    profile, backbone, dataset, changes = RECIPES[name]
    if settings.load().recipe[name].precision == 'fp16' and not torch.cuda.is_available(): changes = {**changes, 'precision': 'float32'}
    args = [a for k, v in changes.items() for a in ('--set', f'{k}={v}')]
    row, took = xbench('train', backbone, dataset, '--profile', profile, '--recipe', name, *args, '--dry-run')
    row |= {'changed': changes, 'profile': profile, 'px': settings.load().profiles[profile].images.size}
    print(name, row, f'({took:.0f} s to find out)', flush=True)
    return row


def whole(profile):
    row, took = xbench('plan', profile)
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
