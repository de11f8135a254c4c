"""Devices: the figures of their data sheets, and a device of one's own from a YAML file."""

import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from megascale.devices.table import DEVICES, Device, device_of
from megascale.errors import UserError
from megascale.parsing import dump_yaml


def test_every_device_has_every_rate_and_says_where_it_is_from():
    assert list(DEVICES) == "a100-40 a100-80 h100 h200 b200 mi300x cpu".split()
    for device in DEVICES.values():
        assert all(getattr(device, one.name) or one.default is None for one in fields(Device))
        assert len(device.source) > 20
        assert device.fp32_flops_per_s <= device.bf16_flops_per_s
        assert device.inter_bytes_per_s < device.intra_bytes_per_s


def test_a100_means_the_one_of_80_gb():
    assert device_of("a100") == DEVICES["a100-80"] != DEVICES["a100-40"]
    assert device_of("a100").memory_bytes == 80 * 2**30


@pytest.mark.parametrize(
    ("name", "tflops", "gib", "gigabytes_per_s"),
    [
        ("a100-40", 312, 40, 300),
        ("h100", 989.4, 80, 450),
        ("h200", 989.4, 141, 450),
        ("b200", 2250, 180, 900),
        ("mi300x", 1307.4, 192, 448),
    ],
)
def test_figures_are_those_of_the_data_sheets(name, tflops, gib, gigabytes_per_s):
    device = device_of(name)
    assert device.flops_per_s("bf16") == tflops * 1e12
    assert device.memory_bytes == gib * 2**30
    assert device.intra_bytes_per_s == gigabytes_per_s * 1e9


def test_another_network():
    assert device_of("h100", 200).inter_bytes_per_s == 25e9


def test_a_device_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    own = replace(DEVICES["h100"], memory_bytes=7 * 2**30, node_size=4, source="mine")
    path.write_text(dump_yaml(asdict(own)))
    assert device_of(str(path)) == own
    path.write_text(WHOLE.replace("memory_bytes: 1000", "memory_bytes: 8Gi"))
    short = device_of(str(path))
    assert (short.memory_bytes, short.node_size, short.flops_per_s("fp32")) == (2**33, 8, 1e12)


def test_the_guide_has_a_file_that_works(tmp_path):
    guide = (Path(__file__).parents[2] / "megascale/run/README.md").read_text()
    (text,) = re.findall(r"^```\n(bf16_flops_per_s.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    path = tmp_path / "guide.yaml"
    path.write_text(text)
    assert replace(device_of(str(path)), source="") == replace(DEVICES["h100"], source="")


WHOLE = (
    "bf16_flops_per_s: 1e12\nfp32_flops_per_s: 1e12\nmemory_bytes: 1000\nintra_bytes_per_s: 1e9\n"
    "inter_bytes_per_s: 1e8\nhost_bytes_per_s: 1e9\n"
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (WHOLE + "memory: 5", "unknown key 'memory'; did you mean 'memory_bytes'"),
        ("memory_bytes: 5", "bf16_flops_per_s is missing"),
        (WHOLE.replace("1000", "-4"), "memory_bytes = -4 must be from 1"),
        (WHOLE.replace("1e8", "0"), "inter_bytes_per_s = 0 must be from 1"),
        (WHOLE.replace("1e8", "1e-300"), "inter_bytes_per_s = 1e-300 must be from 1"),
        (WHOLE + "node_size: 0", "node_size = 0 must be from 1"),
        (WHOLE.replace("1000", "much"), "memory_bytes must be a whole number"),
        ("- 5", "a config is a YAML mapping"),
        ("{", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_device_is_one_clear_line(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        device_of(str(path))
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h10", "not in the table.*did you mean h100"),
        ("/nowhere/x.yaml", "No such file"),
        ("", "not in the table"),
    ],
)
def test_an_unknown_device_is_one_clear_line(name, said):
    with pytest.raises(UserError, match=said):
        device_of(name)
