"""Properties of xScore that must hold for any table."""
import numpy as np
import pandas as pd
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from xbench.xscore import anchors, normalise, xscore

TABLES = arrays(float, array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=8), elements=st.integers(200, 10_000).map(lambda v: v/100))


def named(values):
    table = pd.DataFrame(values, [f'b{i}' for i in range(len(values))], [f'd{j}' for j in range(values.shape[1])])
    assume((table.max() > table.min()).all())
    return table


def by_hand(table, lam):
    """Eq. 1 to 3, one cell after another."""
    out = {}
    for b in table.index:
        norm = [(table.at[b, d] - min(table[d]))/(max(table[d]) - min(table[d])) for d in table]
        g = sum(norm)/len(norm)
        out[b] = g - lam*sum((a - g)**2 for a in norm)/(len(norm) - 1)
    return pd.Series(out)


@settings(deadline=None)
@given(TABLES, st.floats(0, 1))
def test_it_is_the_papers_formula(values, lam):
    table = named(values)
    np.testing.assert_allclose(xscore(table, lam).xscore, by_hand(table, lam), atol=1e-9)


@settings(deadline=None)
@given(TABLES, st.randoms())
def test_order_does_not_matter(values, random):
    table = named(values)
    rows, columns = list(table.index), list(table)
    random.shuffle(rows), random.shuffle(columns)
    np.testing.assert_allclose(xscore(table.loc[rows, columns]).xscore.loc[table.index], xscore(table).xscore, atol=1e-9)


@settings(deadline=None)
@given(TABLES, st.integers(200, 10_000))
def test_fixed_anchors_keep_everybody_in_place(values, new):
    table = named(values)
    more = pd.concat([table, pd.DataFrame(new/100, ['new'], table.columns)])
    pd.testing.assert_frame_equal(xscore(more, fixed=anchors(table)).loc[table.index], xscore(table))


@settings(deadline=None)
@given(TABLES)
def test_scores_stay_in_their_range(values):
    table = named(values)
    norm, scores = normalise(table), xscore(table)
    assert norm.min().eq(0).all() and norm.max().eq(1).all()
    assert scores.G.between(0, 1).all() and (scores.V >= 0).all() and (scores.xscore <= scores.G).all()
