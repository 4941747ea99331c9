"""What was found fastest is there for the next process, under a name that says what it is good for."""

from pathlib import Path

from kernels.kept import Kept
from regpt.kernels.tuned import Tuned


def test_bytes_are_kept_for_their_key_and_device_only(tmp_path: Path):
    key = ((3, 4), True, None)
    Tuned("one device", lambda name: Kept(tmp_path / name)).put(key, b"fast")
    again = Tuned("one device", lambda name: Kept(tmp_path / name))
    assert again.get(((3, 4), True, None)) == b"fast"
    assert again.get(((3, 5), True, None)) is None
    assert Tuned("another", lambda name: Kept(tmp_path / name)).get(key) is None
    again.put(key, b"faster")
    assert again.get(key) == b"faster"
    assert all(int(path.name, 16) >= 0 for path in tmp_path.iterdir())  # Triton wants hexadecimal names


def test_damaged_bytes_are_as_good_as_none(tmp_path: Path):
    tuned = Tuned("a device", lambda name: Kept(tmp_path / name))
    tuned.put(1, b"fast")
    (path,) = tmp_path.glob("*/*")
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], bytes([*whole[:-1], whole[-1] ^ 1]), whole + b"x"):
        path.write_bytes(damaged)
        assert tuned.get(1) is None
    path.write_bytes(whole)
    assert tuned.get(1) == b"fast"
