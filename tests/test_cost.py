"""The cost pipeline in a copy of the checkout: up to date as committed, and after a change only what changed is measured again."""
import json

import pandas as pd
import pytest
import yaml
from conftest import ROOT, Checkout, called

from xbench import pipeline
from xbench.settings import load

FILE = 'pipelines/cost/dvc.yaml'


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """With what its stages `code`, `networks` and `nbcode` make, by their commands: DVC writes its long file anew for each of them."""
    checkout = Checkout(tmp_path_factory.mktemp('cost')/'x bench')
    stages = yaml.safe_load((ROOT/FILE).read_text())['stages']
    for name in ('code', 'nbcode'):
        items = stages[name]['foreach']
        for key, item in items.items() if isinstance(items, dict) else zip(items, items):
            made(checkout, stages[name]['do']['cmd'].replace('${key}', key).replace('${item}', item))
    made(checkout, stages['networks']['cmd'])
    return checkout


def made(checkout, command):
    program, words = command.split()[:3], command.split()[3:]
    assert program == ['python', '-m', 'xbench.pipeline']
    done = called(checkout.path, pipeline.main, *words)
    assert done.returncode == 0, done.stderr


def stale(checkout):
    """Stages that are not up to date, without the file that they stand in; that an output is right and in no cache matters to none."""
    said = json.loads(checkout.run('dvc', 'status', '--json', FILE).stdout or '{}')
    differs = lambda change: any(v != 'not in cache' for found in change.values() for v in found.values())
    return {s.split(':')[-1] for s, changes in said.items() if any(isinstance(c, str) or differs(c) for c in changes)}


def test_as_committed_nothing_has_to_run(checkout):
    assert stale(checkout) == set()
    assert checkout.run('git', 'status', '--porcelain').stdout == ''


def test_a_comment_makes_no_other_network(checkout):
    module, name = checkout.path/'xbench'/'backbones'/'mobileone.py', 'mobileone_s1'
    text = module.read_text()
    module.write_text('# a comment\n' + text)
    here = checkout.run('python', '-c', f'from xbench.pipeline import network; print(network("{name}"), end="")').stdout
    module.write_text(text)
    assert here == (checkout.path/'build'/'cost'/'networks'/f'{name}.txt').read_text()


@pytest.mark.slow
def test_a_changed_backbone_alone_is_measured_again(checkout):
    module = checkout.path/'xbench'/'backbones'/'mobileone.py'
    text = module.read_text()
    assert '(96, 192, 512, 1280)' in text
    module.write_text(text.replace('(96, 192, 512, 1280)', '(96, 192, 512, 1288)'))
    checkout.run('dvc', 'repro', '-q', '-s', f'{FILE}:networks')
    engines = load(ROOT/'params.yaml').cost.engines
    assert stale(checkout) == {'static@mobileone_s1', 'compiled@mobileone_s1', *(f'latency@mobileone_s1-{e}' for e in engines)}
    module.write_text(text)


@pytest.mark.parametrize('change, words', [
    ({'cost__backbones': ['strnet']}, ('params.yaml: cost.backbones', 'did you mean starnet')),
    ({'cost__probes': ['plain30_rellu']}, ('params.yaml: cost.probes', 'plain30_relu')),
    ({'cost__threads': 4096}, ('4096 threads on a machine of',)),
    ({'cost__engines': ['egaer']}, ('params.yaml: cost.engines',)),
])
def test_a_wrong_setting_is_named_before_anything_is_measured(checkout, change, words):
    checkout.settings(**change)
    done = called(checkout.path, pipeline.main, 'paper', 'cost')
    checkout.run('git', 'checkout', '-q', 'params.yaml')
    assert done.returncode == 2 and all(w in done.stderr for w in words) and len(done.stderr.splitlines()) == 1, done.stderr


def test_every_record_is_whole():
    settings = load(ROOT/'params.yaml').cost
    forms, clock = (pd.read_csv(ROOT/'results'/'cost'/f'{n}.csv') for n in ('forms', 'latency'))
    assert set(forms.backbone) == set(settings.backbones) and (forms.params >= forms.trainable).all()
    failed = clock[clock.reason.notna()]
    assert failed.empty, failed[['backbone', 'engine', 'reason']].to_string()
    each = clock.groupby(['backbone', 'engine', 'dtype', 'form']).batch.apply(list)
    assert all(b == settings.batches for b in each)
    wanted = {(b, *e.partition('-')[::2]) for b in settings.backbones for e in settings.engines}
    wanted |= {(b, 'compiled', '') for b in settings.compiled}
    assert {(b, e, d if d == 'int8' else '') for b, e, d, _ in each.index if b in settings.backbones} == wanted
    assert clock[['device', 'threads', 'layout', 'versions', 'date', 'n', 'p50_ms', 'p95_ms', 'min_ms', 'peak_mib']].notna().all(axis=None)
    assert (clock.min_ms <= clock.p50_ms).all() and (clock.p50_ms <= clock.p95_ms).all() and clock.n.between(10, 100).all()
