"""Bad input: one line that names the file or key and the fix, exit code 2, before any work, nothing left behind."""
import json
import shutil
import subprocess

import pytest
from conftest import ROOT, Checkout, called

from xbench import cli, pipeline

MAKE_PAPER = (pipeline.main, 'paper', 'demo')


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp('bad')/'x bench')


@pytest.fixture(autouse=True)
def restored(checkout):
    yield
    checkout.run('git', 'checkout', '-q', '.')
    for folder in ('work', 'packed'): shutil.rmtree(checkout.path/folder, ignore_errors=True)


def refused(checkout, *words, command=MAKE_PAPER):
    done = called(checkout.path, *command)
    bars = ('img/s', ' train, ', 'split: ')    # a bar may stand before it, and what images of one's own were taken for
    lines = [line for line in done.stderr.splitlines() if line.strip() and not any(word in line for word in bars)]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith('xbench: ') and all(w in lines[0] for w in words), done.stderr
    for folder in ('results/demo', 'paper/demo', 'packed', 'work'):
        assert not list((checkout.path/folder).rglob('*.*')), f'{folder} was written to'


@pytest.mark.parametrize('changes, words', [
    ({'demo__backbones': ['strnet']}, ('params.yaml: demo.backbones', 'did you mean starnet')),
    ({'demo__proxy': 'photos'}, ('params.yaml: demo.proxy', 'did you mean photographs')),
    ({'demo__train__epochs': 'three'}, ('params.yaml: demo.train.epochs', 'three')),
    ({'demo__images__size': -32}, ('params.yaml: demo.images.size', 'greater than or equal to 8')),
    ({'demo__train__epochs': 1}, ('params.yaml: demo', 'warmup_epochs (1) must be below epochs (1)')),
    ({'recipe__cross_dataset__optimizer': 'adm'}, ('params.yaml: recipe.cross_dataset.optimizer', "'adam'")),
    ({'demo__datasets__digits': 'data/digts.tar.xz'}, ('data/digts.tar.xz', 'no such file')),
    ({'backbone__starnet__module': 'no_such_module'}, ('no_such_module', 'params.yaml')),
])
def test_settings(checkout, changes, words):
    checkout.settings(**changes)
    refused(checkout, *words)


def test_a_mistyped_dataset_is_named_before_training(checkout):
    checkout.settings(demo__datasets={'photographs': 'data/photographs.tar.xz', 'digts': 'data/digits.tar.xz'})
    refused(checkout, 'demo.datasets', 'did you mean digits')


def test_a_truncated_archive_is_named_before_training(checkout):
    whole = (ROOT/'data'/'digits.tar.xz').read_bytes()
    (checkout.path/'cut.tar.xz').write_bytes(whole[:len(whole)//2])
    checkout.settings(demo__datasets__digits='cut.tar.xz')
    refused(checkout, 'cut.tar.xz', 'corrupt or truncated')
    (checkout.path/'cut.tar.xz').unlink()


def test_a_truncated_image_is_named_before_training(checkout, tmp_path):
    folder = tmp_path/'birds'
    shutil.unpack_archive(ROOT/'data'/'digits.tar.xz', folder)
    for image in (folder/'digits'/'train'/'0').iterdir(): image.write_bytes(image.read_bytes()[:60])
    refused(checkout, 'image train/0/', '.png cannot be read', command=(cli.main, 'train', 'convnext', folder/'digits'))


def test_a_full_disk_is_noticed_before_packing(checkout, tmp_path):
    """A file system of one megabyte, where there is one to be had."""
    small_disk = tmp_path/'disk'
    small_disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', small_disk], capture_output=True).returncode:
        pytest.skip('cannot mount')
    try:
        code = ('from xbench import errors, pack\n'
                f'with errors.one_line_errors(): pack.pack("data/digits.tar.xz", {str(small_disk/"packed")!r}, 32, "digits")')
        done = checkout.run('python', '-c', code, code=2)
        assert 'packing needs' in done.stderr and len(done.stderr.splitlines()) == 1 and not list(small_disk.iterdir())
    finally: subprocess.run(['umount', small_disk], check=True)


def test_a_checkpoint_of_other_settings_is_refused(checkout, tmp_path):
    """Stopped by SIGTERM; its checkpoint, moved to where another run looks, is not taken for that run's."""
    command = ('train', 'shufflenet', 'digits', '--out', tmp_path, '--set', 'epochs=40')
    process = subprocess.Popen(['xbench', *command], cwd=checkout.path, env=checkout.env, stderr=subprocess.PIPE, text=True)
    while 'loss' not in process.stderr.readline(200): pass    # the bar is on its way
    process.terminate()
    assert process.wait() == 130 and 'goes on from there' in process.stderr.read()
    stopped = next(checkout.path.glob('work/*/checkpoint.pt'))
    other = (cli.main, *command[:-1], 'epochs=1', '--set', 'warmup_epochs=0')
    row = json.loads(called(checkout.path, *other, '--format', 'json').stdout)[0]
    shutil.copy(stopped, checkout.path/'work'/row['run_id']/'checkpoint.pt')
    shutil.rmtree(tmp_path/'runs')
    done = called(checkout.path, *other)
    assert done.returncode == 2 and 'epochs' in done.stderr and '40' in done.stderr and '--again' in done.stderr
    assert called(checkout.path, *other, '--again').returncode == 0
