"""Every backbone as an ONNX file with torch's exporter, checked on photographs, train-time and fused; in `make test` one a
family, but for seven that take up to a minute each."""
import pytest
import torch
from registry import NAMES, images, sizes

from xbench.backbones.core import create, entry
from xbench.backbones.reparam import fusable, fuse
from xbench.export import calibrate, to_onnx

LONG = {'convit_tiny', 'densenet161', 'ghostnet', 'mobileone', 'regnet_y_3_2gf', 'swin_t', 'wavemix_192_16'}
QUICK = sorted(set({entry(n).family: n for n in reversed(NAMES)}.values()) - LONG)    # one backbone a family


def exported(name, folder):
    size = sizes(name)[0]
    torch.manual_seed(0)
    model = calibrate(create(name, 10), images(size))
    assert to_onnx(model, folder/f'{name}.onnx', images(size)[:4]) < 1e-3
    if fusable(model): assert to_onnx(fuse(model), folder/f'{name}-fused.onnx', images(size)[:4]) < 1e-3


@pytest.mark.parametrize('name', QUICK)
def test_onnx_of_one_backbone_a_family(name, tmp_path):
    exported(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in NAMES if n not in QUICK])
def test_onnx_of_every_backbone(name, tmp_path):
    exported(name, tmp_path)
