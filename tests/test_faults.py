"""Killed, interrupted, out of space, damaged, on two devices: the same result, or one line that says what to do."""
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import faults
import numpy as np
import pytest
from faults import EVERY, different, project, tree
from safetensors.numpy import load

from xbench import pack

PLAIN = ('convnext', 'plain')
NAME = 'convnext-digits-s0'
begun_at = lambda run: int(re.search(r'(\d+)%\|', run.err)[1])
"""Percent that the bar began with."""


@pytest.fixture(scope='module')
def warm():
    with faults.Warm() as w: yield w


@pytest.fixture(scope='module')
def whole(warm, tmp_path_factory):
    """What an uninterrupted run leaves."""
    root = project(tmp_path_factory.mktemp('whole')/'x bench')
    warm.run(root, *faults.train_of(PLAIN))
    return tree(root)


@pytest.fixture
def root(tmp_path): return project(tmp_path/'x bench')


@contextmanager
def disk(folder, size):
    """A file system of its own, where there is one to be had; what it gives remounts it."""
    folder.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder], capture_output=True)
    if done.returncode: pytest.skip('cannot mount')
    try: yield lambda how: subprocess.run(['mount', '-o', f'remount,{how}', folder], check=True)
    finally: subprocess.run(['umount', folder], check=True)


def refused(run, *words):
    """One line, and no traceback."""
    assert run.code == 2 and len(run.lines) == 1 and all(str(w) in run.lines[0] for w in words), run.err


def train(warm, root, code=0, cell=PLAIN, out='out', **how):
    return warm.run(root, 'train', cell[0], 'digits', '--recipe', cell[1], '--out', out, code=code, **how)


def stopped(warm, root, *numbers, cell=PLAIN, every=EVERY, file='checkpoint.previous.pt'):
    """A run that is told to stop once a checkpoint is there."""
    run = warm.start(root, *faults.train_of(cell), every=every)
    run.wait(until=lambda: list(root.glob(f'work/*/{file}')))
    for n in numbers or (signal.SIGTERM,): run.send(n)
    assert run.wait() == 130, f'exited {run.code}\n{run.err}'
    return run


def sound(file):
    content = file.read_bytes()
    return hashlib.sha256(content[32:]).digest() == content[:32]


# kills

@pytest.mark.slow
def test_killed_anywhere_it_ends_in_the_same_bytes(warm, tmp_path):
    """At seeded times and at the files that packing, checkpoints and records are made of."""
    killer = faults.Killer(warm, tmp_path)
    print(killer.kill(8))
    for c in faults.CELLS: assert c in killer.whole, f'{c} was not met'
    history = killer.whole[faults.CELLS[0]][0]['out/cells/shufflenet-digits-s0/history.csv'].decode()
    assert ',adamw,' in history and ',sgd,' in history, 'its second phase was not met'


@pytest.mark.parametrize('phase, least', [('packing', 2), ('checkpoint', 6), ('record', 5)])
def test_killed_before_each_renaming(warm, root, whole, phase, least):
    """Everything is written under another name first, and its name is given last."""
    for n in range(1, least + 1):
        run = warm.start(root, *faults.train_of(PLAIN), every=EVERY, at=(f'{phase} os.rename', n, 'now'))
        assert run.wait() == -signal.SIGKILL, f'not killed at {n}: {run.err}'
    train(warm, root)
    assert not different(whole, tree(root))


def test_killed_while_it_clears_up(warm, root, whole):
    """The record is whole then: nobody trains again, and no checkpoint is kept for ever."""
    run = warm.start(root, *faults.train_of(PLAIN), every=EVERY, at=('clearing', 1, 'now'))
    assert run.wait() == -signal.SIGKILL and list(root.glob('work/*/checkpoint*'))
    assert 'this run was finished' in train(warm, root).err and not different(whole, tree(root))


def test_killed_between_two_searches(warm, tmp_path):
    """The checkpoint of a candidate that is judged is not kept for ever."""
    cell, roots = faults.CELLS[2], [project(tmp_path/name) for name in ('whole', 'killed')]
    warm.run(roots[0], *faults.train_of(cell))
    run = warm.start(roots[1], *faults.train_of(cell), every=EVERY, at=('clearing', 1, 'now'))
    assert run.wait() == -signal.SIGKILL
    train(warm, roots[1], cell=cell)
    assert not different(*map(tree, roots))


def test_an_image_counts_as_packed_when_all_of_it_is_noted():
    """A kill between two fields must not leave `done` alone; no kill could be aimed so well."""
    noted = np.zeros(1, pack.STATE)
    bad = {'done': 1, 'hash': 'é', 'side': 'x'}
    with pytest.raises(ValueError): noted[0] = tuple(bad[k] for k in pack.STATE.names)
    assert not noted['done'][0]


# disks

def test_a_full_disk_in_training(warm, root, whole):
    """Room for one checkpoint and a half."""
    with disk(root/'work', '48m') as again:
        run = train(warm, root, 2, every=EVERY)
        refused(run, f'{NAME}-', 'checkpoint.pt: cannot be written (No space left on device)', 'free 30 MiB', 'checkpoint.pt is kept')
        kept = [f for f in root.glob('work/*/*') if f.is_file()]
        assert [f.name for f in kept] == ['checkpoint.pt'] and sound(kept[0])
        again('size=200m')
        assert begun_at(train(warm, root, every=EVERY)) > 0 and not different(whole, tree(root))


@pytest.mark.parametrize('size, file, at', [('8m', 'checkpoint.pt', 0), ('36m', 'weights.safetensors', 100)])
def test_a_full_disk_at_the_end_of_training(warm, root, whole, size, file, at):
    """Room for no checkpoint; for one, but not for the weights."""
    with disk(root/'work', size) as again:
        refused(train(warm, root, 2), file, 'No space left on device')
        again('size=200m')
        assert begun_at(train(warm, root)) == at and not different(whole, tree(root))


def test_a_full_disk_for_the_record(warm, root, whole):
    """The run goes on from its checkpoint when it is given another folder."""
    with disk(root/'tiny', '4k'):
        refused(train(warm, root, 2, out='tiny'), 'tiny', 'record cannot be written (No space left on device)', 'run is kept in')
        assert not list(root.glob('tiny/**/*.part')) and not list(root.glob('tiny/**/run.json'))
    assert begun_at(train(warm, root)) == 100 and not different(whole, tree(root))


def test_a_folder_that_may_not_be_written(warm, root, whole):
    """Said before anything is trained, whether the run is fresh, begun, or without a place for its record."""
    with disk(root/'work', '200m') as again:
        stopped(warm, root)
        again('ro')
        for seed in (1, 0):
            run = warm.run(root, *faults.train_of(PLAIN), '--seed', seed, code=2)
            refused(run, 'work', 'cannot be written (Read-only file system)')
            assert '%|' not in run.err
        again('rw')
        train(warm, root)
        assert not different(whole, tree(root))
        with disk(root/'closed', '1m') as again:
            again('ro')
            run = warm.run(root, *faults.train_of(PLAIN), '--seed', '1', '--out', 'closed', code=2)
            refused(run, 'closed', 'cannot be written (Read-only file system)')
            assert '%|' not in run.err


# checkpoints

@pytest.mark.parametrize('spoil', [lambda b: b'', pytest.param(lambda b: b[:len(b)//2], marks=pytest.mark.slow),
                                   lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:]],
                         ids=['empty', 'truncated', 'a bit flipped'])
def test_a_damaged_checkpoint(warm, root, whole, spoil):
    """The one before is used."""
    stopped(warm, root)
    file, = root.glob('work/*/checkpoint.pt')
    file.write_bytes(spoil(file.read_bytes()))
    run = train(warm, root)
    assert f'{file}: damaged checkpoint' in run.err and 'the one before' in run.err and begun_at(run) > 0
    assert not different(whole, tree(root))


def test_two_damaged_checkpoints(warm, root, whole):
    """It says what to delete; that done, it starts over."""
    stopped(warm, root)
    for file in root.glob('work/*/*.pt'): os.truncate(file, file.stat().st_size//2)
    run = train(warm, root, 2)
    assert f'delete {file.parent} to start this run over' in run.lines[-1] and 'Traceback' not in run.err
    shutil.rmtree(file.parent)
    assert begun_at(train(warm, root)) == 0 and not different(whole, tree(root))


# signals

@pytest.mark.parametrize('numbers', [(signal.SIGTERM,), (signal.SIGINT,)], ids=['SIGTERM', 'SIGINT'])
def test_a_signal_in_training(warm, root, whole, numbers):
    run = stopped(warm, root, *numbers, every=.2, file='checkpoint.pt')    # so that the step it stops after is not saved anyway
    assert len(run.lines) == 1 and re.search(rf'{NAME}-\w+: interrupted after step \d+ of 8 in epoch \d of 3; saved', run.lines[0]), run.err
    step, epoch = map(int, re.search(r'step (\d+) of 8 in epoch (\d)', run.lines[0]).groups())
    file, = root.glob('work/*/checkpoint.pt')
    assert sound(file) and not (root/'out').exists() and not list(root.rglob('*.part'))
    assert begun_at(train(warm, root)) == round(100*(8*epoch - 8 + step)/24) and not different(whole, tree(root))


def test_impatient_signals(warm, root, whole):
    """Two at once end it as one does, perhaps with the line on the bar's."""
    run = stopped(warm, root, signal.SIGINT, signal.SIGTERM)
    assert run.err.count('interrupted') == 1 and 'Traceback' not in run.err, run.err
    train(warm, root)
    assert not different(whole, tree(root))


def test_a_signal_while_packing(warm, root, whole):
    run = warm.start(root, *faults.train_of(PLAIN), at=('packing', 8, 'later'))
    run.wait(until=lambda: run.struck, tick=.0003)
    run.send(signal.SIGTERM)
    assert run.wait() == 130 and len(run.lines) == 1 and 'interrupted' in run.lines[0], run.err
    train(warm, root)
    assert not different(whole, tree(root))


# devices

def fork(warm, root, *argv, n=2, **how):
    """`xbench ARGV` as torchrun starts it in several processes, by fork."""
    env = {'WORLD_SIZE': n, 'LOCAL_WORLD_SIZE': n, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': faults.free_port(),
           'TORCHELASTIC_RUN_ID': 'test', 'GROUP_RANK': 0}
    own = lambda k: {name: str(v) for name, v in (env | {'RANK': k, 'LOCAL_RANK': k}).items()}
    return [warm.start(root, *argv, '--devices', n, env=own(k), **how) for k in range(n)]


def ranks(warm, root, *argv, **how):
    for run in fork(warm, root, *argv, **how): assert run.wait() == 0, run.err


def outcome(root, cell):
    name = f'{cell[0]}-digits-s0'
    return dict(np.load(root/'out'/'cells'/name/'predictions.npz')), load(next(root.glob('work/*/weights.safetensors')).read_bytes())


def apart(one, other):
    """Furthest that two runs' weights are from one another, as part of the largest of their tensor; the same for probabilities."""
    a, b = one[1], other[1]
    floats = [k for k in a if a[k].dtype.kind == 'f']
    assert a.keys() == b.keys() and (one[0]['ids'] == other[0]['ids']).all()
    return (max(float(np.abs(a[k] - b[k]).max()/max(1e-9, np.abs(a[k]).max())) for k in floats),
            float(np.abs(np.exp(one[0]['log_prob'].astype(np.float32)) - np.exp(other[0]['log_prob'].astype(np.float32))).max()))


@pytest.mark.parametrize('cell, how, allowed', [
    pytest.param(PLAIN, (), 8e-5, marks=pytest.mark.slow),
    (('shufflenet', 'plain'), ('--set', 'accumulate=2'), 1e-5)], ids=['LayerNorm', 'BatchNorm'])
def test_two_devices_are_as_good_as_one(warm, tmp_path, cell, how, allowed):
    """Two processes against one with the same images a step; with BatchNorm, against one that takes a step's images in two passes.

    Seen: weights within 8.2e-6 of a tensor's largest for convnext, of which ten times as much is allowed, and the same bits for shufflenet;
    probabilities, kept as logarithms in float16, the same bits for both, where one last place is allowed.
    """
    one, two = project(tmp_path/'one'), project(tmp_path/'two')
    warm.run(one, *faults.train_of(cell), *how)
    ranks(warm, two, *faults.train_of(cell))
    weights, prob = apart(outcome(one, cell), outcome(two, cell))
    assert weights <= allowed and prob <= 2**-11
    assert {name for name in tree(two) if '.part' in name or 'checkpoint' in name} == set()


@pytest.mark.parametrize('backbone', [    # with dropout; with validation that tells averages apart
    pytest.param('mobilenet_v3_small', marks=pytest.mark.slow), 'shufflenet'])
def test_a_signal_to_one_of_two_devices(warm, tmp_path, backbone):
    """Both stop after the same step, say so once, and go on together: dropout of their own, BatchNorm and a moving average included."""
    cell, whole, cut = (backbone, 'growing'), project(tmp_path/'whole'), project(tmp_path/'cut')
    ranks(warm, whole, *faults.train_of(cell))
    each = fork(warm, cut, *faults.train_of(cell), every=EVERY)
    each[0].wait(until=lambda: list(cut.glob('work/*/checkpoint.previous.pt')))
    each[1].send(signal.SIGTERM)
    assert [run.wait() for run in each] == [130, 130], '\n'.join(run.err for run in each)
    assert len(each[0].lines) == 1 and 'interrupted after step' in each[0].lines[0] and not each[1].lines, each[1].err
    ranks(warm, cut, *faults.train_of(cell))
    assert not different(tree(whole), tree(cut))


@pytest.mark.slow
def test_torchrun_interrupted_and_resumed(warm, tmp_path):
    """SIGTERM to torchrun; resumed, it ends in the bytes of two devices that nobody touched. The others are forked, to be quick."""
    command = (*faults.train_of(PLAIN), '--set', 'epochs=14')
    whole, cut = project(tmp_path/'whole'), project(tmp_path/'cut')
    ranks(warm, whole, *command)
    with open(cut/'err', 'w') as err:
        process = subprocess.Popen([sys.executable, '-m', 'xbench.cli', *command, '--devices', '2'], cwd=cut, stdout=err, stderr=err,
                                   env=os.environ | {'XBENCH_ROOT': str(cut)})
    end, said = time.monotonic() + 120, lambda: (cut/'err').read_text().replace('\r', '\n')
    while not re.search(rf'{NAME}-\w+: +[1-9]\d?%\|', said()) and process.poll() is None and time.monotonic() < end: time.sleep(.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130, said()
    lines = [line for line in said().splitlines() if line.strip() and 'img' not in line]
    assert len(lines) == 1 and 'interrupted after step' in lines[0], said()
    file, = cut.glob('work/*/checkpoint.pt')
    assert sound(file)
    ranks(warm, cut, *command)
    assert not different(tree(whole), tree(cut))


def test_a_full_disk_of_two_devices(warm, root):
    """The first says it; the other ends with it."""
    with disk(root/'work', '48m'):
        each = fork(warm, root, *faults.train_of(PLAIN), every=EVERY)
        assert [run.wait() for run in each] == [2, 2], '\n'.join(run.err for run in each)
        refused(each[0], 'checkpoint.pt: cannot be written')
        assert not each[1].lines
