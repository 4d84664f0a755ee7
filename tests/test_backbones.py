"""Every backbone of the registry, by the registry: a new one is tested by being there. Big ones run at their smallest legal size."""
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, called
from registry import NAMES, images, sizes

from xbench import cli, latency, published
from xbench.backbones import core, weights
from xbench.backbones.core import create, entry
from xbench.backbones.reparam import fusable, fuse
from xbench.export import calibrate

FUSABLE = ('ghostnet', 'mobileone', 'mobileone_mu0_derived', 'mobileone_mu1_derived', 'mobileone_mu2_derived', 'mobileone_s0',
           'mobileone_s1', 'mobileone_s2', 'mobileone_s3', 'mobileone_s4', 'repvgg_a0', 'repvgg_a1', 'repvgg_a2', 'repvgg_b0', 'repvgg_b1')
NARROW = ('ghostnet', 'mobileone', 'mobileone_mu0_derived', 'mobileone_s0', 'mobileone_s1', 'repvgg_a0')  # others are wider
# parameters at 10 classes and with ImageNet's 1000, counted on the reference networks
EXACT = {'mobilenet_v3_small': (1_528_106, None), 'resnet18': (11_181_642, None), 'efficientnet_v2_s': (20_190_298, 21.4585),
         'squeezenet1_1': (727_626, None), 'shufflenet_v2_x1_0': (1_263_854, None), 'wavemix_192_16': (27_666_538, 27.8576),
         'resnet50': (None, 25.5570), 'convnext_tiny': (None, 28.5891), 'swin_t': (None, 28.2884), 'swin_v2_t': (None, 28.3516),
         'densenet161': (None, 28.6810), 'mobilenet_v3_large': (None, 5.4830), 'regnet_y_3_2gf': (None, 19.4363),
         'resnext50_32x4d': (None, 25.0289), 'shufflenet_v2_x2_0': (None, 7.3940), 'mobileone_s0': (4_278_522, 5.2933),
         'mobileone_s1': (None, 4.8252), 'mobileone_s2': (None, 7.8846), 'mobileone_s3': (None, 10.1706), 'mobileone_s4': (None, 14.9512)}


def test_the_registry_is_complete():
    assert len(NAMES) == 53 and len(set(NAMES)) == 53
    by_paper = {p: sum(p in entry(n).roles for n in NAMES) for p in ('cross_dataset', 'memory_constrained', 'which_backbone', 'mobileone')}
    assert by_paper == {'cross_dataset': 11, 'memory_constrained': 5, 'which_backbone': 11, 'mobileone': 33}
    for n in NAMES:
        e = entry(n)
        assert e.family and e.title and e.doc.endswith('.') and set(e.roles.values()) <= {'studied', 'peer', 'derived'}
        assert (e.weights is None) == ('cross_dataset' in e.roles or 'derived' in e.roles.values()), n


@pytest.mark.parametrize('name', EXACT)
def test_parameters_are_those_of_the_reference(name):
    at_10, at_1000 = EXACT[name]
    count = lambda n: sum(p.numel() for p in create(name, n).parameters())
    assert at_10 is None or count(10) == at_10
    assert at_1000 is None or round(count(1000)/1e6, 4) == at_1000


@pytest.mark.parametrize('name', NAMES)
def test_forward_backward_save_load_head(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    small, *larger = sizes(name)
    model = create(name, 5).train()
    logits = model(images(small)[:2])
    assert logits.shape == (2, 5) and logits.isfinite().all()
    logits.square().mean().backward()
    without = [k for k, p in model.named_parameters() if p.grad is None]
    assert not without, f'{name}: no gradient reaches {without[:3]}'
    assert fusable(model) == (name in FUSABLE)
    model.eval()
    with torch.no_grad():
        before = model(images(small)[:2])
        for size in larger: assert model(images(size)[:1]).shape == (1, 5)
        torch.save(model.state_dict(), tmp_path/'weights.pt')
        again = create(name, 5).eval()
        again.load_state_dict(torch.load(tmp_path/'weights.pt', weights_only=True))
        assert again(images(small)[:2]).equal(before), 'loaded weights give other logits'
        monkeypatch.setattr(weights, 'fetch', lambda e: model.state_dict())
        other = weights.fill(create(name, 3), entry(name)).eval()    # as trained weights are loaded for another number of classes
        assert other(images(small)[:1]).shape == (1, 3)
    was, now = model.state_dict(), other.state_dict()
    sized = [k for k in now if now[k].shape != was[k].shape]
    assert all(now[k].equal(was[k]) for k in now if k not in sized)
    assert 1 <= len(sized) <= 2 and len({k.rpartition('.')[0] for k in sized}) == 1, 'only the head depends on the classes'


@pytest.mark.parametrize('name', [n if n in NARROW else pytest.param(n, marks=pytest.mark.slow) for n in FUSABLE])
def test_fused_is_the_same_function(name):
    """Relative to the largest logit, batch norms calibrated on photographs."""
    for dtype, bound in ((torch.float, 1e-4), (torch.double, 1e-12)):
        torch.manual_seed(0)
        x = images(128).to(dtype)
        model = calibrate(create(name, 10).to(dtype), x)
        with torch.no_grad(): before, after = model(x), fuse(model)(x)
        error = ((after - before).abs().max()/before.abs().max()).item()
        assert error < bound, f'{name} {dtype}: {error:.1e}'
    fused = fuse(model)
    assert not fusable(fused) and sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('name', NAMES)
def test_a_size_that_it_cannot_take_is_named_with_the_nearest(name):
    e = entry(name)
    wrong = e.size + 1 if e.step is None else e.least - 1 if e.step == 1 else e.least + 1
    with pytest.raises(ValueError, match=f'nearest it can is {e.size if e.step is None else e.least}$'): core.check_size(name, wrong)
    if e.step != 1 or wrong < 1: return    # a fixed grid may take a pixel more; what it makes of it was never meant
    with pytest.raises((RuntimeError, AssertionError, ValueError, IndexError)): create(name, 2).eval()(torch.zeros(1, 3, wrong, wrong))


def test_every_published_row_has_its_backbone_or_is_known_not_to():
    known = set(NAMES) | {n.removesuffix('_derived') for n in NAMES}
    absent = {'mobileformer_96', 'mobileformer_52', 'mobilenext_100', 'mobilenext_140', 'micronet_m1', 'micronet_m2', 'micronet_m3'}
    for paper, numbers in {'memory_constrained': (1,), 'which_backbone': (2, 9), 'mobileone': (9, 10, 13)}.items():
        for number in numbers: assert set(published.table(paper, number).index) - absent <= known, (paper, number)


@pytest.mark.parametrize('args, words', [
    (['cost', 'wavemix_192_16', '--px', '100'], 'the nearest it can is 96'),
    (['cost', 'deit_tiny_patch16_224', '--px', '32'], 'takes 224 px alone'),
    (['cost', 'starnet', '--engine', 'onxruntime'], 'did you mean onnxruntime'),
    (['cost', 'starnet', '--threads', '4096'], 'threads on a machine of'),
    (['cost', 'starnet', '--dtype', 'int8'], 'use --engine onnxruntime'),
    (['cost', 'starnet', 'strnet'], 'did you mean starnet'),
    pytest.param(['cost', 'starnet', '--device', 'cuda'], 'not there', marks=pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU')),
    (['export', 'starnet', 'out.onnx', '--px', '0'], 'the nearest it can is 1'),
    (['fuse', 'starnet', 'out.safetensors'], 'no branches to fold'),
])
def test_bad_input_is_one_line(args, words):
    done = called(ROOT, cli.main, *args)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize('args', [('cost', 'starnet', '--engine', 'onnxruntime'), ('export', 'starnet', 'starnet.onnx')])
def test_an_engine_that_is_not_installed(args, monkeypatch):
    """A machine without ONNX Runtime is told how to get it."""
    monkeypatch.setattr(latency, 'find_spec', lambda name: None if name == 'onnxruntime' else find_spec(name))
    done = called(ROOT, cli.main, *args)
    assert done.returncode == 2 and 'pip install onnxruntime' in done.stderr and len(done.stderr.splitlines()) == 1


def test_weights_offline(tmp_path):
    env = os.environ | {'XBENCH_WEIGHTS': 'http://127.0.0.1:9', 'TORCH_HOME': str(tmp_path)}
    done = subprocess.run([sys.executable, '-m', 'xbench.cli', 'export', 'resnet18', str(tmp_path/'a.onnx'), '--pretrained'],
                          cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and 'set XBENCH_WEIGHTS to a mirror' in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob('*.*'))


@pytest.mark.parametrize('engine', ['eager', pytest.param('onnxruntime', marks=pytest.mark.slow)])
def test_cost_of_a_measured_backbone_is_a_row_a_form(engine):
    done = called(ROOT, cli.main, 'cost', 'mobileone_s0', '--px', 64, '--engine', engine, '--format', 'json')
    train_time, fused = json.loads(done.stdout)
    assert (train_time['form'], fused['form'], fused['params_m']) == ('train-time', 'fused', 2.078504)
    assert {'device', 'threads', 'engine', 'dtype', 'layout', 'versions', 'date', 'n', 'p50_ms', 'p95_ms', 'min_ms'} <= set(fused)
