"""The published tables are what the paper prints, cell by cell, wherever its text is at hand."""
import re
from pathlib import Path

import pytest
from conftest import ROOT

from xbench import published

PAPERS = sorted((ROOT.parent/'shared'/'papers').glob('000_*.txt'))
FIRST = {1: 'Model\tParams', 2: 'Dataset\tDomain', 3: 'Model\tCIFAR-10', 4: 'Model\tG\tV', 5: 'Architecture Elements\t'}


def printed(number: int, text: str):
    """Rows of a table of the paper's text; a row label that goes on in the next line is joined."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(FIRST[number]))
    rows = []
    for line in lines[at:]:
        clean = re.sub(r'</?b>|\*\*', '', line)
        if rows and clean.strip() == 'Concatenation': rows[-1][0] += ' Concatenation'
        elif '\t' in clean: rows.append([c.strip() for c in clean.split('\t')])
        else: break
    return rows


@pytest.mark.skipif(not PAPERS, reason='the text of the paper is not at hand')
@pytest.mark.parametrize('number', FIRST)
def test_every_cell_is_as_printed(number):
    head, *rows = printed(number, Path(PAPERS[0]).read_text())
    said = {(row[0], column): value for row in rows for column, value in zip(head[1:], row[1:])}
    ours = published.cells('cross_dataset', number)
    assert dict(zip(zip(ours.printed_row, ours.printed_column), ours.printed)) == said
    assert len(ours) == len(said) == {1: 22, 2: 35, 3: 77, 4: 44, 5: 165}[number]


@pytest.mark.parametrize('number', FIRST)
def test_slugs_are_known_and_cells_unique(number):
    ours = published.cells('cross_dataset', number)
    assert not ours.duplicated(['row', 'column']).any() and (ours.source == f'Table {number}').all()
    assert ours.row.str.fullmatch('[a-z0-9_]+').all() and ours.column.str.fullmatch('[A-Za-z0-9_]+').all()
