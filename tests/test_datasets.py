"""`xbench data` as a user calls it, and the findings that are kept in git."""
import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, Checkout, called
from PIL import Image

from xbench import cli, paths
from xbench.pack import checksum
from xbench.settings import load

CHECKED = load(ROOT/'params.yaml').data.checked


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp('data')/'x bench')


@pytest.fixture
def xbench(checkout):
    """A command that must end with a code."""
    env = {'XBENCH_DATASETS': (ROOT/'..'/'shared'/'datasets').resolve(), 'XBENCH_DATA': checkout.path.parent/'datasets'}

    def run(*argv, code=0):
        done = called(checkout.path, cli.main, *argv, **env)
        assert done.returncode == code, done.stderr
        return done
    return run


def images(root, classes=('dark', 'bright'), n=12):
    rng = np.random.default_rng(0)
    for k, c in enumerate(classes):
        (root/c).mkdir(parents=True)
        for i in range(n): Image.fromarray(rng.integers(90*k, 90*k + 120, (40, 48, 3), np.uint8)).save(root/c/f'{i}.png')
    return root


def test_added_listed_shown_checked_and_trained_on_by_name(checkout, xbench, tmp_path):
    root = images(tmp_path/'My birds')
    said = xbench('data', 'add', root, '--name', 'mybirds', '--licence', 'mine').stdout
    assert '24 images in 2 classes' in said and 'xbench train starnet mybirds' in said
    assert 'mybirds' in xbench('data', 'list').stdout
    shown = json.loads(xbench('data', 'show', 'mybirds').stdout)
    assert shown['licence'] == 'mine' and shown['native_size'] == [48, 40] and shown['found'] == {'train': 20, 'test': 4}
    assert 'there is a dataset of this name' in xbench('data', 'add', root, '--name', 'mybirds', code=2).stderr
    row = json.loads(xbench('train', 'mobilenet', 'mybirds', '--out', tmp_path/'record', '--format', 'json').stdout)[0]
    record = json.loads((tmp_path/'record'/'runs'/'mobilenet-mybirds-s0'/'run.json').read_text())['data']
    assert row['n'] == 4 and record['split'].startswith('made') and (record['train'], record['val'], record['test']) == (18, 2, 4)
    ids = checkout.path/record['ids']
    assert record['ids_sha256'] == checksum(ids) and ids.read_text().startswith('split,label,name,group,sha256\n')


def test_findings_exit_0_and_unreadable_images_exit_1(xbench, tmp_path):
    root = images(tmp_path/'birds')
    (root/'dark'/'copy.png').write_bytes((root/'bright'/'0.png').read_bytes())
    said = xbench('data', 'check', root, '--out', tmp_path/'report').stdout
    assert '2 images in 1 sets' in said and '1 in more than one class' in said and (tmp_path/'report'/'birds.png').is_file()
    (root/'dark'/'bad.png').write_bytes(b'no image')
    assert 'dark/bad.png cannot be read' in xbench('data', 'check', root, code=1).stdout


@pytest.mark.parametrize('slug', CHECKED)
def test_findings_in_git_are_whole(slug):
    found = json.loads((ROOT/'results'/'data'/f'{slug}.json').read_text())
    assert not found['unreadable'] and found['counts']['all'] == sum(n for k, n in found['counts'].items() if k != 'all')
    assert all(found['counts'][k] == n for k, n in found['expected'].items()), 'the card expects other counts'
    pairs = pd.read_csv(ROOT/'results'/'data'/'pairs'/f'{slug}.csv')
    both = lambda s: ((pairs.split_a == s) & (pairs.split_b == s)).sum()
    across = (pairs.split_a != pairs.split_b).sum()
    assert 0 <= found['near'].pop('recoloured') <= len(pairs)
    assert found['near'] == {'within_train': both('train'), 'within_test': both('test'), 'across_splits': across}


@pytest.mark.parametrize('slug', ['dogs6', 'pneumoniamnist'])
def test_findings_are_found_again(slug, xbench, tmp_path):
    try: paths.source(CHECKED[slug])
    except ValueError: pytest.skip('the dataset is not on this machine')
    xbench('data', 'check', slug, '--out', tmp_path)
    assert json.loads((tmp_path/f'{slug}.json').read_text()) == json.loads((ROOT/'results'/'data'/f'{slug}.json').read_text())
    assert (tmp_path/f'{slug}.csv').read_text() == (ROOT/'results'/'data'/'pairs'/f'{slug}.csv').read_text()
