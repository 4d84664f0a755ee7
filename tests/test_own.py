"""A backbone of your own, as a new user scores it; and what is said of one that cannot be trained, before anything is."""
import io
import json
import re

import pandas as pd
import pytest
from conftest import Checkout, called, inside

from xbench import cli, own, published, runs, settings

NET = '''from torch import nn
def MyNet(num_classes):
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))
'''
CLASS = '''import torch
from torch import nn
class MyNet(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        {init}
    def forward(self, x):
        return {out}
'''
HEAD = 'self.head = nn.Linear(3, num_classes)'


def net(out='self.head(x.mean((2, 3)))', init=HEAD): return CLASS.format(init=init, out=out)


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A project of two small datasets, and a folder beside it for what a user writes."""
    checkout = Checkout(tmp_path_factory.mktemp('own')/'x bench')
    checkout.settings(demo__images={'size': 32, 'train': 64, 'test': 48}, demo__protocol=['digits', 'tissue'],
                      demo__train={'epochs': 2, 'warmup_epochs': 1, 'batch': 16})
    return checkout


@pytest.fixture
def refused(project):
    """`xbench score` of what must be refused."""
    begun = lambda: {p for folder in ('work', 'packed') for p in (project.path/folder).rglob('*')}
    before = begun()

    def refuse(*words, target='net.py:MyNet', options=()):
        done = called(project.path, cli.main, 'score', target, *options)
        lines = done.stderr.splitlines()
        assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith('xbench: ') and all(w in lines[0] for w in words), lines
        assert not done.stdout and begun() == before, 'something was begun'
    return refuse


@pytest.mark.parametrize('text, words', [
    ('import no_such_thing\n', ('net.py does not import', "No module named 'no_such_thing'")),
    ('def MyNet(:\n', ('net.py does not import', 'SyntaxError')),
    ('def MyNett(n): pass\n', ("unknown class or function 'MyNet'", 'did you mean MyNett')),
    (net('self.head(x)'), ('32 x 32 px', 'images of this size')),
    (net('self.head(x.flatten(1))', 'self.head = nn.Linear(3*224*224, num_classes)'), ('32 x 32 px', 'images of this size')),
    (net('(self.head(x.mean((2, 3))), x)'), ('returns a tuple', 'the logits alone')),
    (net(init='self.head = nn.Linear(3, 1000)'), ('(3, 1000)', 'for 7 classes', 'last layer')),
    (net(init='self.head = nn.Linear(3, 7)'), ('(3, 7)', 'for 10 classes', 'last layer')),
    (net('x.mean((2, 3)).repeat(1, 4)[:, :self.n]', 'self.n = num_classes'), ('no parameters that need a gradient',)),
    (net('self.head(x.mean((2, 3)))*float("nan")'), ('NaN or infinity',)),
], ids=['import', 'syntax', 'name', 'size', 'other size', 'tuple', 'fixed classes', 'fixed at seven', 'no parameters', 'nan'])
def test_a_backbone_that_cannot_be_trained_is_refused_before_training(project, refused, text, words):
    (project.path/'net.py').write_text(text)
    refused(*words)


@pytest.mark.parametrize('target, options, words', [
    ('nowhere.py:MyNet', (), ('nowhere.py', 'no such file')),
    ('nowhere.net:MyNet', (), ("no module 'nowhere'", 'net.py:MyNet')),
    ('net.py:', (), ('MODULE:CLASS',)),
    ('net.py:MyNet', ('--profile', 'dmo'), ("'dmo'", 'did you mean demo')),
    ('net.py:MyNet', ('--seeds', '0'), ('--seeds 0',)),
    ('net.py', (), ('MODULE:CLASS',)),
    ('my.net', (), ('my.net', 'no such file', 'MODULE:CLASS')),
    ('net.py:MyNet', ('--profile', 'lite'), ('imagenette64.tar.xz', 'no such file', 'XBENCH_DATASETS')),
])
def test_a_wrong_command_is_one_line(project, refused, monkeypatch, target, options, words):
    monkeypatch.delenv('XBENCH_DATASETS', raising=False)
    (project.path/'net.py').write_text(NET)
    refused(*words, target=target, options=options)


@pytest.mark.parametrize('text, words', [
    ('b,imagenette160,cifar100\nmine,80,70\n', ("'ham10000'", 'missing')),
    ('b,imagenette160,cifar100,ham10000,stanford_dogs\nmine,80,70,75,\n', ("'mine'", "'stanford_dogs'", 'missing')),
    ('b,imagenette160,cifar100,ham10000,stanford_dogs\nmine,80,70,75,50\nmine,80,70,75,51\n', ("'mine'", 'twice')),
    ('b,imagenette160,cifar100,ham10000,stanford_dogs\nmine,.8,.7,.75,.5\n', ("'mine'", "'imagenette160'", 'give percent')),
    ('b,imagenette160,cifar100,ham10000,stanford_dogs\na,80,.7,75,50\nmine,81,.7,75,50\n', ("'a'", "'cifar100'", 'give percent')),
    ('b,imagenette160,cifar100,ham10000,stanford_dogs\na,80,70,75,50\nmine,.8,.7,.75,.5\n', ("'mine'", "'imagenette160'", 'give percent')),
    ('b,imagenette160,cifar100,ham10000,stanford_dogs\na,80,70,75,50\nmine,80,70,75,.5\n', ("'mine'", "'stanford_dogs'", '.5%')),
], ids=['column', 'cell', 'twice', 'all fractions', 'fractions in a column', 'fractions in a row', 'a fraction in a cell'])
def test_bad_accuracies_are_one_line(project, refused, text, words):
    (project.path/'mine.csv').write_text(text)
    refused('mine.csv', *words, target='mine.csv', options=('--protocol', '4'))


def test_five_lines_become_a_score_and_a_report_card(project):
    """A second call finds every run finished, for a comment changes nothing; an edited network is another one."""
    (project.path/'net.py').write_text(NET)
    done = called(project.path, cli.main, 'score', 'net.py:MyNet', '--format', 'json')
    rows = {r['measure']: r for r in json.loads(done.stdout)}
    assert rows['xscore']['low'] <= rows['xscore']['value'] <= rows['xscore']['high'] and 'no evidence' in rows['xscore']['remark']
    assert 1 <= rows['place']['low'] <= rows['place']['value'] <= rows['place']['high'] <= 12
    assert rows['params_m']['value'] == pytest.approx((16*27 + 16 + 32 + 32*16*9 + 32 + 64 + 33*(10 + 3)/2)/1e6)
    assert rows['eager_ms']['value'] > 0 and rows['onnxruntime_ms']['value'] > 0 and rows['macs_m']['value'] > 0
    assert 'other settings' in done.stderr, 'a pool of other images was taken for this one'
    folder = next((project.path/'work'/'score').iterdir())
    page = (folder/'card.html').read_text()
    assert (folder/'card.png').stat().st_size > 20_000 and 'MyNet' in page and 'data:image/png' in page
    assert not re.search(r'<script|(src|href)="http|url\(http', page), 'the page asks the network for something'
    assert pd.read_csv(folder/'score.csv').measure.tolist() == list(rows)

    (project.path/'net.py').write_text(NET + '# a comment\n')
    with inside(project.path):
        again, cells, _ = own.planned('net.py:MyNet', settings.load(), 'demo')
        assert len(cells) == 2 and all('finished' in runs.execute(c, progress=False) for c in cells)
        (project.path/'net.py').write_text(NET.replace('nn.ReLU(), nn.Conv2d', 'nn.GELU(), nn.Conv2d'))
        assert own.load('net.py:MyNet').slug != again.slug == folder.name.removesuffix('-demo')


def test_the_pool_stays_where_it_is(project):
    """Accuracies of the pool itself, under other names, get the pool's scores."""
    published.pool('demo').set_axis([f'mine{i}' for i in range(11)]).to_csv(project.path/'mine.csv')
    table = pd.read_csv(io.StringIO(called(project.path, cli.main, 'score', 'mine.csv', '--profile', 'demo', '--format', 'csv').stdout))
    assert len(table) == 22 and (table.groupby('xscore').published.agg(['sum', 'size']).to_numpy() == (1, 2)).all()
