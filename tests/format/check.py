#!/usr/bin/env python3
"""Runs formats/read_archive.py over the golden archives, and over what mutations make of them: check.py [ROUNDS [SEED]]

Checked are exit codes, the content of each image, and that no mutation ends in an exception, or in an image that is said to be intact and is not.
Half of the mutations are sealed: one record changes, and all hashes that depend on it are made right again, as a hostile writer would.
"""
import collections
import contextlib
import hashlib
import importlib.util
import io
import json
import pathlib
import random
import resource
import struct
import sys
import tempfile
import time

import zstandard
from blake3 import blake3

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "formats"))
SPEC = importlib.util.spec_from_file_location("read_archive", ROOT / "formats" / "read_archive.py")
reader = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reader)
MAGIC = reader.MAGIC
SLOWEST = 20


def read(path, *options):
    """Runs the reader. Gives its exit code, what it says as JSON, and its messages."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["read_archive.py", str(path), "--json", *map(str, options)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = reader.main()
    except SystemExit as error:
        code = error.code
    finally:
        sys.argv = argv
    assert "unexpected" not in err.getvalue(), err.getvalue()
    return code, json.loads(out.getvalue() or "null"), err.getvalue()


def restored(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def golden(path):
    """Checks a golden archive. Gives for each commit its images and their content."""
    code, said, err = read(path, "--verify")
    if "critical-" in path.name:
        assert code == 3, (path, code, err)
        assert "unsupported" in err, err
        return {}
    assert code == 0, (path, code, err)
    wanted = collections.defaultdict(dict)
    for line in path.with_suffix(".sha256").read_text().splitlines():
        digest, _, name = line.partition("  ")
        wanted[int(name.partition("/")[0])][name.partition("/")[2]] = digest
    contents = {}
    for number, commit in enumerate(said["commits"], 1):
        images = wanted.get(number)
        assert all(image["intact"] is (images is not None) for image in commit["images"]), commit
        contents[commit["id"]] = commit["images"], images
        with tempfile.TemporaryDirectory() as folder:
            code, _, err = read(path, "--commit", commit["id"], "--to", folder)
            assert code == (0 if images is not None else 4), (path, code, err)
            assert restored(pathlib.Path(folder)) == (images or {}), (path, number)
    assert set(wanted) <= set(range(1, len(said["commits"]) + 1))
    return contents


def written_by_vmfold(path):
    """Checks an archive that vmfold wrote. Beside it stand the sums of its latest images, with `./` before each path."""
    wanted = dict(reversed(line.split("  ./", 1)) for line in path.with_suffix(".sha256").read_text().splitlines())
    with tempfile.TemporaryDirectory() as folder:
        code, _, err = read(path, "--to", folder)
        assert code == 0 and restored(pathlib.Path(folder)) == wanted, (path, code, err)
    code, _, err = read(path, "--verify")
    assert code == 0, (path, code, err)


def change(random_, data):
    """One to three small changes of some bytes."""
    data = bytearray(data)
    for _ in range(random_.randint(1, 3)):
        at = random_.randrange(len(data) + 1)
        length = random_.choice([1, 1, 2, 4, 8, 40, 96, 4096])
        piece = data[at : at + length]
        how = random_.randrange(8)
        if how < 3 and at < len(data):
            data[at] ^= 1 << random_.randrange(8)
        elif how == 3:
            data[at : at + length] = bytes(len(piece))
        elif how == 4:
            del data[at : at + length]
        elif how == 5:
            data[at:at] = piece
        elif how == 6:
            data[at : at + length] = random_.choice([b"\xff", b"\x80", b"\0", b"\x7f"]) * len(piece)
        elif at:
            del data[at:]
    return bytes(data)


def records(data):
    """The records of a whole archive, in order: header and body without its mask."""
    at = 0
    while (at := data.find(MAGIC, at)) >= 0 and at + 96 <= len(data):
        header = data[at : at + 96]
        length = struct.unpack_from("<Q", header, 48)[0]
        body = data[at + 96 : at + 96 + length]
        if blake3(header[:88]).digest()[:8] == header[88:] and len(body) == length:
            if header[14:16] != b"\0\0":
                body = bytes(a ^ b for a, b in zip(body, blake3(header[14:48]).digest(length=length)))
            yield header, body
        at += len(MAGIC)


def opened(kind, body):
    """What stands before a payload, its three bytes, and what it decodes to."""
    start = struct.unpack_from("<I", body, 72)[0] if kind == reader.COMMIT else 0
    encoding, named, stored = body[start], body[start + 1 : start + 4], body[start + 8 :]
    return body[:start], named, zstandard.ZstdDecompressor().decompress(stored) if encoding else stored


def sealed(random_, data):
    """Changes one record, and makes everything right that depends on it."""
    all_records = [one for one in records(data) if blake3(one[1]).digest() == one[0][56:88]]
    victim = random_.choice(all_records)[0][56:88]
    new, out = {}, bytearray()
    if random_.random() < 0.1:
        moved = all_records.pop(random_.randrange(len(all_records)))
        all_records.insert(random_.randrange(len(all_records) + 1), moved)
    for header, body in all_records:
        kind, old_hash = header[8], header[56:88]
        framed = kind in (reader.PLAN, reader.LIST, reader.COMMIT)
        clear, named, plain = opened(kind, body) if framed else (b"", b"", body)
        if old_hash in new and new[old_hash][1] is not None:
            body = new[old_hash][1]
        else:
            for old, (fresh, _) in new.items():
                plain, clear = plain.replace(old, fresh), clear.replace(old, fresh)
            if old_hash == victim:
                part = random_.randrange(8)
                if kind == reader.PACK and part < 4:
                    plain = reframed(random_, plain, new)
                elif clear and part < 2:
                    clear = change(random_, clear)
                else:
                    plain = change(random_, plain)
            if kind == reader.PACK:
                table_hashes(body, plain, new)
            body = clear + b"\0" + named + struct.pack("<I", len(plain)) + plain if framed else plain
        new[old_hash] = blake3(body).digest(), body
        header = header[:14] + bytes([MAGIC in body, 0]) + header[16:48] + struct.pack("<Q", len(body)) + blake3(body).digest()
        if MAGIC in body:
            body = bytes(a ^ b for a, b in zip(body, blake3(header[14:48]).digest(length=len(body))))
        if old_hash == victim and random_.random() < 0.1:
            header = change_head(random_, header)
        out += header + blake3(header).digest()[:8] + body
    return bytes(out)


def change_head(random_, header):
    header = bytearray(header)
    header[random_.randrange(8, 88)] ^= 1 << random_.randrange(8)
    return bytes(header)


def reframed(random_, body, new):
    """Changes one frame of a PACK together with its hash in the table."""
    body = bytearray(body)
    frames = struct.unpack_from("<I", body, 8)[0]
    wanted, at = random_.randrange(frames), 16 + 48 * frames
    for number in range(frames):
        row = 16 + 48 * number
        length = struct.unpack_from("<I", body, row + 4)[0]
        if number == wanted:
            stored = bytearray(body[at : at + length])
            stored[random_.randrange(length)] ^= 1 << random_.randrange(8)
            body[at : at + length] = stored
            body[row + 16 : row + 48] = blake3(stored).digest()
        at += length
    return bytes(body)


def table_hashes(old, plain, new):
    tables = []
    for body in (old, plain):
        if len(body) < 16:
            return
        tables.append(blake3(body[: 16 + 48 * struct.unpack_from("<I", body, 8)[0]]).digest())
    if tables[0] != tables[1]:
        new[tables[0]] = tables[1], None


def mutant(path, data, contents, all_contents, is_sealed):
    """Reads a mutated archive twice; what is said to be intact must be so."""
    path.write_bytes(data)
    start = time.monotonic()
    code, said, err = read(path, "--verify")
    assert code in (0, 3, 4), (code, err)
    assert code or said["commits"], "nothing is read, and that is no damage"
    ids = [one["id"] for one in said["commits"]]
    assert code or is_sealed or ids == list(contents)[: len(ids) if said["notes"] else None], "commits are missing without a word"
    for commit in said["commits"]:
        known = contents.get(commit["id"])
        assert is_sealed or known, "an unknown commit came of an unsealed mutation"
        for image in commit["images"]:
            if known and image["intact"]:
                assert image in known[0] or known[1] is None, (image, known[0])
        if code == 0 and known and not is_sealed and not commit["forgotten"]:
            assert len(commit["images"]) == len(known[0]), "images are missing without a word"
    for commit in said["commits"][-1:]:
        with tempfile.TemporaryDirectory() as folder:
            to_code, _, err = read(path, "--commit", commit["id"], "--to", folder)
            files = restored(pathlib.Path(folder))
            assert code or not to_code, (to_code, err)
            assert set(files.values()) <= all_contents, (files, err)
            intact = {image["path"] for image in commit["images"] if image["intact"]}
            assert intact <= set(files), (intact, set(files), err)
    assert time.monotonic() - start < SLOWEST, "it took too long"
    return code


def places(data):
    """Where each record of a whole archive begins and ends, with its kind and body."""
    for header, body in records(data):
        at = data.index(header)
        yield at, at + 96 + len(body), header[8], body


def cuts(path, data):
    """Cut behind any record, an archive has the commits whose COMMIT is there; what stands behind the last one is said, and no damage."""
    commits = set()
    for _, end, kind, body in places(data):
        if kind == reader.COMMIT:
            commits.add(blake3(body).hexdigest())
        path.write_bytes(data[:end])
        code, said, err = read(path, "--verify")
        assert code == (0 if commits else 4), (end, code, err)
        assert bool(said["notes"]) == (kind not in (reader.TAIL, reader.COMMIT)), (end, said["notes"])
        assert {commit["id"] for commit in said["commits"]} == commits, (end, err)
        assert all(image["intact"] for commit in said["commits"] for image in commit["images"]), (end, err)


def broken_records(path, data):
    """Any one record may be lost but a PACK, and the final PLAN of an image that was planned otherwise: nothing else is lost."""
    for at, end, kind, body in places(data):
        for first, last in ((at, at + 1), (at + 96, at + 97), (at, end)):
            path.write_bytes(data[:first] + bytes(byte ^ 0x55 for byte in data[first:last]) + data[last:])
            code, said, err = read(path, "--verify")
            lost = [image["path"] for commit in said["commits"] for image in commit["images"] if not image["intact"]]
            assert code == 4 and len(said["commits"]) == 2, (at, code, err)
            assert kind == reader.PACK or len(lost) <= (kind == reader.PLAN and body[1] == 2), (at, lost, err)


def hostile_headers(path, data):
    """Headers whose bodies lie over each other, and COMMITs that follow nothing, take no more time than others."""

    def header(kind, number, length, body_hash):
        fields = MAGIC + struct.pack("<BBHBBH24xQQ", kind, 1, 1, 0, 0, 0, number, length) + body_hash
        return fields + blake3(fields).digest()[:8]

    overlapping = b"".join(header(reader.PACK, number, 33 << 20, bytes(32)) for number in range(30000)) + bytes(34 << 20)
    commits = []
    for number in range(2, 20000, 2):
        body = struct.pack("<QQIIQQ32sII24sII7x", 0, 0, number, 0, 1, 1, b"?" * 32, 104, 0, bytes(24), 0, 7)
        commits.append(header(reader.COMMIT, number, len(body), blake3(body).digest()) + body)
    for hostile, expected in ((data[:-192] + overlapping, 0), (overlapping + data, 4), (b"".join(commits), 4)):
        path.write_bytes(hostile)
        start = time.monotonic()
        code, _, err = read(path, "--verify")
        assert code == expected and time.monotonic() - start < SLOWEST, (code, err[:1000])


def what_stands_behind(path, data):
    """Behind the last TAIL, what an interrupted export may have left is said, and what may have been a commit is damage."""
    commit = next(data[at:end] for at, end, kind, _ in places(data) if kind == reader.COMMIT)
    pack = next(data[at:end] for at, end, kind, _ in places(data) if kind == reader.PACK)
    noise = random.Random(1).randbytes(200).replace(b"\0", b"\1")
    left = [bytes(5000), noise[:95], bytes(8) + noise, noise[:88] + bytes(8) + noise, pack[:-1], pack + pack[:50], pack[:96] + noise, pack + bytes(96)]
    left += [commit[:-1], pack[:-1] + commit[:97], bytes(3000) + commit[:-1]]  # Cut by the end of the file, as a kill leaves it.
    for behind in left:
        path.write_bytes(data + behind)
        code, said, err = read(path, "--verify")
        assert code == 0 and said["notes"] and len(said["commits"]) == 2, (behind[:200], code, err)
    for behind in (noise, pack + noise, commit[:-9] + bytes([commit[-9] ^ 1]) + commit[-8:], commit[:95] + b"?" + noise):
        path.write_bytes(data + behind)
        code, said, err = read(path, "--verify")
        assert code == 4 and said["notes"] and len(said["commits"]) == 2, (behind[:200], code, err)


def lost_plans(path, data):
    """Final images are destroyed: planned ones serve where digests match, and all of it is said to be damaged."""
    for header, body in records(data):
        if header[8] == reader.PLAN and body[1] == 2:
            at = data.index(header)
            data = data[: at + 96] + bytes(len(body)) + data[at + 96 + len(body) :]
    path.write_bytes(data)
    code, said, err = read(path, "--verify")
    intact = [image["path"] for image in said["commits"][-1]["images"] if image["intact"]]
    assert code == 4 and all(image["intact"] for image in said["commits"][0]["images"]) and intact == ["two.img"], (code, intact, err)


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    random_ = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 18)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))
    paths = sorted((ROOT / "testdata").glob("archive-v1-*.vmfold"))
    assert paths, "there are no golden archives"
    contents = {path: golden(path) for path in paths}
    written_by_vmfold(ROOT / "testdata/archive-v1.vmfold")
    print(f"{len(paths)} golden archives are read as they should be")
    codes = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "mutant.vmfold"
        plain = (ROOT / "testdata/archive-v1-plain.vmfold").read_bytes()
        for test in (lost_plans, cuts, broken_records, hostile_headers, what_stands_behind):
            test(path, plain)
        readable = [one for one in paths if contents[one]]
        for number in range(rounds):
            golden_path = random_.choice(readable)
            data, is_sealed = golden_path.read_bytes(), bool(number % 2)
            data = sealed(random_, data) if is_sealed else change(random_, data)
            known = {digest for _, images in contents[golden_path].values() for digest in (images or {}).values()}
            try:
                codes[is_sealed, mutant(path, data, contents[golden_path], known, is_sealed)] += 1
            except Exception:
                kept = pathlib.Path(tempfile.gettempdir()) / f"mutant-{number}.vmfold"
                kept.write_bytes(data)
                print(f"round {number}, from {golden_path.name}, is kept as {kept}", file=sys.stderr)
                raise
    for (is_sealed, code), count in sorted(codes.items()):
        print(f"{count} {'sealed' if is_sealed else 'plain'} mutations: exit {code}")


if __name__ == "__main__":
    main()
