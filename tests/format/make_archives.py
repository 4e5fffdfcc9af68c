#!/usr/bin/env python3
"""Writes the golden archives of formats/archive-v1.md: make_archives.py OUTDIR

It was written from that text alone. The same version of `zstandard` writes the same bytes each time. Beside each archive stands NAME.sha256, as
`sha256sum` writes it, of each image of each commit that can be restored: COMMIT/PATH, where COMMIT counts from 1 in the order of the file.
Archives named `critical-` hold something that a reader must refuse, with exit code 3; they have no such list.
"""
import hashlib
import pathlib
import random
import struct
import sys

import zstandard
from blake3 import blake3

MAGIC = b"\x89vmfold\n"
BLOCK = 4096
HEAD, PLAN, PACK, INDEX, COMMIT, TAIL, NOTE, LIST = 1, 2, 3, 4, 5, 6, 9, 10
CRITICAL = {1, 2, 3, 5, 8, 10}
CUTS = pathlib.Path(__file__).parent.parent.parent / "testdata" / "cuts-v1.txt"
CUT_DIGEST = blake3(bytes(int(length) for length in CUTS.read_text().split())).digest()


def ident(name, length):
    """A fixed identity, where a writer takes a random one."""
    return blake3(name.encode()).digest(length=length)


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def zigzag(value):
    return varint((value << 1 ^ value >> 63) & 2**64 - 1)


def string(data):
    data = data.encode() if isinstance(data, str) else data
    return varint(len(data)) + data


def entry(tag, data):
    return bytes([tag]) + varint(len(data)) + data


def compress(data):
    return zstandard.ZstdCompressor(level=3, write_content_size=True, write_checksum=False, write_dict_id=False).compress(data)


def payload(named, plain):
    packed = compress(plain)
    encoding, stored = (1, packed) if len(packed) < len(plain) else (0, plain)
    return bytes([encoding]) + bytes(named) + struct.pack("<I", len(plain)) + stored


def text(name, blocks):
    """Blocks that can be compressed, each another."""
    out = bytearray()
    for number in range(blocks):
        line = f"{name} {number}: ".encode() + blake3(f"{name}{number}".encode()).digest()
        out += (line * (BLOCK // len(line) + 1))[:BLOCK]
    return bytes(out)


def noise(name, blocks):
    return random.Random(name).randbytes(blocks * BLOCK)


class Lane:
    def __init__(self, name):
        self.name, self.id = name, ident(f"lane {name}", 16)
        self.sequence = self.number = self.end = 0
        self.previous = 0, 0, bytes(32)
        self.store, self.packs, self.others = {}, [], []


class Pack:
    """A PACK's body: frames are (block in the pack, blocks, whether to compress)."""

    def __init__(self, first, frames):
        table, data = b"", b""
        self.first, self.blocks = first, frames[-1][0] + len(frames[-1][1]) // BLOCK
        self.held = {}
        for at, plain, compressed in frames:
            stored = compress(plain) if compressed else plain
            table += struct.pack("<IIHBBI", at, len(stored), len(plain) // BLOCK, compressed, 0, 0) + blake3(stored).digest()
            data += stored
            self.held.update({at + n: plain[n * BLOCK : (n + 1) * BLOCK] for n in range(len(plain) // BLOCK)})
        head = struct.pack("<QII", first, len(frames), self.blocks) + table
        self.table_hash, self.body = blake3(head).digest(), head + data + bytes(-len(head + data) % 64)


class Image:
    """An image. Its runs are (kind, blocks), (3, bytes to store, whether to compress), or (3, first address, blocks)."""

    def __init__(self, names, runs, size=None, attributes=(), planned=None):
        self.names, self.runs, self.attributes, self.planned = names, runs, attributes, planned
        self.size, self.added = size, 0

    def settle(self, lane, frames):
        """Puts what is to be stored into frames, and makes the manifest."""
        self.manifest = []
        for kind, what, *more in self.runs:
            if kind != 3:
                self.manifest.append((kind, what, 0))
            elif isinstance(what, int):
                self.manifest.append((3, more[0], what))
            else:
                blocks = len(what) // BLOCK
                self.manifest.append((3, blocks, lane.end))
                for at in range(0, blocks, 4):
                    frames.append((lane.end + at, what[at * BLOCK : (at + 4) * BLOCK], more[0]))
                for at in range(blocks):
                    lane.store[lane.end + at] = what[at * BLOCK : (at + 1) * BLOCK]
                lane.end += blocks
                self.added += blocks
        self.blocks = sum(blocks for _, blocks, _ in self.manifest)
        self.size = self.blocks * BLOCK if self.size is None else self.size
        self.content = b"".join(
            b"".join(lane.store[at + n] for n in range(blocks)) if kind == 3 else bytes(blocks * BLOCK) for kind, blocks, at in self.manifest
        )[: self.size]

    def digest(self):
        items, zeros = b"", 0
        padded = self.content + bytes(-len(self.content) % BLOCK)
        for at in range(0, len(padded), BLOCK):
            block = padded[at : at + BLOCK]
            if not any(block):
                zeros += 1
                continue
            if zeros:
                items += bytes(24) + struct.pack("<Q", zeros)
            zeros, items = 0, items + blake3(block).digest()
        if zeros:
            items += bytes(24) + struct.pack("<Q", zeros)
        return blake3(items + struct.pack("<Q", self.size)).digest()

    def entries(self, number, manifest, split=2):
        out = entry(0x82, varint(number) + varint(self.size) + varint(len(self.names)) + b"".join(map(string, self.names)) + attributes(self.attributes))
        first = 0
        for start in range(0, len(manifest), split):
            after, runs, blocks = 0, b"", 0
            for kind, count, at in manifest[start : start + split]:
                runs += varint(count << 2 | kind)
                if kind == 3:
                    runs += zigzag(at - after)
                    after = at + count
                blocks += count
            out += entry(0x83, varint(number) + varint(first) + varint(len(manifest[start : start + split])) + runs)
            first += blocks
        return out


def attributes(those):
    return varint(len(those)) + b"".join(entry(tag, data) for tag, data in those)


class Extra:
    """What an epoch has beyond today's fields."""

    head = plan = attribute = records = images = clear = commit = b""
    features_head = features_commit = 0
    record_flag = pack_flags = 0
    pack_sealed = (0, 0)
    kind = plan_part = list_part = None


class File:
    def __init__(self):
        self.out, self.restored, self.hashes = bytearray(), [], []

    def add(self, lane, epoch, kind, body, flags=None, sealed=(0, 0)):
        flags = int(kind in CRITICAL) if flags is None else flags
        mask = 0
        while True:
            header = MAGIC + struct.pack("<BBHBBH", kind, 1, flags, *sealed, mask) + lane.id + epoch
            header += struct.pack("<QQ", lane.sequence, len(body)) + blake3(body).digest()
            stored = body if not mask else bytes(a ^ b for a, b in zip(body, blake3(header[14:48]).digest(length=len(body))))
            if MAGIC not in stored:
                break
            mask += 1
        at = len(self.out)
        self.out += header + blake3(header).digest()[:8] + stored
        lane.sequence += 1
        return lane.sequence - 1, at, 96 + len(body), blake3(body).digest()

    def export(self, lane, images, folders=(), extra=Extra, packs=(), forgets=(), dead=(), lent=(), label="", split=2):
        """One epoch. `packs` are written beside those of new blocks, `lent` are (address, record of a PACK of another lane)."""
        lane.number += 1
        number, epoch = lane.number, ident(f"epoch {lane.name} {lane.number}", 8)
        records, frames, packs = [], [], list(packs)

        def add(kind, body, part=0, first=0, blocks=0, more=b"", flags=None, sealed=(0, 0)):
            where = self.add(lane, epoch, kind, body, flags, sealed)
            critical = int(kind in CRITICAL) if kind != extra.kind else flags
            told = bytes([kind, critical | (extra.record_flag if kind == INDEX else 0), part])
            told += b"".join(map(varint, where[:3])) + varint(first) + varint(blocks) + where[3] + more
            records.append(entry(0x81, told))
            return where

        for at, (_, pack) in lent:
            lane.store.update({at + n: block for n, block in pack.held.items()})
            lane.end = max(lane.end, at + pack.blocks)
        for image in images:
            image.settle(lane, frames)
        add(HEAD, self.head(extra))
        rows = {part: b"" for part in (0, 2)}
        for name, attrs in folders:
            for part in rows:
                rows[part] += entry(0x81, string(name) + attributes(attrs))
        for n, image in enumerate(images):
            if extra.attribute:
                image.attributes = [*image.attributes, (extra.attribute[0], extra.attribute[1:])]
            rows[0] += image.entries(n + 7, image.planned or image.manifest, split)
            rows[2] += image.entries(n + 7, image.manifest, split)
        commit = struct.pack("<I", number)
        add(PLAN, payload((0, 1, 0), commit + rows[0]), 0)
        if frames:
            first, blocks = frames[0][0], b"".join(data for _, data, _ in frames)
            count = len(blocks) // BLOCK
            cuts = [4] * (count // 4) + [count % 4] * bool(count % 4)
            prints = b"".join(blake3(blocks[n * BLOCK : (n + 1) * BLOCK]).digest()[:4] for n in range(count))
            plan = struct.pack("<QBxxxI", first, 1, len(cuts)) + bytes(cuts) + prints
            add(PLAN, payload((1, 1, 0), commit + plan), 1)
            packs.append(Pack(first, [(at - first, data, compressed) for at, data, compressed in frames]))
        for pack in packs:
            where = add(PACK, pack.body, 0, pack.first, pack.blocks, pack.table_hash, 1 | extra.pack_flags, extra.pack_sealed)
            lane.packs.append((where, pack))
        for pack in packs:
            hashes = b"".join(blake3(lane.store[pack.first + n]).digest() for n in range(pack.blocks))
            add(INDEX, struct.pack("<QII", pack.first, pack.blocks, 0) + hashes, 0, pack.first, pack.blocks)
        if extra.kind:
            add(extra.kind, b"what a later version writes", flags=int(extra.kind >= 100))
        if extra.plan_part:
            add(PLAN, payload((extra.plan_part, 1, 0), commit), extra.plan_part)
        halves = rows[2][: len(rows[2]) // 2], rows[2][len(rows[2]) // 2 :]
        add(PLAN, payload((2, 1, 0), commit + b"".join(halves) + extra.plan), 2)
        for at, (where, pack) in lent:
            told = bytes([PACK, 3, 0]) + b"".join(map(varint, where[:3])) + varint(at) + varint(pack.blocks) + where[3] + pack.table_hash
            records.append(entry(0x81, told + pack.lane.id))
        self.finish(lane, epoch, images, records, extra, forgets, dead, label)

    def head(self, extra):
        return struct.pack("<HHIQQQHHHH", 1, 0, BLOCK, extra.features_head, 0, 0, 1, 4, 16, 1) + CUT_DIGEST + extra.head

    def finish(self, lane, epoch, images, records, extra, forgets, dead, label):
        rows = b"".join(records)
        rows += b"".join(entry(0x82, body_hash) for body_hash in forgets)
        rows += b"".join(entry(0x83, varint(first) + varint(blocks)) for first, blocks in dead)
        used = sorted({at + n for image in images for kind, blocks, at in image.manifest if kind == 3 for n in range(blocks)})
        ranges, end = [], 0
        for at in used:
            if ranges and at == end:
                ranges[-1][1] += 1
            else:
                ranges.append([at - end, 1])
            end = at + 1
        rows += entry(4, varint(len(ranges)) + b"".join(varint(gap) + varint(blocks) for gap, blocks in ranges))
        for other in lane.others:
            at, length, body_hash = other.previous
            rows += entry(5, other.id + varint(other.number) + varint(at) + varint(length) + body_hash)
        told = b""
        for n, image in enumerate(images):
            blocks = sum(blocks for kind, blocks, _ in image.manifest if kind == 3)
            told += entry(
                0x81, varint(n + 7) + varint(image.size) + varint(blocks) + varint(image.added) + image.digest() + string(image.names[0]) + extra.clear[:3]
            )
        bodies = [payload((0, 0, 0), rows + extra.records), payload((1, 0, 0), told + extra.images)]
        bodies += [payload((extra.list_part, 0, 0), b"")] if extra.list_part else []
        lists = [self.add(lane, epoch, LIST, body) for body in bodies]
        plain = zigzag(1_700_000_000 + lane.number) + varint(123_456_789) + string(label) + string("/var/lib/images") + string("host") + string("make_archives 1")
        plain += varint(len(lists)) + b"".join(bytes([part]) + b"".join(map(varint, one[:3])) + one[3] for part, one in enumerate(lists))
        clear = struct.pack("<QQII", extra.features_commit, 0, lane.number, lane.end) + struct.pack("<QQ32s", *lane.previous)
        body = clear + struct.pack("<II", 104 + len(extra.clear), 0) + lane.id + epoch + extra.clear + payload((0, 0, 0), plain + extra.commit)
        self.add(lane, epoch, COMMIT, body)
        for copy in bodies:
            self.add(lane, epoch, LIST, copy)
        self.add(lane, epoch, NOTE, bytes(BLOCK))
        lane.previous = self.add(lane, epoch, COMMIT, body)[1:]
        self.hashes.append(lane.previous[2])
        self.add(lane, epoch, TAIL, struct.pack("<QQ32s", *lane.previous) * 2)
        self.restored.append([(name, hashlib.sha256(image.content).hexdigest()) for image in images for name in image.names])

    def write(self, out, name, lost=()):
        path = pathlib.Path(out) / f"archive-v1-{name}.vmfold"
        path.write_bytes(self.out)
        if name.startswith("critical-"):
            return
        rows = [f"{digest}  {n + 1}/{image}\n" for n, images in enumerate(self.restored) if n not in lost for image, digest in images]
        path.with_suffix(".sha256").write_text("".join(rows))


ACCESS = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in ((1, 6, 2**32 - 1), (2, 4, 1000), (4, 4, 2**32 - 1), (0x10, 4, 2**32 - 1), (0x20, 0, 2**32 - 1)))
MTIME = (3, zigzag(1_600_000_000) + varint(5))
EVERYTHING = [
    (1, varint(0o640)),
    (2, varint(1000) + varint(1000) + string("user") + string("")),
    MTIME,
    (4, string("user.note") + b"value"),
    (4, string("security.label") + b"\0\1"),
    (5, ACCESS),
    (7, b""),
    (8, string("qubes.xml") + b"<domain/>"),
]


def plain():
    inner = File()
    inner.export(Lane("inner"), [Image(["inside.img"], [(3, text("inside", 2), True)])])
    held = bytes(1234) + bytes(inner.out)
    held += bytes(-len(held) % BLOCK)
    file, lane = File(), Lane("plain")
    folders = [("vm/deep", []), ("vm", [(1, varint(0o750)), (3, zigzag(-5) + varint(0)), (6, ACCESS)])]
    runs = [(3, text("disk", 9), True), (0, 1000), (1, 3), (2, 5), (3, bytes(BLOCK) + text("after zeros", 1), True), (3, noise("raw", 2), False)]
    images = [
        Image(["vm/disk.img"], runs, 1025 * BLOCK - 4000 - 4 * BLOCK, EVERYTHING),
        Image(["vm/empty.img"], [], 0),
        Image(["vm/deep/one.img", "two.img"], [(3, 2, 5), (0, 1), (3, 0, 1)], attributes=[(3, zigzag(-1) + varint(999_999_999))]),
        Image(["holds an archive.img"], [(3, held, False)]),
        Image(["zeros.img"], [(1, 2), (0, 2)], 4 * BLOCK - 1),
    ]
    images[0].size = (9 + 1000 + 3 + 5 + 2 + 2) * BLOCK - 4000
    images[0].runs[-1] = (3, noise("raw", 1) + noise("end", 1)[:96] + bytes(4000), False)
    file.export(lane, images, folders, label="first")
    again = [
        Image(["vm/disk.img"], [(3, 0, 3), (3, text("new", 6), True), (0, 100)], attributes=EVERYTHING[:3], planned=[(3, 9, 0), (0, 100, 0)]),
        Image(["two.img"], [(3, 5, 2), (0, 1), (3, 0, 1)]),
    ]
    file.export(lane, again, folders[1:], label=b"a COMMIT with a mask " + MAGIC)
    return file


def lanes():
    file, one, two = File(), Lane("one"), Lane("two")
    file.export(one, [Image(["a.img"], [(3, text("a", 6), True)]), Image(["b.img"], [(3, text("b", 3), True)])])
    two.others = [one]
    for _, pack in one.packs:
        pack.lane = one
    two.end = 3
    lent = [(10, one.packs[0])]
    file.export(two, [Image(["c.img"], [(3, 12, 5), (3, text("c", 3), True), (0, 4)])], lent=lent)
    one.others = [two]
    file.export(one, [Image(["a.img"], [(3, 0, 4), (3, text("a2", 1), True)])])
    return file


def unchanged():
    """Exports of what did not change: their LISTs of images are alike."""
    file, lane = File(), Lane("unchanged")
    file.export(lane, [Image(["a.img"], [(3, text("a", 5), True)])])
    for _ in range(3):
        file.export(lane, [Image(["a.img"], [(3, 0, 5)])])
    return file


def forgotten():
    file, lane = File(), Lane("forgotten")
    file.export(lane, [Image(["old.img"], [(3, text("old", 6), True)])])
    file.export(lane, [Image(["kept.img"], [(3, text("kept", 6), True), (1, 1)])])
    file.export(lane, [Image(["kept.img"], [(3, 6, 3), (3, text("more", 2), True)])], forgets=file.hashes[:1], dead=[(0, 6)])
    _, at, length, _ = lane.packs[0][0]
    file.out[at + 96 : at + length] = bytes(length - 96)
    return file


def relocated():
    """PACK 1 is cut out, so that whatever stands behind it moves. Its first and last frames are in a later PACK."""
    file, lane = File(), Lane("relocated")
    file.export(lane, [Image(["gone.img"], [(3, text("r", 12), True)])])
    file.export(lane, [Image(["ends.img"], [(3, 0, 4), (0, 9), (3, 8, 4)]), Image(["new.img"], [(3, text("new", 2), True)])])
    old = lane.packs[0][1]
    held = [b"".join(old.held[at + n] for n in range(4)) for at in (0, 8)]
    pack = Pack(0, [(0, held[0], True), (8, held[1], False)])
    file.export(lane, [Image(["ends.img"], [(3, 0, 4), (3, 8, 4)])], packs=[pack], forgets=file.hashes[:1], dead=[(4, 4)])
    _, at, length, _ = lane.packs[0][0]
    del file.out[at : at + length]
    return file


def two_commits(name, extra):
    file, lane = File(), Lane(name)
    file.export(lane, [Image(["a.img"], [(3, text(name, 4), True)], attributes=[MTIME])])
    file.export(lane, [Image(["a.img"], [(3, 0, 3), (3, text(name + "2", 3), True), (0, 1)], attributes=[MTIME])], extra=extra)
    return file


def extra(**fields):
    return type("Some", (Extra,), fields)


UNKNOWN = b"\x03???"
SKIPPABLE = extra(
    head=b"longer",
    plan=b"\x11" + UNKNOWN,
    attribute=b"\x33??",
    records=b"\x12" + UNKNOWN,
    images=b"\x13" + UNKNOWN,
    clear=b"longer, clear...",
    commit=b"\x14" + UNKNOWN,
    kind=77,
)
CRITICAL_THINGS = {
    "kind": extra(kind=200),
    "plan": extra(plan=b"\x91" + UNKNOWN),
    "attribute": extra(attribute=b"\xb3??"),
    "list": extra(records=b"\x92" + UNKNOWN),
    "images": extra(images=b"\x93" + UNKNOWN),
    "plan-part": extra(plan_part=3),
    "list-part": extra(list_part=2),
    "commit": extra(commit=b"\x94" + UNKNOWN),
    "record-flag": extra(record_flag=4),
    "head-feature": extra(features_head=1 << 40),
    "commit-feature": extra(features_commit=1 << 41),
    "header-flag": extra(pack_flags=1 << 9),
    "sealed": extra(pack_flags=2, pack_sealed=(1, 1)),
}


def main():
    out = sys.argv[1]
    plain().write(out, "plain")
    lanes().write(out, "lanes")
    unchanged().write(out, "unchanged")
    forgotten().write(out, "forgotten", lost={0})
    relocated().write(out, "relocated", lost={0})
    two_commits("skippable", SKIPPABLE).write(out, "skippable")
    for name, thing in CRITICAL_THINGS.items():
        two_commits("critical", thing).write(out, f"critical-{name}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main()
