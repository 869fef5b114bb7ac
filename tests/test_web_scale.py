"""CapFilt on Parquet and on stores: what is read and written, by addresses, without half files, in flat memory."""

import functools
import hashlib
import http.server
import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image
from scripts import ROOT, run_here, settings

import files
from bootstrap.tars import TarOutput
from data.parquet import read_list
from data.pretrain import open_lists
from data.shards import count_pairs
from data.tars import expand, is_shard, read_shard
from files import open_store, write_whole
from miniature.writing import write_miniature
from utils import UserError

pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
MODEL = str(ROOT / "configs" / "miniature" / "model.safetensors")
NUM_PAIRS, BROKEN = 12, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder and web pairs of a miniature world; the fifth image is broken."""
    folder = tmp_path_factory.mktemp("world")
    write_miniature(folder, level=1, num_train=4, num_val=2, num_test=2, num_web=NUM_PAIRS)
    rows = json.loads((folder / "annotations" / "pretrain_web.json").read_text())
    (folder / rows[BROKEN]["image"]).write_bytes(b"broken")
    return folder, rows


def samples(world):
    """Rows as img2dataset writes them: one failed download, and a row without text."""
    rows = [
        {"key": f"{i:09d}", "url": f"https://x.org/{i}", "caption": row["caption"], "status": "success",
         "sha256": "", "width": 1, "jpg": (world[0] / row["image"]).read_bytes()} for i, row in enumerate(world[1])
    ]  # fmt: skip
    return [*rows, {**rows[0], "status": "failed_to_download", "jpg": None}, {**rows[0], "caption": None}]


def write(path, rows, group=5):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


def arguments(folder, pairs, **more):
    values = dict(pairs=f"[{', '.join(map(repr, map(str, pairs)))}]", captioner=MODEL, filter=MODEL, max_length=40,
                  shard_size=5, batch_size=4, num_workers=0) | more  # fmt: skip
    return ["--config", ROOT / "configs" / "capfilt.yaml", "--output_dir", folder, *settings(**values)]


def capfilt(*args, **more):
    code, told = run_here("capfilt.py", *arguments(*args, **more))
    assert code == 0, told


def rows_of(*paths):
    return [row for path in paths for row in parquet.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A run over a Parquet file with images, with Parquet as the result."""
    folder = tmp_path_factory.mktemp("whole")
    source = write(folder / "00000.parquet", samples(world))
    capfilt(folder / "out", [source], parquet=True)
    return source, folder / "out"


def test_images_in_parquet_become_rows_with_both_texts(world, whole):
    rows = rows_of(whole[1] / "bootstrapped" / "00000.parquet")
    assert [int(row["key"]) for row in rows] == [i for i in range(NUM_PAIRS) if i != BROKEN]
    for row in rows:
        web = world[1][int(row["key"])]
        content = (world[0] / web["image"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(content).hexdigest() and row["url"] == f"https://x.org/{int(row['key'])}"
        assert (row["width"], row["height"]) == Image.open(io.BytesIO(content)).size
        assert len(row["web"]) == len(row["synthetic"]) == len(row["web_scores"]) == len(row["synthetic_scores"]) == 1
        kept = zip(row["web"] + row["synthetic"], row["web_scores"] + row["synthetic_scores"], strict=True)
        assert row["caption"] == [text for text, score in kept if score >= 0.5]
    (bad,) = (json.loads(line) for line in (whole[1] / "unreadable.jsonl").read_text().splitlines())
    assert "00000.parquet: 000000004: an image cannot be read" in bad["error"]


def test_parquet_becomes_tars_that_training_reads(whole, tmp_path):
    capfilt(tmp_path, [whole[0]])
    found = [record.caption for record in read_shard(str(tmp_path / "bootstrapped" / "00000.tar"))]
    assert found == [text for row in rows_of(whole[1] / "bootstrapped" / "00000.parquet") for text in row["caption"]]
    assert count_pairs([whole[0]]) == NUM_PAIRS


def test_hugging_face_images_and_names_are_read(world, tmp_path):
    rows = [{"image": {"bytes": row["jpg"], "path": "a"}, "text": row["caption"]} for row in samples(world)[:3]]
    records = list(read_shard(write(tmp_path / "a.parquet", rows)))
    assert [record.key for record in records] == ["000000000", "000000001", "000000002"]
    assert [record.image for record in records] == [row["image"]["bytes"] for row in rows]
    assert {record.ending for record in records} == {world[1][0]["image"].rpartition(".")[2]}


def test_lists_in_parquet_equal_json_lists(world, tmp_path):
    capfilt(tmp_path / "json", [world[0] / "annotations" / "pretrain_web.json"], image_root=world[0])
    rows = [{"image": row["image"], "caption": row["caption"]} for row in world[1]]
    for number, part in enumerate((rows[:7], rows[7:])):
        write(tmp_path / f"part-{number}.parquet", part)
    capfilt(tmp_path / "out", [tmp_path / "part-*.parquet"], image_root=world[0], parquet=True)
    for name in ("bootstrapped", "dropped", "unreadable"):
        assert (tmp_path / "out" / f"{name}.jsonl").read_bytes() == (tmp_path / "json" / f"{name}.jsonl").read_bytes()
    made = sorted((tmp_path / "out" / "bootstrapped").glob("*.parquet"))
    (pairs,) = open_lists([write(tmp_path / "joined.parquet", rows_of(*made))])  # the result is itself a list
    kept = [json.loads(line) for line in (tmp_path / "out" / "bootstrapped.jsonl").read_text().splitlines()]
    assert [pairs[i] for i in range(len(pairs))] == [(row["image"], row["caption"]) for row in kept]


def test_lists_lead_to_images_by_key_or_url(tmp_path):
    row = {"key": "000010003", "url": "https://x.org/3", "caption": "a dog", "status": "success"}
    path = write(tmp_path / "00001.parquet", [row, {**row, "status": "failed_to_download"}, {**row, "caption": " "}])
    assert not is_shard(path) and list(open_lists([path])[0][i] for i in range(1)) == [("00001/000010003.jpg", "a dog")]
    published = write(tmp_path / "p.snappy.parquet", [{"URL": "https://x.org/3", "TEXT": "a dog"}])
    (pairs,) = open_lists([published])
    assert len(pairs) == 1 and pairs[0][0].endswith(".jpg") and pairs[0][1] == "a dog"


def test_any_address_in_and_out(world, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP_CACHE", str(tmp_path / "cache"))
    store, _ = open_store("memory://")
    store.pipe("/in/00000.parquet", Path(whole[0]).read_bytes())
    store.pipe("/out/00007.parquet", b"of a run with more input")
    store.pipe("/out/00000.parquet.part1", b"of a killed run")
    capfilt(tmp_path / "a", ["memory://in/*.parquet"], parquet=True, output="memory://out")
    assert store.ls("/out", detail=False) == ["/out/00000.parquet"]
    assert store.cat("/out/00000.parquet") == (whole[1] / "bootstrapped" / "00000.parquet").read_bytes()
    capfilt(tmp_path / "b", ["memory://in/00000.parquet"], output="memory://tars")
    texts = [record.caption for record in read_shard("memory://tars/00000.tar")]
    assert texts == [text for row in rows_of(whole[1] / "bootstrapped" / "00000.parquet") for text in row["caption"]]
    store.pipe("/list.json", json.dumps(world[1]).encode())
    store.put(str(world[0]) + "/", "/images", recursive=True)
    capfilt(tmp_path / "c", ["memory://list.json"], image_root="memory://images", stage="caption")
    assert len((tmp_path / "c" / "bootstrapped.jsonl").read_text().splitlines()) == 2 * (NUM_PAIRS - 1)


def test_shards_of_a_server(whole, tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec's http:// needs aiohttp")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(whole[1].parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        capfilt(tmp_path / "out", [f"{address}/{{00000..00000}}.parquet"], parquet=True)
        code, told = run_here("capfilt.py", *arguments(tmp_path / "none", [f"{address}/00001.parquet"]))
        assert code == 2 and "00001.parquet" in told.splitlines()[-1]
        server.shutdown()
    made = (tmp_path / "out" / "bootstrapped" / "00000.parquet").read_bytes()
    assert made == (whole[1] / "bootstrapped" / "00000.parquet").read_bytes()


def test_no_half_object_after_an_error_a_refusal_or_a_kill(tmp_path, monkeypatch):
    store, _ = open_store("memory://")
    with pytest.raises(KeyError), write_whole("memory://half/a.tar", "wb") as file:
        file.write(b"half")
        raise KeyError
    assert not store.exists("/half/a.tar")
    code = "import os, files\nwith files.write_whole('file://{}/a.tar', 'wb') as file:\n"
    code += " file.write(b'x' * 10**6)\n store = files.open_store('file://')[0]\n"
    code += " type(store).mv = lambda *_: os.kill(os.getpid(), 9)\n"
    killed = subprocess.run([sys.executable, "-c", code.format(tmp_path)], cwd=ROOT)
    assert killed.returncode == -9 and [path.name.partition(".part")[0] for path in tmp_path.iterdir()] == ["a.tar"]
    assert not (tmp_path / "a.tar").exists()
    monkeypatch.setattr(type(store), "put_file", lambda *_: (_ for _ in ()).throw(OSError("quota")))
    said = r"memory://half/b could not be written \(OSError: quota\)"
    with pytest.raises(UserError, match=said), write_whole("memory://half/b", "wb") as file:
        file.write(b"whole")
    assert TarOutput("memory://half").path(3) == "memory://half/00003.tar"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nosuch://b/0.tar", "Protocol not known: nosuch"),
        ("{folder}/none.parquet", "does not exist; correct pairs"),
        ("{folder}/damaged.parquet", "damaged.parquet cannot be read"),
        ("{folder}/columns.parquet", "has the columns a, b; expected 'caption'"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, name, said):
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    write(tmp_path / "columns.parquet", [{"a": 1, "b": 2}])
    code, told = run_here("capfilt.py", *arguments(tmp_path / "out", [name.format(folder=tmp_path)]))
    assert code == 2 and said in told.splitlines()[-1] and told.splitlines()[-1].startswith("error: ")


def test_a_file_damaged_in_the_middle_is_named_and_the_images_before_it_are_kept(world, tmp_path):
    path = write(tmp_path / "00000.parquet", samples(world)[:NUM_PAIRS], group=2)
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    Path(path).write_bytes(content)
    capfilt(tmp_path / "out", [path], stage="caption")
    assert "cannot be read to its end" in (tmp_path / "out" / "unreadable.jsonl").read_text()


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch, world):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, told = run_here("capfilt.py", *arguments(tmp_path / "a", [tmp_path / "0.parquet"]))
    assert code == 2 and "does not exist" in told.splitlines()[-1]
    (tmp_path / "0.parquet").write_bytes(b"")
    code, told = run_here("capfilt.py", *arguments(tmp_path / "a", [tmp_path / "0.parquet"]))
    assert code == 2 and told.splitlines()[-1].endswith("0.parquet needs pyarrow; pip install pyarrow")


def test_memory_does_not_grow_with_a_file(tmp_path):
    """One row group; pyarrow holds some of its pages at a time."""
    peaks = []
    for number in (100_000, 300_000):
        columns = {"image": [f"{i}.jpg" for i in range(number)], "caption": [f"a text {i}" for i in range(number)]}
        parquet.write_table(pyarrow.table(columns), tmp_path / "list.parquet", row_group_size=number)
        del columns
        rows = enumerate(read_list(tmp_path / "list.parquet"))
        held = [pyarrow.total_allocated_bytes() for i, _ in rows if i % 99 == 0]
        peaks.append(max(held))
        assert len(held) == -(-number // 99)
    assert peaks[1] < 1.1 * peaks[0]


def test_a_folder_of_tars_and_their_tables_gives_the_tars(whole, tmp_path):
    for name in ("00000.tar", "00000.parquet"):
        (tmp_path / name).write_bytes(b"")
    assert expand([str(tmp_path)]) == [str(tmp_path / "00000.tar")]
    (tmp_path / "00000.tar").unlink()
    assert expand([str(tmp_path)]) == [str(tmp_path / "00000.parquet")]
    assert files.is_address("s3://a/b") and not files.is_address("pipe:aws s3 cp s3://a -")
