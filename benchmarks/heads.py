"""What the first weights of a head cost on a short schedule: EfficientNet, FBNet and TinyNet begun as their libraries do and with zeros.

    python benchmarks/heads.py

torchvision (EfficientNet) and timm (FBNet, TinyNet) draw the weights of the last layer from ±1/√classes, as Google's code does for a
thousand classes; with ten they are ten times as large, and the first logits with them. Scores the three with a head of zeros and nothing
else changed on all datasets of `lite`, as `xbench score --profile lite --protocol 7` does, one seed, and puts them in the place of
`lite`'s own. Takes 21 runs, half an hour on two cores; it goes on where it was stopped.
"""
import json

import pandas as pd
from torch import nn

from xbench import own, paths, published, results, runs, settings
from xbench.backbones.core import create
from xbench.latency import device_name, versions
from xbench.stats import spearman
from xbench.xscore import xscore

BACKBONES, PROFILE = ('efficientnet', 'fbnet', 'tinynet'), 'lite'


def zeroed(name, num_classes):
    "A backbone whose first logits are all 0."
    model = create(name, num_classes)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    return model


def efficientnet(num_classes): return zeroed('efficientnet', num_classes)
def fbnet(num_classes): return zeroed('fbnet', num_classes)
def tinynet(num_classes): return zeroed('tinynet', num_classes)


def compared(name, known, scores):
    "A backbone of `lite` and the same with a head of zeros."
    table, folder = own.score(f'{__file__}:{name}', PROFILE, 7, progress=False)
    slug, found = json.loads((folder/'own.json').read_text())['slug'], table.set_index('measure')
    p, tidy = known.profiles[PROFILE], results.read(PROFILE)
    made = {d: runs.execute(settings.resolve(known, PROFILE, slug, d, 0), progress=False) for d in p.datasets}    # trained by now
    curves = results.read(PROFILE, 'curves').query('backbone == @name and seed == 0').sort_values('epoch')
    first = curves.groupby('dataset').train_loss.first()
    return {'epochs': int(tidy.epochs.max()),
            'library_xscore': scores[name], **{f'zeros_{k}': v for k, v in zip(('xscore', 'low', 'high'), found.loc['xscore'])},
            'datasets': {d: {'library': published.pool(PROFILE).at[name, d], 'zeros': found.at[f'top1 {d}', 'value'],
                             'library_first_loss': first[d], 'zeros_first_loss': made[d]['history'][0]['train_loss'],
                             'run_id': made[d]['run_id']} for d in p.datasets}}


def main():
    known = settings.load()
    p, pool, fixed = known.profiles[PROFILE], published.pool(PROFILE), published.anchors(PROFILE)
    scores = xscore(pool, p.lam, fixed).xscore
    found = {name: compared(name, known, scores) for name in BACKBONES}
    changed, printed = pool.copy(), published.table('cross_dataset', 4).xscore7
    for name, row in found.items(): changed.loc[name] = pd.Series({d: v['zeros'] for d, v in row['datasets'].items()})
    orders = {}
    for how, acc in (('library', pool), ('zeros', changed)):
        now = xscore(acc, p.lam, fixed).xscore
        orders[how] = {'place': now.rank(ascending=False).astype(int).to_dict(), 'paper': float(spearman(now, printed[now.index])),
                       **{d: float(spearman(acc[p.proxy], acc[d])) for d in p.datasets if d != p.proxy}}
    record = {'backbones': found, 'orders': orders, 'device': device_name('cpu'), 'versions': versions()}
    with paths.whole(paths.root()/'benchmarks'/'results'/'heads.json') as part: part.write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__': main()
