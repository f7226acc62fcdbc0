"""Files of strangers: read without running anything, or refused in one sentence."""

import collections
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_files import save_torch, training_state

from personmae_jax.errors import ConfigError
from personmae_jax.pytorch.read import open_file
from personmae_jax.pytorch.stored import Stored


def refusal(path) -> str:
    with pytest.raises(ConfigError) as error:
        open_file(path)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"config.init.torch_weights={path}")
    return text


class Hostile:
    """Makes the file that it is given when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return pathlib.Path.touch, (self.file,)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_file_is_never_run_and_the_tensors_beside_it_are_read(
    is_zip, tmp_path
):
    ran = tmp_path / "ran"
    content = {"model": {"w": np.ones(2, "f4")}, "args": Hostile(ran)}
    content |= {"list": [Hostile(ran)], "namespace": training_state()["args"]}
    content["namespace"].callback = Hostile(ran)
    path = save_torch(
        tmp_path / "f.pth", content, _use_new_zipfile_serialization=is_zip
    )
    np.testing.assert_array_equal(open_file(path).tree["model"]["w"].array(), [1, 1])
    assert not ran.exists()
    torch = pytest.importorskip("torch")
    torch.load(path, weights_only=False)
    assert ran.exists(), "the file of this test is harmless"


def test_a_bare_pickle_with_code_is_refused_and_never_run(tmp_path):
    path, ran = tmp_path / "f.pth", tmp_path / "ran"
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps(Hostile(ran), protocol))
        refusal(path)
    assert not ran.exists()


def test_objects_of_unknown_types_hide_nothing_beside_them(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    content = training_state() | {
        "lr": np.float64(0.5),
        "path": pathlib.PurePosixPath("/a"),
        "module": torch.nn.Linear(2, 2),
        "set": {1, 2},
        "size": torch.Size([1]),
        "type": torch.float32,
        "defaults": collections.defaultdict(int, a=1),
        "ordered": collections.OrderedDict(b=2),
        "w": np.ones(2, "f4"),
    }
    tree = open_file(save_torch(tmp_path / "f.pth", content)).tree
    assert tree["lr"] == 0.5
    assert tree["defaults"] == {"a": 1}
    assert tree["ordered"] == {"b": 2}
    assert tree["path"].name == "pathlib.PurePosixPath"
    np.testing.assert_array_equal(tree["w"].array(), [1, 1])


def test_files_of_torch_before_its_zip_format_are_read(tmp_path):
    content = {"model": {"w": np.arange(3, dtype="f4")}}
    path = save_torch(tmp_path / "f.pth", content, _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(open_file(path).tree["model"]["w"].array(), [0, 1, 2])


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_was_cut_short_is_refused_wherever_it_was_cut(is_zip, tmp_path):
    content = {"model": {f"w{i}": np.ones((20, 5), "f4") for i in range(3)}}
    path = save_torch(
        tmp_path / "whole.pth", content, _use_new_zipfile_serialization=is_zip
    )
    whole, cut = path.read_bytes(), tmp_path / "cut.pth"
    for size in range(0, len(whole) - 1, 97):
        cut.write_bytes(whole[:size])
        reasons = ("is empty", "neither", "cannot be read (", "is a pickle, but none")
        assert any(reason in refusal(cut) for reason in reasons)
    cut.write_bytes(b"")
    assert "is empty" in refusal(cut)


def test_a_safetensors_file_that_was_cut_short_is_refused(tmp_path):
    path = tmp_path / "f.safetensors"
    save_file({"w": np.ones((20, 5), "f4")}, path)
    whole = path.read_bytes()
    for size in range(9, len(whole), 31):
        path.write_bytes(whole[:size])
        assert "damaged, cut short" in refusal(path)


def test_a_safetensors_header_that_claims_more_than_there_is_is_refused(tmp_path):
    header = b'{"w":{"dtype":"F32","shape":[1000000000,1000000],"data_offsets":[0,16]}}'
    path = tmp_path / "f.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert "damaged, cut short" in refusal(path)
    path.write_bytes((2**60).to_bytes(8, "little") + header)
    assert "damaged, cut short" in refusal(path)


def test_a_safetensors_header_that_names_a_tensor_twice_is_refused(tmp_path):
    path = tmp_path / "f.safetensors"
    first = b'"w":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}'
    header = b"{%b,%b}" % (first, first.replace(b"[1,2]", b"[2,1]"))
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert "(it names 'w' more than once); it is damaged" in refusal(path)


@pytest.mark.parametrize(
    "data", [b"<html>Quota exceeded</html>", b"version https://git-lfs", b"\x93NUMPY"]
)
def test_a_file_of_another_kind_is_refused(data, tmp_path):
    path = tmp_path / "f.pth"
    path.write_bytes(data)
    assert "neither a PyTorch nor a safetensors file" in refusal(path)


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    np.savez(tmp_path / "f.npz", w=np.ones(3))
    assert "is an .npz file of numpy" in refusal(tmp_path / "f.npz")


def repack(path, out, compression=zipfile.ZIP_STORED, change=lambda name, data: data):
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out


def test_a_zip_that_unpacks_to_more_than_itself_is_refused(tmp_path):
    path = save_torch(tmp_path / "f.pth", {"w": np.zeros(100_000, "f4")})
    bomb = repack(path, tmp_path / "bomb.pth", zipfile.ZIP_DEFLATED)
    assert "is a compressed zip" in refusal(bomb)


def test_a_tensor_that_claims_more_than_is_stored_is_refused(tmp_path):
    """Its shape and its storage both say 2**20 elements; the file holds 300."""
    path = save_torch(tmp_path / "f.pth", {"w": np.zeros(300, "f4")})

    def enlarge(name, data):
        old, new = (
            b"M" + (300).to_bytes(2, "little"),
            b"J" + (2**20).to_bytes(4, "little"),
        )
        assert not name.endswith("data.pkl") or data.count(old) == 2
        return data.replace(old, new) if name.endswith("data.pkl") else data

    stored = open_file(repack(path, tmp_path / "liar.pth", change=enlarge)).tree["w"]
    with pytest.raises(ValueError, match="of more numbers than are stored"):
        stored.array()


def test_a_tensor_that_repeats_what_its_storage_only_claims_is_not_blown_up(tmp_path):
    """Strides of 0 over 300 numbers; both size and storage say 2**20."""
    path = save_torch(tmp_path / "f.pth", {"w": np.zeros(300, "f4")})

    def enlarge(name, data):
        if not name.endswith("data.pkl"):
            return data
        old, new = (
            b"M" + (300).to_bytes(2, "little"),
            b"J" + (2**20).to_bytes(4, "little"),
        )
        data = data.replace(old, new)
        stride = new + b"\x85"
        at = data.rindex(b"K\x01\x85")  # the tuple of strides, after that of sizes
        assert stride in data[:at]
        return data[:at] + b"K\x00\x85" + data[at + 3 :]

    stored = open_file(repack(path, tmp_path / "liar.pth", change=enlarge)).tree["w"]
    assert stored.shape == (2**20,)
    with pytest.raises(ValueError, match="repeated to 1048576 out of fewer"):
        stored.array()


def test_a_tensor_that_repeats_its_numbers_is_not_blown_up(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    path = tmp_path / "f.pth"
    torch.save({"w": torch.zeros(1).expand(10**9, 10**6)}, path)
    stored = open_file(path).tree["w"]
    assert stored.shape == (10**9, 10**6)
    with pytest.raises(ValueError, match="repeated to 1000000000000000 out of fewer"):
        stored.array()


@pytest.mark.parametrize("make", ["complex64", "int8", "float8"])
def test_tensors_that_are_no_plain_floats_are_refused(make, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.ones(2, 2)
    tensor = {
        "complex64": lambda: tensor.to(torch.complex64),
        "int8": lambda: tensor.to(torch.int8),
        "float8": lambda: tensor.to(torch.float8_e4m3fn),
    }[make]()
    torch.save({"w": tensor}, tmp_path / "f.pth")
    with pytest.raises(ValueError, match="of type"):
        open_file(tmp_path / "f.pth").tree["w"].array()


def test_a_dict_that_holds_itself_is_read(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    content = {"w": torch.ones(1)}
    content["model"] = content
    torch.save(content, tmp_path / "f.pth")
    tree = open_file(tmp_path / "f.pth").tree
    assert isinstance(tree["model"]["model"]["w"], Stored)


def test_dicts_that_share_their_entries_are_not_unfolded(tmp_path):
    """Read entry by entry this file has 200 ** 5 dicts."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    inner = {"w": torch.ones(1)}
    for _ in range(8):
        inner = dict.fromkeys(map(str, range(200)), inner)
    torch.save(inner, tmp_path / "f.pth")
    open_file(tmp_path / "f.pth")


def test_a_whole_module_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "f.pth")
    text = refusal(tmp_path / "f.pth")
    assert "holds a torch.nn.modules.linear.Linear, not a dict" in text
    assert "torch.save its state_dict()" in text


def test_a_lone_tensor_is_refused(tmp_path):
    path = save_torch(tmp_path / "f.pth", np.ones(3))
    assert "holds a stored, not a dict of named tensors" in refusal(path)


def test_missing_files_folders_and_buckets_are_refused(tmp_path):
    assert "there is no such file" in refusal(tmp_path / "none.pth")
    assert "copy it to a disk of every host" in refusal("gs://bucket/file.pth")
    assert "is a folder; name a file" in refusal(tmp_path)


def test_the_folder_of_hugging_face_is_read_by_its_weights(tmp_path):
    save_file({"w": np.ones(2, "f4")}, tmp_path / "model.safetensors")
    assert open_file(tmp_path).tree.keys() == {"w"}


@pytest.mark.parametrize("place", ["stat", "open"])
def test_a_file_or_folder_that_may_not_be_read_is_refused(place, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "f.pth").write_bytes(b"PK")
    if place == "stat":
        monkeypatch.setattr(os, "stat", denied)
    monkeypatch.setattr(os, "open", denied)
    assert "cannot be read (Permission denied)" in refusal(tmp_path / "f.pth")


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "f.pth")
    for path in (tmp_path / "f.pth", "/dev/zero"):
        assert "is a pipe or a device" in refusal(path)


def test_what_is_not_used_is_not_read(tmp_path):
    """An optimizer's state, say: damaged or huge, it costs nothing."""
    content = {"w": np.ones(2, "f4"), "other": np.full(3, np.nan, "f4")}
    tree = open_file(save_torch(tmp_path / "f.pth", content)).tree
    np.testing.assert_array_equal(tree["w"].array(), [1, 1])
    with pytest.raises(ValueError, match="not finite in 3 of 3 places"):
        tree["other"].array()


def test_arrays_outlive_the_file(tmp_path):
    path = save_torch(tmp_path / "f.pth", {"w": np.arange(4, dtype="f4")})
    array = open_file(path).tree["w"].array()
    path.write_bytes(b"")
    np.testing.assert_array_equal(array, [0, 1, 2, 3])
    assert array.flags.writeable
    assert array.flags.c_contiguous
