"""The published tables are what the papers print, cell by cell, wherever their text is at hand."""
import re

import pytest
from conftest import ROOT

from xbench import published

TEXTS = {paper: next((ROOT.parent/'shared'/'papers').glob(f'{i:03}_*.txt'), None)
         for i, paper in enumerate(('cross_dataset', 'memory_constrained', 'which_backbone', 'mobileone'))}
SHAPES = {  # rows and cells of each table, in the order of their numbers
    'cross_dataset': [(11, 22), (7, 35), (11, 77), (11, 44), (15, 165)],
    'memory_constrained': [(5, 25), (5, 25), (5, 25), (3, 18)],
    'which_backbone': [(3, 24), (11, 22), (20, 80), (11, 88), (11, 77), (11, 55), (11, 66), (11, 66), (9, 90)],
    'mobileone': [(2, 8), (7, 7), (3, 3), (13, 26), (2, 6), (2, 10), (8, 80), (4, 4), (30, 180), (10, 40), (14, 31), (11, 66), (8, 32)]}
TABLES = [(paper, number, *shape) for paper, shapes in SHAPES.items() for number, shape in enumerate(shapes, 1)]
SIGNS = {'times': '×', 'alpha': 'α', 'mu ': 'μ', 'uparrow': '↑', 'downarrow': '↓'}


def clean(text: str):
    """A label or a cell without markup and citation numbers."""
    text = re.sub(r'<[^>]+>|\*\*|\$| \[\d+\]|\\text|[{}]', '', text)
    text = re.sub(r'\\(times|alpha|mu |uparrow|downarrow)', lambda m: SIGNS[m[1]], text)
    return re.sub(r'(?<=\() | (?=\))', '', text).strip()


def printed(paper: str, number: int):
    """Filled cells of a table of the paper's text by their two labels, in any order: mobileone prints two tables on their side."""
    found = re.search(rf'((?:.+\n)+)\n(?:\([ab]\)\n\n)*(?:<.*>)?Table {number}[.:]', TEXTS[paper].read_text())
    head, rows = [], []
    for line in found[1].splitlines() if found else []:
        first, *rest = map(clean, line.split('\t'))
        if rows and first == 'Concatenation': rows[-1][0] += ' Concatenation'  # a label that goes on in the next line
        elif rest and not head: head = rest
        elif rest and not first:  # a second line of the head: a label above it holds until the next
            above = ''
            for i, label in enumerate(rest):
                above = head[i] or above
                if label: head[i] = f'{above} {label}'
        elif rest: rows.append([first, *rest])
    return {frozenset((row[0], label)): value for row in rows for label, value in zip(head, row[1:]) if value}


@pytest.mark.parametrize(('paper', 'number', 'rows', 'cells'), TABLES)
def test_every_cell_is_as_printed(paper, number, rows, cells):
    if not TEXTS[paper]: pytest.skip('the text of the paper is not at hand')
    ours, said = published.cells(paper, number), printed(paper, number)
    ours = ours[(ours.printed != '') & (ours.source == f'Table {number}')]  # the others come from elsewhere
    assert dict(zip(map(frozenset, zip(ours.printed_row, ours.printed_column)), ours.printed)) == said
    assert len(ours) == len(said) == (0 if paper == 'which_backbone' else cells)  # the text of which_backbone has lost its tables


@pytest.mark.parametrize(('paper', 'number', 'rows', 'cells'), TABLES)
def test_shapes_and_slugs(paper, number, rows, cells):
    ours = published.cells(paper, number)
    assert list(ours) == ['row', 'column', 'printed_row', 'printed_column', 'printed', 'note', 'source']
    assert (ours.row.nunique(), len(ours)) == (rows, cells) and not ours.duplicated(['row', 'column']).any()
    assert ours.row.str.fullmatch('[a-z0-9_]+').all() and ours.column.str.fullmatch('[a-z0-9_]+|[GV]').all()
    assert (ours[['printed_row', 'printed_column']] != '').all(axis=None) and (ours.note[ours.printed == ''] != '').all()
    assert ours.source.str.fullmatch(f'Table {number}(; .+)?').all()


def test_every_table_is_there():
    assert published.tables() == sorted((paper, number) for paper, number, *_ in TABLES)
