"""Files of torch.save are read without importing or executing anything that they name."""

import builtins
import collections
import functools
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_adam import ConfigError
from lightning_adam.reports.inspection.checkpoint import read
from lightning_adam.reports.inspection.saved_optimizer import saved_optimizers
from lightning_adam.reports.inspection.unpickling import SafeUnpickler, Unknown, load
from tests.support.tables import each_row

FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __call__(self) -> None:
        """Makes pickle call the result of another call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


class Subclass(Tensor):
    """A tensor subclass with an unknown meaning of its elements."""


def save(content: Any, is_zip: bool = True, path: Path = Path("file.pt")) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return path


def stepped(**settings: Any) -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], **settings)
    weight.grad = torch.ones(3)
    optimizer.step()
    return optimizer


@FORMATS
def test_calls_in_a_file_are_not_made(is_zip: bool) -> None:
    torch.save(Call(os.mkdir, "hostile"), "other.pt")
    imported = Call(builtins.__import__, "os")
    calls = [
        Call(os.system, "mkdir hostile"),
        Call(os.mkdir, "hostile"),
        Call(subprocess.run, ["mkdir", "hostile"]),
        Call(eval, "__import__('os').mkdir('hostile')"),
        Call(exec, "import os; os.mkdir('hostile')"),
        Call(open, "hostile", "w"),
        Call(Call(getattr, imported, "mkdir"), "hostile"),
        Call(Call(functools.partial, os.mkdir, "hostile")),
        Call(functools.reduce, getattr, ["mkdir", "hostile"], imported),
        Call(map, os.mkdir, ["hostile"]),
        Call(torch.load, "other.pt", "cpu", None, False),
        Call(torch.save, [], "hostile"),
        Call(torch.jit.load, "other.pt"),
        Call(torch.serialization.add_safe_globals, [os.mkdir]),
    ]
    with each_row() as row:
        for call in calls:
            with row(call.function):
                found = load(save({"hyper_parameters": call, "kept": torch.ones(2)}, is_zip))
                assert isinstance(found["hyper_parameters"], Unknown)
                assert torch.equal(found["kept"], torch.ones(2))
                assert not Path("hostile").exists()
    assert os.mkdir not in torch.serialization.get_safe_globals()


@FORMATS
def test_modules_are_not_imported(
    is_zip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_code.py").write_text("class Config: ...\ndef function(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    users_code = __import__("users_code")
    path = save({"config": users_code.Config(), "function": users_code.function}, is_zip)
    del sys.modules["users_code"]
    before = {*sys.modules}
    found = load(path)
    assert {*sys.modules} == before
    assert found["config"].__name__ == "users_code.Config"
    assert found["function"].__name__ == "users_code.function"


@FORMATS
def test_plain_values_and_tensors_equal_those_that_were_saved(is_zip: bool) -> None:
    parameter = nn.Parameter(torch.randn(2, 3))
    parameter.tag = "a name"  # type: ignore[attr-defined]
    ordered = collections.OrderedDict(b=1, a=(2.5, [None, True]))
    default = collections.defaultdict(list, {3: ["x", b"\xff"]})
    values = {"ordered": ordered, "default": default, "lr": np.float64(0.1), "step": np.int64(3)}
    tensors = {
        "view": torch.arange(10.0)[2:8:2],
        "transposed": torch.randn(2, 3).t(),
        "parameter": parameter,
        "attribute": parameter.data.clone(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
        **{str(each): torch.ones(3).to(each) for each in (torch.bfloat16, torch.float8_e4m3fn)},
        "unsigned": torch.ones(3, dtype=torch.uint16),
        "complex": torch.randn(2, dtype=torch.complex64),
    }
    tensors["attribute"].tag = "a name"  # type: ignore[attr-defined]
    found = load(save({**values, **tensors}, is_zip))
    assert {name: found[name] for name in values} == values
    for name, tensor in tensors.items():
        assert type(found[name]) is Tensor
        assert (found[name].dtype, found[name].stride()) == (tensor.dtype, tensor.stride())
        assert found[name].tolist() == tensor.tolist()


def test_environment_that_forces_the_unpickler_of_torch_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    assert load(save({"path": Path("a"), "step": 3}, is_zip=True))["step"] == 3
    assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"


def test_objects_of_other_classes_are_named() -> None:
    rows: list[tuple[Any, str]] = [
        (Path("folder"), f"{type(Path()).__module__}.PosixPath"),
        (torch.ones(3).as_subclass(Subclass), f"{__name__}.Subclass"),
        (torch.ones(1).expand(5), "torch.Tensor (expanded)"),
        (torch.nn.Linear(2, 3), "torch.nn.modules.linear.Linear"),
        (np.ones(3), "numpy._core.multiarray._reconstruct"),
    ]
    with each_row() as row:
        for value, name in rows:
            with row(name):
                assert load(save([value]))[0].__name__ == name


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle_is_read(protocol: int) -> None:
    content = {"text": "x" * 1000, "bytes": bytearray(b"x"), "set": {1}, "kept": torch.ones(2)}
    torch.save({**content, "module": nn.Linear(2, 3)}, "file.pt", pickle_protocol=protocol)
    found = load(Path("file.pt"))
    assert found["text"] == content["text"]
    assert torch.equal(found["kept"], torch.ones(2))
    assert found["module"].__name__ == "torch.nn.modules.linear.Linear"


@FORMATS
def test_state_of_an_unknown_tensor_class_is_named(is_zip: bool) -> None:
    state = stepped().state_dict()
    state["state"][0]["exp_avg_sq"] = torch.ones(3).as_subclass(Subclass)
    message = r"exp_avg_sq is of class tests\..*Subclass, which cannot be read without its code"
    with pytest.raises(ConfigError, match=message):
        saved_optimizers(read(save(state, is_zip)))


# ---- Damage that no call needs


def test_states_of_functions_and_classes_are_not_changed() -> None:
    """Pickle's BUILD would set any attribute of any object."""
    names = [b"ctorch._utils\n_rebuild_parameter\n", b"ccollections\nOrderedDict\n"]
    for name in names:
        state = b"}U\x0c__defaults__(K\x01K\x02tsU\x04evilK\x01s"
        found = SafeUnpickler(io.BytesIO(b"\x80\x02" + name + b"N" + state + b"\x86b.")).load()
        assert found is SafeUnpickler(io.BytesIO(b"\x80\x02" + name + b".")).load()
        assert found.__defaults__ is None
        assert not hasattr(found, "evil")


def storage(numel: int) -> bytes:
    """Instructions that load a storage of float32, as in a legacy file."""
    number = pickle.dumps(numel, protocol=2)[2:-1]
    return (
        b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number + b"NtQ"
    )


def tensor(size: int, stride: int) -> bytes:
    """Instructions that build a vector over a storage of four elements."""
    shape = pickle.dumps((size,), protocol=2)[2:-1]
    function = b"ctorch._utils\n_rebuild_tensor\n"
    return function + b"(" + storage(4) + b"K\0" + shape + b"K" + bytes([stride]) + b"\x85tR"


def save_legacy(body: bytes) -> Path:
    """Saves a legacy file with some instructions, and without the data of its storages."""
    head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]
    parts = [pickle.dumps(each, protocol=2) for each in head]
    content = b"".join([*parts, b"\x80\x02" + body + b".", pickle.dumps([], protocol=2)])
    Path("file.pt").write_bytes(content)
    return Path("file.pt")


def test_instructions_that_torch_does_not_write_fail() -> None:
    rows = [
        ("a storage is larger than the file", storage(1 << 20)),
        ("a storage is larger than the file", storage(-1)),
        ("out of bounds for storage", tensor(1 << 20, stride=1)),
        ("not a container", tensor(4, stride=1) + b"(K\x01\x90"),
        ("not a container", tensor(4, stride=1) + b"K\0K\x01s"),
        ("130", b"\x82\x01"),
    ]
    with each_row() as row:
        for message, body in rows:
            with row(message), pytest.raises(Exception, match=message):
                load(save_legacy(body))
    assert load(save_legacy(tensor(4, stride=1))).shape == (4,)


def test_functions_that_allocate_memory_are_not_called() -> None:
    size = 1 << 60
    for call in (Call(bytearray, size), Call(torch.empty, size)):
        assert isinstance(load(save([call]))[0], Unknown)
    with pytest.raises(TypeError, match="not callable"):
        load(save([Call(torch.UntypedStorage, size)]))
    assert load(save_legacy(tensor(1 << 40, stride=0))).__name__ == "torch.Tensor (expanded)"


# ---- Other formats


def test_archive_of_torchscript_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with zipfile.ZipFile("script.pt", "w") as file:
        for name in ("data.pkl", "constants.pkl", "version"):
            file.writestr(f"archive/{name}", "3")
    with pytest.raises(ConfigError, match=r"cannot be read: .*\(it is a TorchScript archive\)"):
        read(Path("script.pt"))


def test_tar_archive_is_not_extracted(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("storages").write_bytes(pickle.dumps(0))
    with tarfile.open("file.tar", "w") as file:
        file.add("storages")
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(ConfigError, match="cannot be read: it is damaged, or not a file of"):
        read(Path("file.tar"))
