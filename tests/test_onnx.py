"""Every backbone as an ONNX file with torch's exporter, checked on photographs, train-time and fused; in `make test` those few that
are exported in seconds (a folded one is in nbs/33_export.ipynb)."""
import pytest
import torch
from registry import NAMES, images, sizes

from xbench.backbones.core import create
from xbench.backbones.reparam import fusable, fuse
from xbench.export import calibrate, to_onnx

QUICK = ['convnext', 'squeezenet1_1', 'starnet']


def exported(name, folder):
    size = sizes(name)[0]
    torch.manual_seed(0)
    model = calibrate(create(name, 10), images(size))
    assert to_onnx(model, folder/f'{name}.onnx', images(size)[:4]) < 1e-3
    if fusable(model): assert to_onnx(fuse(model), folder/f'{name}-fused.onnx', images(size)[:4]) < 1e-3


@pytest.mark.parametrize('name', QUICK)
def test_onnx_of_a_few(name, tmp_path):
    exported(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in NAMES if n not in QUICK])
def test_onnx_of_every_other(name, tmp_path):
    exported(name, tmp_path)
