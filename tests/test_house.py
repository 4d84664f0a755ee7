"""The house is in order: notebooks, package, README and pipelines are in step."""
import ast
import importlib
import inspect
import json
import pkgutil
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

import xbench
from xbench import paths, pipeline
from xbench.code import modules
from xbench.settings import load

MODULES = sorted(m.name for m in pkgutil.walk_packages(xbench.__path__, 'xbench.') if not m.name.endswith('._modidx'))
# what each line of the design may import: lines above it, never below
LINES = [['errors', 'paths', 'locks', 'testing', 'warm', 'code'], ['cells', 'stats', 'xscore'], ['settings', 'published'],
         ['backbones', 'elements', 'cost', 'latency', 'export'],
         ['files', 'cards', 'splits', 'sources', 'fetch', 'pack', 'data', 'augment', 'corrupt', 'check', 'datasets'],
         ['recipes', 'checkpoint', 'train', 'evaluate', 'reliability'],
         ['baseline', 'runs', 'plan', 'results', 'figures', 'score', 'audit', 'records', 'own', 'recommend',
          'trained'], ['pipeline', 'cli']]
LEVEL = {name: i for i, line in enumerate(LINES) for name in line}


def notebooks():
    return sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


@pytest.mark.parametrize('name', MODULES)
def test_every_module_is_exported_from_a_notebook(name):
    file = ROOT.joinpath(*name.split('.')).with_suffix('.py')
    if not file.exists(): file = ROOT.joinpath(*name.split('.'))/'__init__.py'
    text = file.read_text()
    if file.name == '__init__.py':
        assert not [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)], 'code without a notebook'
        return
    source = next(line for line in text.splitlines() if 'File to edit:' in line).split('File to edit: ')[1].rstrip('.')
    assert (file.parent/source).resolve().is_file(), f'{name}: its notebook {source} is not there'


@pytest.mark.parametrize('name', [m for m in MODULES if m != 'xbench.backbones'])
def test_public_names_have_docstrings(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for public in module.__all__:
        thing = getattr(module, public)
        if inspect.isfunction(thing) or inspect.isclass(thing): assert inspect.getdoc(thing), f'{name}.{public} has no docstring'


@pytest.mark.parametrize('name', [m for m in MODULES if m != 'xbench.backbones'])
def test_imports_go_one_way(name):
    room = name.split('.')[1]
    for node in ast.walk(ast.parse(ROOT.joinpath(*name.split('.')).with_suffix('.py').read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            other = (node.module or node.names[0].name).split('.')[0]
            if other in LEVEL and not (room == 'backbones' and other in ('core', 'backbones')):
                assert LEVEL[other] <= LEVEL[room], f'{name} imports {other}, which lies below it'


def test_package_and_notebooks_are_in_step_and_clean(tmp_path):
    for name in ('nbs', 'xbench'):
        shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/name, tmp_path/name)
    for command in ('nbdev_export', 'nbdev_clean'): subprocess.run([command], cwd=tmp_path, check=True, capture_output=True)
    for folder in ('nbs', 'xbench'):
        for made in (tmp_path/folder).rglob('*.*'):
            if made.suffix in ('.py', '.ipynb') and '__pycache__' not in made.parts:
                name = made.relative_to(tmp_path)
                assert made.read_bytes() == (ROOT/name).read_bytes(), f'{name}: run `make notebooks`'


@pytest.mark.parametrize('path', notebooks(), ids=lambda p: p.stem)
def test_notebooks_keep_to_the_dialect(path):
    cells = json.loads(path.read_text())['cells']
    first = ''.join(cells[0]['source'])
    assert first.startswith('# ') and '\n> ' in first, 'the first cell is the title and a one-line > subtitle'
    prose = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    for banned in (':::', '{{<', '```{', '<div', '<img', '<br'): assert banned not in prose
    if 'studies' in path.parts:
        assert [c for c in cells if 'parameters' in c['metadata'].get('tags', [])], 'a study notebook has a cell tagged parameters'
        assert not any(c.get('outputs') for c in cells), 'study notebooks are kept without outputs'
        assert not any('#| export' in ''.join(c['source']) for c in cells)


def test_saved_outputs_hold_no_machine(tmp_path):
    for path in notebooks():
        outputs = json.dumps([c.get('outputs') for c in json.loads(path.read_text())['cells']])
        for word in (str(ROOT), '/tmp/', 'site-packages', 'Warning', 'stderr', 'it/s]'):
            assert word not in outputs, f'{path.name}: {word} in an output'
    assert sum(p.stat().st_size for p in notebooks() if 'studies' not in p.parts) < 2e6


def test_readme_is_the_index_notebook(tmp_path):
    nb = json.loads((ROOT/'nbs'/'index.ipynb').read_text())
    assert pipeline.readme(nb) == (ROOT/'README.md').read_text(), 'README.md is out of step: run `make notebooks`'
    pipeline.run(ROOT/'nbs'/'index.ipynb', tmp_path/'index.ipynb', ROOT/'nbs')
    again = json.loads((tmp_path/'index.ipynb').read_text())
    kept = [c.get('outputs') for c in nb['cells']]
    assert [c.get('outputs') for c in again['cells']] == kept, "the index's outputs are not what its code gives: run `make notebooks`"


def test_readme_links_lead_somewhere():
    import re
    for link in re.findall(r'\]\((?!https?:|#)([^)#]+)\)', (ROOT/'README.md').read_text()): assert (ROOT/link).exists(), link


def test_other_profiles_are_derived_from_the_root_pipeline():
    for file, text in pipeline.derived(load()).items(): assert file.read_text() == text, f'{file}: run `make notebooks`'


@pytest.mark.parametrize('profile', pipeline.ASIDE)
def test_a_profile_beside_lite_trains_as_lite_does(profile):
    """The stages before its own notebook differ in the profile's name and in where its backbones come from alone."""
    stages = yaml.safe_load(paths.pipeline(profile).read_text())['stages']
    lite = {}
    for seed in (None, 1): lite |= yaml.safe_load(pipeline.derive((ROOT/'dvc.yaml').read_text(), 'lite', seed, False))['stages']
    lite['train'] |= {'wdir': '../..', 'matrix': lite['train']['matrix'] | {'seed': f'${{{profile}.seeds}}'}}
    home = {'capacity': 'xbench/backbones/scaled.py'}.get(profile, 'xbench/backbones/mobilevit.py')
    for name in ('code', 'networks', 'settings', 'prepare', 'cost', 'train', 'baseline', 'collect'):
        expected = json.dumps(lite[name]).replace('lite', profile).replace('xbench/backbones/mobilevit.py', home)
        assert json.dumps(stages[name]) == expected, name
    assert set(stages) - {'nbcode', 'study'} == {'code', 'networks', 'settings', 'prepare', 'cost', 'train', 'baseline', 'collect'}
    assert stages['study']['foreach'] == [profile] and f'results/{profile}/draws.npz' in stages['study']['do']['deps']


def test_settings_file_stays_small():
    assert (ROOT/'params.yaml').stat().st_size < 8000, 'DVC reads params.yaml once a stage'


def test_training_cells_depend_on_what_they_import():
    """A module that training uses and the pipeline does not name would change results unnoticed."""
    code = ('import sys, xbench.runs, xbench.backbones.core as c; c.create("mobilevit", 2); '
            'print(*(m for m in sys.modules if m.startswith("xbench.")))')
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    stages = yaml.safe_load((ROOT/'dvc.yaml').read_text())['stages']
    named = [set(stages[s]['deps']) for s in ('code', 'networks', 'settings')]
    assert named[0] == {*modules(), 'xbench/code.py'} and all(d in stages['train']['deps'] for d in stages['code']['outs'])
    plumbing = {'paths', 'errors', 'locks', 'backbones'}    # where and whether, not what
    plumbing |= {'cards', 'files', 'sources', 'pack'}    # they made the packed images, which the cells depend on
    assert {m.removeprefix('xbench.').replace('.', '/') for m in found} - plumbing == {
        d.removeprefix('xbench/').removesuffix('.py') for d in set.union(*named)} - {'settings', 'backbones/weights'}


def test_importing_them_does_not_import_torch():
    names = ('xbench', 'code', 'settings', 'cells', 'stats', 'xscore', 'published', 'backbones.cross_dataset', 'backbones.mobileone',
             'backbones.which_backbone', 'latency', 'data', 'pack', 'datasets', 'fetch', 'corrupt', 'records', 'audit', 'cli')
    code = (f'import sys\nfrom importlib import import_module\nfor name in {names}:\n'
            "    import_module('xbench' if name == 'xbench' else f'xbench.{name}')\n    if 'torch' in sys.modules: sys.exit(name)")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_xscore_needs_no_scipy():
    assert subprocess.run([sys.executable, '-c', 'import sys, xbench.xscore; sys.exit("scipy" in sys.modules)']).returncode == 0
