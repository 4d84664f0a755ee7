"""The published runs of `lite`: whole, right, and enough for a fresh clone to draw every table and figure without an image."""
import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, Checkout

from xbench import published
from xbench.evaluate import intervals, metrics
from xbench.pipeline import ASIDE
from xbench.results import accuracy
from xbench.settings import load


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """A clone in which nothing is left of lite but its records; and what drawing it anew said."""
    made = Checkout(tmp_path_factory.mktemp('lite')/'x bench')
    for folder in ('results', 'paper'):
        for path in (made.path/folder/'lite').rglob('*.*'): path.unlink()
    return made, made.run('python', '-m', 'xbench.pipeline', 'paper', 'lite', '--stored').stderr


def alike(clone, profile):
    """Are all files of a profile's paper there, and its tables and results those in git?"""
    paths = [p.relative_to(ROOT) for p in (ROOT/'paper'/profile).rglob('*.*')]
    assert {p.suffix for p in paths} == {'.csv', '.md', '.tex', '.svg', '.png', '.ipynb'}
    assert sorted(paths) == sorted(p.relative_to(clone.path) for p in (clone.path/'paper'/profile).rglob('*.*'))
    for path in [*(p for p in paths if p.suffix == '.csv'), *(p.relative_to(ROOT) for p in (ROOT/'results'/profile).glob('*.csv'))]:
        ours, theirs = pd.read_csv(ROOT/path), pd.read_csv(clone.path/path)
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-6, obj=str(path))


def test_tables_and_figures_need_the_stored_records_alone(drawn):
    clone, said = drawn
    assert not list((clone.path/'packed').rglob('*.npy')) and ' train@' not in said and 'measured@table4' in said
    alike(clone, 'lite')


@pytest.mark.slow
@pytest.mark.parametrize('profile', ASIDE)
def test_so_do_those_beside_it(drawn, profile):
    clone = drawn[0]
    for path in (clone.path/'paper'/profile).rglob('*.*'): path.unlink()
    said = clone.run('python', '-m', 'xbench.pipeline', 'paper', profile, '--stored').stderr
    assert ' train@' not in said and 'study' in said
    alike(clone, profile)


@pytest.mark.parametrize('step', [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_recorded_metric_follows_from_the_saved_predictions(drawn, step):
    """Intervals of every run are left to `make test-all`."""
    p, cells = load(ROOT/'params.yaml').profiles['lite'], drawn[0].path/'results'/'lite'/'cells'
    tidy = pd.read_csv(ROOT/'results'/'lite'/'cross_dataset.csv')
    top1 = tidy[(tidy.split == 'test') & (tidy.metric == 'top1')].set_index('run_id').value
    assert len(top1) == len(p.backbones)*len(p.datasets)*len(p.seeds) == len(list(cells.iterdir()))
    for k, file in enumerate(sorted(cells.glob('*/metrics.json'))):
        recorded, kept = json.loads(file.read_text()), dict(np.load(file.with_name('predictions.npz')))
        again = metrics(kept)
        if k % step == 0: again |= dict(zip(('top1_low', 'top1_high'), intervals(kept)['top1']))
        assert again == {k: recorded[k] for k in again}, file.parent.name
        assert top1[recorded['run_id']] == again['top1'], file.parent.name


def test_own_backbones_are_placed_among_these_very_runs():
    tidy = pd.read_csv(ROOT/'results'/'lite'/'cross_dataset.csv')
    pool, rows = published.pool('lite'), published.pooled('lite')
    pd.testing.assert_frame_equal(pool, accuracy(tidy), check_names=False, check_like=True, atol=1e-4)
    assert set(' '.join(rows.runs).split()) == set(tidy.run_id)


def test_a_profile_without_stored_runs_says_so(drawn):
    clone = drawn[0]
    for profile, word in (('full', 'make paper PROFILE=full'), ('ful', 'did you mean full')):
        done = clone.run('python', '-m', 'xbench.pipeline', 'paper', profile, '--stored', code=2)
        assert word in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
