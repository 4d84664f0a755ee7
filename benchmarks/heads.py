"""What the first weights of a head cost on a short schedule: EfficientNet, FBNet and TinyNet begun as their libraries do and with zeros.

    python benchmarks/heads.py

torchvision (EfficientNet, TinyNet) and timm (FBNet) draw the weights of the last layer from ±1/√classes, as Google's code does for a
thousand classes; with ten they are ten times as large, and the first logits with them. Trains the cells of `lite` on its ImageNet-like
dataset with the first seed and a head of zeros, nothing else changed; beside them stand `lite`'s own runs with that seed. Takes ten
minutes on one core.
"""
import json

import pandas as pd
from torch import nn

from xbench import paths, runs, settings
from xbench.backbones.core import create, register
from xbench.latency import device_name, versions

BACKBONES = ('efficientnet', 'fbnet', 'tinynet')


def zero_head(name):
    def make(num_classes):
        "A backbone whose first logits are all 0."
        model = create(name, num_classes)
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        return model
    make.__name__ = f'{name}_zero_head'
    register(family='own')(make)
    return make.__name__


def compared(name):
    s = settings.load()
    p = s.profiles['lite']
    tidy, curves = (pd.read_csv(paths.results('lite')/f'{f}.csv') for f in ('cross_dataset', 'curves'))
    here = f'backbone == "{name}" and dataset == "{p.proxy}" and seed == {p.seeds[0]}'
    theirs = tidy.query(f'{here} and split == "test"').set_index('metric').value
    ours = runs.execute(settings.resolve(s, 'lite', zero_head(name), p.proxy, p.seeds[0]))
    row = {'dataset': p.proxy, 'epochs': len(ours['history']), 'library': theirs['top1'], 'zeros': ours['metrics']['top1'],
           'zeros_low': ours['metrics']['top1_low'], 'zeros_high': ours['metrics']['top1_high'],
           'library_first_loss': curves.query(here).train_loss.iloc[0], 'zeros_first_loss': round(ours['history'][0]['train_loss'], 5),
           'run_id': ours['run_id']}
    print(name, row, flush=True)
    return row


if __name__ == '__main__':
    found = {name: compared(name) for name in BACKBONES} | {'device': device_name('cpu'), 'versions': versions()}
    with paths.whole(paths.root()/'benchmarks'/'results'/'heads.json') as part: part.write_text(json.dumps(found, indent=1) + '\n')
