"""The audit covers every published figure, reaches what is known of them, and notices a figure that changes."""
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from test_published import TEXTS

from xbench import audit, paths, published
from xbench.audit import DIFFERS, MATCH, UNTESTED
from xbench.pipeline import kind, waves
from xbench.xscore import anchors, search, xscore

PROFILE = 'lite'


@pytest.fixture(scope='module')
def audited():
    return audit.audit(PROFILE)


@pytest.fixture(scope='module')
def known():
    return audit.Known(PROFILE)


def verdict(audited, paper, table, column):
    own = audited[(audited.paper == paper) & (audited.table == str(table)) & (audited.column == column)]
    return own.set_index('row').verdict


def test_every_cell_has_a_row(audited):
    for paper, number in published.tables():
        three, own = ['row', 'column', 'printed'], audited[(audited.paper == paper) & (audited.table == str(number))]
        assert own[three].to_numpy().tolist() == published.cells(paper, number)[three].to_numpy().tolist()
    five = audited[(audited.paper == 'cross_dataset') & (audited.table != 'text')]
    assert len(five) == 22 + 35 + 77 + 44 + 165
    tested = audited.verdict != UNTESTED
    assert (audited.how != '').all() and audited.recomputed[tested].notna().all() and audited.recomputed[~tested].isna().all()


def test_the_file_is_what_the_code_gives(audited):
    kept = pd.read_csv(paths.results('audit')/'audit.csv', dtype=str, keep_default_na=False)
    assert kept.verdict.tolist() == audited.verdict.tolist() and kept.printed.tolist() == audited.printed.tolist()


@pytest.mark.parametrize('paper', list(audit.STATED))
def test_stated_figures_stand_in_the_text(paper):
    if not TEXTS[paper]: pytest.skip('the text of the paper is not at hand')
    text = re.sub(r'[\s$\\{}]', '', TEXTS[paper].read_text().replace('{,}', ','))
    said = {'protocol_place', 'off_the_line', 'without_relu', 'with_residual', 'with_pooling', 'most_accurate', 'fastest_squeezenet',
            'fastest_resnet', 'fewest_operations', 'best_pretrained', 'least_classes', 'table9_fvcore', 's0_robust', 's1_renditions'}
    for s in audit.statements(paper).itertuples():    # those of `said` are said in words
        assert s.row in said or re.search(re.escape(s.printed).replace(',', ',?'), text), f'{s.row}: {s.printed}'


def test_table_4_follows_for_nine_backbones(audited):
    for column in ('G', 'V', 'xscore7'):
        v = verdict(audited, 'cross_dataset', 4, column)
        assert set(v.index[v == DIFFERS]) == {'convmixer', 'mobilevit'} and (v == MATCH).sum() == 9
    accuracy, printed = published.table('cross_dataset', 3), published.table('cross_dataset', 4)
    assert xscore(accuracy).loc[['convmixer', 'mobilevit']].round(3).to_numpy().tolist() == [[.866, .014, .859], [.765, .061, .735]]
    for b in ('convmixer', 'mobilevit'):
        slips = audit.one_slip(accuracy, b, printed.G[b], printed.V[b], .0013)
        assert (abs(slips.V - printed.V[b])[slips.reached] > .00065).all()
    assert abs(slips.instead['miniplaces'] - 57.9) < .1 and round(slips.V['miniplaces'], 3) == .034


def test_the_four_dataset_column_is_of_no_subset(audited):
    accuracy, printed = published.table('cross_dataset', 3), published.table('cross_dataset', 4)
    own = audited[(audited.table == '4') & (audited.column == 'xscore4')].set_index('row')
    assert own.difference.abs().idxmax() == 'tinynet' and round(own.difference.abs().max(), 3) == .199
    every = search(accuracy)
    off = [abs(xscore(accuracy[list(d)], .5, anchors(accuracy)).xscore[printed.index] - printed.xscore4).max() for d in every.datasets]
    assert len(every) == 120 and min(off) > .05
    fours = every[every['size'] == 4]
    best = fours[abs(fours.spearman - fours.spearman.max()) < 1e-9]
    assert round(best.spearman.iloc[0], 4) == .9818 and {frozenset(d) for d in best.datasets} == {
        frozenset(audit.PROTOCOL), frozenset(('cifar10', 'ham10000', 'stanford_dogs', 'indoor67'))}
    assert set(fours.datasets[fours.mse.idxmin()]) == {'cifar10', 'stanford_dogs', 'miniplaces', 'indoor67'}


def test_accuracies_and_numbers_of_images(audited):
    own = audited[(audited.paper == 'cross_dataset') & (audited.table == '3')]
    broken = own[own.verdict == DIFFERS].groupby('column').row.apply(set)
    assert broken['indoor67'] == {'convmixer', 'mobilevit'} and len(broken['ham10000']) == 11 and broken['stanford_dogs'] == {'starnet'}
    assert (verdict(audited, 'cross_dataset', 3, 'imagenette160') == MATCH).all()
    assert (verdict(audited, 'cross_dataset', 3, 'cifar10') == UNTESTED).all()
    possible = audit.sizes(published.table('cross_dataset', 3).ham10000, 2700, 3300)
    assert [*possible.index[possible == 11]] == [3006]


def test_table_1(audited, known):
    flops = audited[(audited.paper == 'cross_dataset') & (audited.column == 'flops_m')].set_index('row')
    off = (flops.difference/flops.recomputed.astype(float)).abs()
    assert off.idxmax() == 'mobilenet' and off['mobilenet'] > .19 and off.drop('mobilenet').max() < .0015
    assert set(flops.index[flops.verdict == DIFFERS]) == {'convmixer', 'mobilenet'}
    assert flops.printed['mobilenet'] == flops.printed['tinynet']
    params = audited[(audited.paper == 'cross_dataset') & (audited.column == 'params_m')].set_index('row').recomputed.astype(float)
    assert round(params['mobilevit'], 2) == 4.69
    left = {what: params['mobilevit'] - known.count('mobilevit', what, 10)/1e6 for what in ('encoder', 'qkv')}
    assert abs(left['encoder'] - 2.82) < .02 and left['qkv'] > 3.9
    assert round(params['fbnet'] - known.count('fbnet', 'norm', 10)/1e6, 2) == 3.66


def test_memory_constrained(audited, known):
    own = audited[audited.paper == 'memory_constrained']
    sizes = own[own.column == 'size_mb']
    wrong = {(r.table, r.row) for r in sizes[sizes.verdict == DIFFERS].itertuples()}
    assert wrong == {(t, b) for t in ('1', '3') for b in ('mobilenet_v3_small', 'efficientnet_v2_s')} and len(sizes) == 15
    gflops = own[own.column == 'gflops']
    assert set(gflops[gflops.verdict == DIFFERS].row) == set(audit.OTHERS) and (gflops.verdict == MATCH).sum() == 9
    for r in gflops.itertuples():
        dataset, side = audit.SETS[int(r.table)]
        classes = {'cifar10': 10, 'cifar100': 100, 'tiny_imagenet': 200}[dataset]
        assert abs(known.count(audit.OTHERS.get(r.row, r.row), 'macs', classes, side)/1e9 - float(r.printed)) <= .005
        assert abs(known.count(r.row, 'macs', classes, 224)/1e9 - float(r.printed)) > .005
    gains = own[own.column == 'accuracy_difference']
    assert gains.recomputed.astype(float).round(2).tolist() == [3.22, 4.61, 7.9] and (gains.verdict == MATCH).all()
    assert own[own.row == 'compared_network'].recomputed.tolist() == ['MobileNetV3']


def test_which_backbone(audited):
    own = audited[(audited.paper == 'which_backbone') & (audited.verdict == DIFFERS)].set_index('row')
    assert round(own.recomputed['resnet50'], 2) == 80.86
    breakhis = own[own.index.str.startswith('breakhis') & (own.column == 'train')]
    assert breakhis.difference.tolist() == [-9]*4 and own.recomputed['total_breakhis'] == 7945
    assert own.at['rsna_pneumonia', 'difference'] == -3543
    assert own.recomputed['figure2_1pct'] == 1000 and 'figure1_1pct' not in own.index


def test_mobileone(audited):
    own = audited[audited.paper == 'mobileone']
    seven = own[(own.table == '7') & (own.verdict == DIFFERS)]
    assert list(seven[['row', 'column', 'recomputed']].itertuples(index=False, name=None)) == [('stage1', 'channels', 'min(64, 64 × α)')]
    one, nine = published.table('mobileone', 1), published.table('mobileone', 9)
    assert [n for n, misfit in audit.pairs(one).items() if misfit <= 1] == [21, 22]
    sets = audit.families(nine, one[['flops_rho', 'params_rho']].to_numpy().ravel())
    columns = ['mobile_flops', 'mobile_params', 'cpu_flops', 'cpu_params']
    whole, plain = (sets[sets.left_out == left][columns].iloc[0].round(2).tolist() for left in ('', 'mobileone repvgg'))
    assert whole == [.38, .31, .43, .47] and plain == [.40, .31, .06, .11]
    assert sets.off.min() > .01, 'no set of families gives the four printed correlations'


@pytest.mark.parametrize(('file', 'old', 'new', 'cell'), [
    ('cross_dataset_table4.csv', ',G,0.964,', ',G,0.946,', ('4', 'efficientnet', 'G')),
    ('cross_dataset_table2.csv', ',"9,469",', ',"9,649",', ('2', 'imagenette160', 'train')),
    ('cross_dataset_table3.csv', ',89.25,', ',89.26,', ('3', 'convmixer', 'imagenette160')),
    ('memory_constrained_table4.csv', ',0.0748,', ',0.0784,', ('4', 'tinyimagenet', 'f1_difference')),
    ('mobileone_table10.csv', 'Baseline,77.4,', 'Baseline,77.5,', ('10', 'mobileone_s2', 'top1')),
    ('mobileone_table7.csv', '"(3.5, 1, SE-ReLU)"', '"(3.0, 1, SE-ReLU)"', ('7', 'stage5', 's4')),
    ('mobileone_table1.csv', ',0.18,', ',0.08,', ('1', 'mobile', 'params_p')),
    ('which_backbone_text.csv', '"20,580"', '"20,850"', ('text', 'total_stanford_dogs', 'stated')),
])
def test_an_altered_figure_is_noticed(audited, tmp_path, monkeypatch, file, old, new, cell):
    for f in published.FOLDER.glob('*.csv'): shutil.copy(f, tmp_path)
    text = (tmp_path/file).read_text()
    assert text.count(old) >= 1
    (tmp_path/file).write_text(text.replace(old, new, 1))
    monkeypatch.setattr(published, 'FOLDER', tmp_path)
    paper, known = file.rsplit('_', 1)[0], audit.Known(PROFILE)
    now = audit.audit_text(paper, known) if cell[0] == 'text' else audit.audit_table(paper, int(cell[0]), known)
    before = audited[(audited.paper == paper) & (audited.table == cell[0])].set_index(['row', 'column']).verdict
    assert before[cell[1:]] == MATCH and now.set_index(['row', 'column']).verdict[cell[1:]] == DIFFERS


def test_tolerances_come_from_the_print(audited):
    counted = audited[(audited.basis == 'count') & (audited.column == 'params_m') & audited.tolerance.notna()]
    assert set(counted.tolerance.round(6)) <= {.05, .005} and len(counted) > 60
    four = audited[(audited.paper == 'cross_dataset') & (audited.table == '4')]
    assert (four.tolerance > .0005).all() and four.tolerance.max() < .0025 and np.isfinite(four.tolerance.astype(float)).all()


def test_every_stage_of_the_pipeline_has_its_wave():
    stages = yaml.safe_load((ROOT/'pipelines/audit/dvc.yaml').read_text())['stages']
    placed = [s for wave in waves(list(stages)) for s in wave]
    assert sorted(placed) == sorted(stages) and [kind(s) for s in placed][-2:] == ['audit', 'study']
