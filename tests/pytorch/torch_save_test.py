"""What torch.save writes is read without torch, and as torch reads it."""

import pickle
import re
import zipfile

import numpy as np
import pytest
from read_test import refusal, repack
from torch_files import save_torch

from personmae_jax.pytorch.read import open_file


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_of_every_pickle_protocol_and_type_are_read_as_torch_reads_them(
    is_zip, protocol, tmp_path
):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    flat = torch.randn(40)
    content = {
        "view": flat[3:15].view(3, 4),
        "transposed": flat[3:15].view(3, 4).t(),
        "strided": flat[::5],
        "parameter": torch.nn.Parameter(flat[:2].double()),
        "half": flat.half(),
        "bfloat": flat.bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    path = tmp_path / "f.pth"
    torch.save(
        {"model": content, "steps": torch.arange(5)},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=is_zip,
    )
    tree = open_file(path).tree
    expected = torch.load(path, weights_only=False)["model"]
    assert tree["model"].keys() == expected.keys()
    for name, tensor in expected.items():
        stored = tree["model"][name]
        assert (stored.shape, f"torch.{stored.dtype}") == (
            tensor.shape,
            str(tensor.dtype),
        )
        np.testing.assert_array_equal(stored.array(), tensor.detach().float().numpy())
    assert tree["steps"].dtype == "int64"


def test_a_flipped_bit_of_a_tensor_is_found(tmp_path):
    path = save_torch(tmp_path / "f.pth", {"w": np.full(300, 1.5, "f4")})
    content = bytearray(path.read_bytes())
    content[content.index(np.full(300, 1.5, "f4").tobytes()) + 600] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="unreadable .*CRC"):
        open_file(path).tree["w"].array()


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickles_that_ask_for_the_impossible_are_refused(is_zip, tmp_path):
    path = save_torch(
        tmp_path / "f.pth", {"w": 123}, _use_new_zipfile_serialization=is_zip
    )
    for hostile in (
        b"})" + b"\x85" * 200_000 + b"K\x01s.",
        b"\x8e" + b"\xff" * 7 + b"\x7f.",
        b"\x96" + b"\xff" * 4 + bytes(4) + b".",
        b"I" + b"9" * 5000 + b"\n.",
        b"\x8b\xff\xff\xff\x7f.",
        # A storage named by tuples in tuples, whose text has 2**60 brackets.
        b"(U\x07storagectorch\nFloatStorage\n)" + b"2\x86" * 60 + b"U\x03cpuK\x01tQ.",
    ):
        change = lambda name, data, hostile=hostile: (  # noqa: E731
            b"\x80\x02" + hostile if name.endswith("data.pkl") else data
        )
        out = tmp_path / "hostile.pth"
        if is_zip:
            repack(path, out, change=change)
        else:
            whole = path.read_bytes()
            start = [m.start() for m in re.finditer(rb"\x80\x02", whole)][3]
            out.write_bytes(whole[:start] + b"\x80\x02" + hostile)
        assert "cannot be read (" in refusal(out)


def test_whole_files_of_another_kind_are_not_called_damaged(tmp_path):
    path = tmp_path / "f.pth"
    path.write_bytes(pickle.dumps({"a": np.zeros(3)}))
    assert refusal(path).endswith("is a pickle, but none that torch.save wrote")
    save_torch(path, {"a": np.zeros(3, np.float32)})
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for more, words in (({}, "compressed zip"), ({"f/constants.pkl": b""}, "TorchS")):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in (parts | more).items():
                archive.writestr(name, data)
        assert words in refusal(path)
        assert "damaged" not in refusal(path)
