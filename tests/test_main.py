"""`python -m numsru`: the report, its check of every backend, and its exit status."""

import re
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import numba
import pytest
import torch

import numsru
from numsru import __main__ as report
from numsru import cpu_kernels, reference


@pytest.fixture
def run(capsys):
    """Runs the report in this process: its exit status, and its lines by their names."""

    def main():
        status = report.main()
        return status, dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())

    return main


def test_a_working_installation_exits_with_0():
    done = subprocess.run([sys.executable, "-m", "numsru"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^check cpu +ok ", done.stdout, re.MULTILINE)
    assert not done.stderr


def test_versions_are_those_installed(run):
    _, lines = run()
    assert lines["numsru"].startswith(numsru.__version__)
    assert lines["torch"].startswith(torch.__version__)
    assert lines["numba"] == numba.__version__
    assert lines["numba-cuda"] == metadata.version("numba-cuda")


def test_the_kernel_cache_is_where_numba_keeps_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(tmp_path))
    assert run()[1]["kernel cache"].startswith(str(tmp_path))


def test_every_device_is_checked(run):
    _, lines = run()
    devices = [str(device) for device, _ in report._devices()]
    assert "cpu" in devices
    assert [name for name in lines if name.startswith("check ")] == [f"check {device}" for device in devices]


@pytest.mark.parametrize("broken", ["h", "c_n", "grad_u", "grad_x", "grad_bias", "grad_c_0", "nan"])
def test_a_wrong_result_fails_the_check(run, monkeypatch, broken):
    forward, backward = cpu_kernels.forward, cpu_kernels.backward

    def wrong_forward(*args):
        h, c_n, saved = forward(*args)
        h, c_n = h + 1e-3 * (broken == "h"), c_n + 1e-3 * (broken == "c_n")
        return (h * torch.nan if broken == "nan" else h), c_n, saved

    def wrong_backward(*args):
        names = ("grad_u", "grad_x", "grad_bias", "grad_weight_c", "grad_c_0")
        grads = zip(names, backward(*args), strict=True)
        return tuple(g + 1e-3 if name == broken else g for name, g in grads)

    monkeypatch.setattr(cpu_kernels, "forward", wrong_forward)
    monkeypatch.setattr(cpu_kernels, "backward", wrong_backward)
    status, lines = run()
    assert status == 1
    name = {"nan": "h"}.get(broken, broken.replace("grad_", "gradient of "))
    assert f"failed: {name} differs by" in lines["check cpu"]


def test_a_backend_that_raises_fails_the_check(run, monkeypatch):
    def refuse(*args):
        raise OSError("no memory for code")

    monkeypatch.setattr(cpu_kernels, "forward", refuse)
    status, lines = run()
    assert status == 1
    assert lines["check cpu"].startswith("failed: OSError: no memory for code (Numba kernels for the CPU")


def gpu(i):
    return SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=80 * 2**30)


def driver_too_old(i):
    raise RuntimeError("the driver is too old")


def to_a_device_that_is_not_there(a, *args, to=torch.Tensor.to, **options):
    if "device" in options and options["device"].type == "cuda":
        raise RuntimeError("no such device")
    return to(a, *args, **options)


@pytest.mark.parametrize(
    ("properties", "shown"),
    [
        (gpu, "A GPU, compute capability 9.0, 80 GiB"),
        (driver_too_old, "not found (RuntimeError: the driver is too old)"),
    ],
    ids=["named", "broken"],
)
def test_a_gpu_that_cannot_be_used_fails_its_check(run, monkeypatch, properties, shown):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.Tensor, "to", to_a_device_that_is_not_there)
    status, lines = run()
    assert status == 1
    assert lines["cuda:0"] == shown
    assert lines["check cuda:0"].startswith("failed: RuntimeError: no such device (Numba kernels for CUDA")
    assert lines["check cpu"].startswith("ok")


def test_devices_without_kernels_run_the_reference(run, monkeypatch):
    monkeypatch.setattr(report, "_devices", lambda: [(torch.device("mps"), "Metal")])
    monkeypatch.setattr(numsru, "sru_recurrence", reference.sru_recurrence)
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda a, device="cpu", dtype=None: to(a, "cpu", dtype or a.dtype))
    status, lines = run()
    assert status == 0
    assert "reference" in lines["check mps"]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("cuda.pathfinder", ["nvvm", "nvrtc", "nvJitLink"]),
        ("numba.core.caching", ["kernel cache"]),
    ],
)
def test_what_is_missing_is_named(run, monkeypatch, module, names):
    monkeypatch.setitem(sys.modules, module, None)
    status, lines = run()
    assert status == 0
    assert all(lines[name].startswith("not found (ModuleNotFoundError: ") for name in names)


def test_a_package_that_is_missing_is_named(run, monkeypatch):
    monkeypatch.setattr(report, "PACKAGES", ("numsru-does-not-exist",))
    assert run()[1]["numsru-does-not-exist"].startswith("not found")
