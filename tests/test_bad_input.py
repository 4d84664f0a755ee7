"""Bad input: one line that names the file or key and the fix, exit code 2, before any work, nothing left behind."""
import json
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT, Checkout

MAKE_PAPER = ('python', '-m', 'xbench.pipeline', 'paper', 'demo')


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp('bad')/'x bench')


@pytest.fixture(autouse=True)
def restored(checkout):
    yield
    checkout.run('git', 'checkout', '-q', '.')


def refused(checkout, *words, command=MAKE_PAPER):
    done = checkout.run(*command, code=2)
    lines = [line for line in done.stderr.splitlines() if 'img/s' not in line and line.strip()]    # a bar may stand before it
    assert len(lines) == 1 and lines[0].startswith('xbench: ') and all(w in lines[0] for w in words), done.stderr
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
    refused(checkout, 'image train/0/', '.png cannot be read', command=('xbench', 'train', 'convnext', folder/'digits'))


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


def test_a_killed_run_resumes_to_the_same_bytes(checkout, tmp_path):
    """SIGKILL once a checkpoint is there; started again, it ends as if nothing had happened."""
    checkout.settings(demo__images={'size': 32, 'train': 256, 'test': 64}, demo__train={'epochs': 6, 'warmup_epochs': 1, 'batch': 16})
    command = [*('xbench', 'train', 'convnext', 'digits', '--out')]
    checkout.run(*command, tmp_path/'whole')
    shutil.rmtree(checkout.path/'work')
    process = subprocess.Popen([*command, tmp_path/'killed'], cwd=checkout.path, env=checkout.env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(checkout.path.glob('work/*/checkpoint.pt')) and time.monotonic() < deadline: time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, 'it ended before it could be killed'
    assert not (tmp_path/'killed').exists()
    checkout.run(*command, tmp_path/'killed')
    for kind, file in (('cells', 'history.csv'), ('cells', 'metrics.json'), ('runs', 'predictions.npz')):
        name = f'{kind}/convnext-digits-s0/{file}'
        assert (tmp_path/'whole'/name).read_bytes() == (tmp_path/'killed'/name).read_bytes(), name


def test_a_checkpoint_of_another_backbone_is_refused(checkout, tmp_path):
    row = json.loads(checkout.run('xbench', 'train', 'convnext', 'digits', '--out', tmp_path, '--format', 'json').stdout)[0]
    run = checkout.path/'work'/row['run_id']
    code = ('import torch, sys; from xbench.train import *; from xbench.errors import one_line_errors; from pathlib import Path\n'
            f'net = torch.nn.Linear(1, 1); opt = torch.optim.Adam(net.parameters())\n'
            f'save_checkpoint(Path({str(run)!r})/"checkpoint.pt", "starnet-digits-s0-00000000", net, opt, [])')
    checkout.run('python', '-c', code)
    done = checkout.run('xbench', 'train', 'convnext', 'digits', '--out', tmp_path, code=2)
    assert 'checkpoint of starnet-digits-s0-00000000' in done.stderr and 'delete it' in done.stderr
