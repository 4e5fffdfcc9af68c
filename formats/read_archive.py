#!/usr/bin/env python3
"""Reads archives of vmfold, version 1: read_archive.py ARCHIVE --to DIR. It was written from archive-v1.md and encryption-v1.md alone, as a
check of these texts.

It needs Python 3.9, `blake3` and `zstandard` from PyPI, and archive_payloads.py and archive_seals.py beside it; for sealed archives `cryptography`
from PyPI, too. It looks for records in the whole file, so that no offset in it matters. Of attributes it restores only the mode.
Exit codes: 0 all that was read is intact; 1 another error; 2 usage; 3 the archive needs a newer reader; 4 damaged.
"""
import argparse, bisect, collections, contextlib, functools, itertools, json, os, re, signal, struct, sys
from array import array
from archive_payloads import BLOCK, COMMIT, HEAD, IMAGES, INDEX, KEY, KINDS, LIST, MIB, NOTE, PACK, PLAN, PLANS, RECORDS, SIGNATURE, TAIL
from archive_payloads import U32, U64, Budget, Commit, Damaged, Plan, Ranges, Store, Unsupported, must, name, payload, refuse, zstd
try:
    from blake3 import blake3
except ImportError as missing:
    sys.exit(f"read_archive.py needs {missing.name}: pip install blake3 zstandard")
from archive_seals import DATA, INDEXES, METADATA, SALT, TAG, Keys, KeyRecord, Locked, Seals, Slot, associated, identities, open_keyring

MAGIC, ZEROS = b"\x89vmfold\n", bytes(BLOCK)
SEALED = {PLAN: METADATA, PACK: DATA, INDEX: INDEXES, COMMIT: METADATA, LIST: METADATA}  # the key that seals a kind
TAIL_ZEROS = "its last block is not zeros behind its end"
COPIES_TRIED, CACHED_FRAMES, CACHED_TABLES, USES = 16, 16, 32, 2**22
Header = collections.namedtuple("Header", "at end key kind lane epoch mask seal refused malformed")
Frame = collections.namedtuple("Frame", "first end at stored encoding hash")


class Archive:
    def __init__(self, file, damage, notes, keys):
        self.file, self.size, self.end, self.latest, self.budget = file, file.seek(0, os.SEEK_END), 0, None, Budget()
        self.found, self.broken, self.refused, self.tails, self.gaps = {}, {}, {}, [], []
        self.damage, self.notes, self.loaded, self.commits, self.stores, self.spared = damage, notes, {}, [], {}, set()
        self.newest = None
        self.keys, self.sealed, self.seals, self.unlocking, self.latest_at, self.block_hash = keys, None, None, {}, 0, lambda block: blake3(block).digest()
        self.zero_hash = self.block_hash(ZEROS)
        self.table, self.frame = functools.lru_cache(CACHED_TABLES)(self.table), functools.lru_cache(CACHED_FRAMES)(self.frame)

    def harm(self, what):
        self.damage[what if len(self.damage) < 10000 else "and more"] = True

    @contextlib.contextmanager
    def guard(self, what, excused=False):
        """What is wrong in here is damage of the archive, and the end of nothing else."""
        try:
            yield
        except Damaged as error:
            if not excused:
                self.harm(f"{what}: {error}")

    def read(self, at, count):
        self.file.seek(at)
        data = self.file.read(count)
        must(len(data) == count, "the archive ends before a record does")
        return data

    def header(self, at):
        """The header at an offset, or None where none stands."""
        data = self.read(at, 96) if at + 96 <= self.size else b""
        if data[:8] != MAGIC or blake3(data[:88]).digest()[:8] != data[88:]:
            return None
        kind, version, flags, suite, key, mask, lane, epoch, sequence, length, its = struct.unpack_from("<BBHBBH16s8sQQ32s", data, 8)
        _, critical, at_most = KINDS.get(kind, ("", flags & 1, 33 * MIB))
        refused = None if version == 1 and flags < 4 else f"version {version} or flags {flags:#x} of a record"
        malformed, seal = sequence >= 2**63 or length > at_most or flags & 1 != critical, associated(data) if flags & 2 else b""
        if not refused and seal:
            refused = None if suite != 2 and self.sealed is not False else f"suite {suite} of a sealed record, or one in an archive that is clear"
            malformed = malformed or suite != 1 or kind in KINDS and kind != SIGNATURE and key != SEALED.get(kind) and (kind, key) != (PLAN, INDEXES)
        else:
            malformed = malformed or suite or key or self.sealed and kind in SEALED
        return Header(at, at + 96 + length, (kind, its), kind, lane, epoch, data[14:48] * bool(mask), seal, refused, malformed and not refused)

    def part(self, header, start=0, count=None):
        """Some bytes of a body, or all of it, without its mask."""
        count = header.end - header.at - 96 if count is None else count
        must(header.at + 96 + start + count <= header.end, "a body is shorter than its fields")
        data, pad = self.read(header.at + 96 + start, count), blake3(header.mask).digest(length=count if header.mask else 0, seek=start)
        return data if not header.mask else (int.from_bytes(data, "little") ^ int.from_bytes(pad, "little")).to_bytes(count, "little")

    def search(self):
        """Finds each record by the magic, which is in no body, and proves it. Whatever headers say, the way is the same."""
        magics, end, committed = array("Q"), 0, None
        for start in range(0, self.size, MIB):
            for match in re.finditer(MAGIC, self.read(start, min(MIB + 7, self.size - start))):
                self.budget.spend("records")
                magics.append(start + match.start())
        headers = (one for one in map(self.header, magics) if one and not one.refused and not one.malformed)
        self.sealed = any(one.kind == KEY or one.kind == COMMIT and one.seal for one in headers)
        for at, following in zip([*magics, self.size], [*magics[1:], self.size, self.size]):
            if end < at:
                self.gaps.append((end, at))
            header, end = self.header(at), following
            body = self.part(header) if header and not header.refused and not header.malformed and header.end <= following else None
            if not header:
                end = at
            elif header.refused:
                self.refused[header.key] = header.refused
            elif body is None or blake3(body).digest() != header.key[1]:
                self.broken.setdefault(header.key, array("Q")).append(at)
            else:
                if self.gaps and self.gaps[-1][1] == at and header.epoch == committed and self.is_zeros(*self.gaps[-1]):
                    self.gaps.pop()  # Of a commit's copies, those that were not on disk when the power went are zeros.
                committed = header.epoch if header.kind == COMMIT or header.epoch == committed else None
                end = header.end
                self.found.setdefault(header.key, array("Q")).append(at)
                if self.sealed and header.kind in (COMMIT, KEY):
                    self.unlocking.setdefault((header.lane, header.epoch), {})[header.key] = at
                self.end = end if header.kind in (COMMIT, TAIL) else self.end
                if header.kind == TAIL:
                    _, length, told = struct.unpack_from("<QQ32s", body.ljust(96))
                    self.tails.append(told if body == body[:48] * 2 else None)
                    if end == self.size and self.tails[-1] and at - length in self.found.get((COMMIT, told), ()):
                        self.latest, self.latest_at = told, at - length

    def is_zeros(self, first, end):
        return not any(self.read(at, min(MIB, end - at)).strip(b"\0") for at in range(first, end, MIB))

    def record(self, kind, body_hash, length=None):
        """The body of a record that is intact, and as long as what leads to it tells: without its seal, but for a PACK."""
        refuse((kind, body_hash) in self.refused, self.refused.get((kind, body_hash)))
        headers = [self.header(at) for at in self.found.get((kind, body_hash), ())[:COPIES_TRIED] if at < self.end]
        must(headers, f"{name(kind)} {body_hash.hex()[:16]} is lost")
        body = self.part(headers[0])
        must(length in (None, len(body) + 96), f"{name(kind)} {body_hash.hex()[:16]} has another length")
        must(blake3(body).digest() == body_hash, "the archive changes")
        return self.opened(body, {one.seal: one for one in headers}) if headers[0].seal and kind != PACK else body

    def opened(self, body, headers):
        """A body without its seal, which proves one of these headers."""
        for number, header in enumerate(headers.values(), 1):
            try:
                if header.kind == COMMIT:
                    return self.seals.commit(header.seal, body)
                plain = self.seals.padded(self.unlocked(header), body)
                must(header.kind != PLAN or header.seal[5] != INDEXES or plain[1:2] == b"\1", "a PLAN of images is sealed with the index key")
                return plain
            except Damaged as error:
                must(number < len(headers), f"{name(header.kind)} {header.key[1].hex()[:16]}: {error}")

    def unlocked(self, header):
        """What the seal of a record proves of its header, once the keys of its epoch are known. They stand in its COMMITs and KEYs."""
        if header.kind != INDEX and (header.lane, header.epoch) not in self.seals.epochs:
            those = sorted(self.unlocking.get((header.lane, header.epoch), {}).items(), key=lambda one: one[0][0])
            for (kind, _), at in [one for one in those if one[1] < self.end][:COPIES_TRIED]:
                with self.guard("", True):
                    body, seal = self.part(self.header(at)), self.header(at).seal
                    if kind == COMMIT:
                        self.seals.learn(seal, body)
                    else:
                        self.seals.epochs[header.lane, header.epoch] = self.seals.unwrap(KeyRecord(body).wrapped, header.lane, header.epoch)
                    break
            must((header.lane, header.epoch) in self.seals.epochs, "the keys of an epoch are lost")
        return header.seal

    def piece(self, header, number, at, count, last=False):
        """Some bytes of a PACK. Of one that is sealed, they are the segment of this number: 0 its first fields, 1 its table, and then its frames."""
        if not header.seal:
            return self.part(header, at, count)
        sealed = self.part(header, SALT + at + TAG * number, count + TAG)
        return self.seals.segment(METADATA if number < 2 else DATA, self.unlocked(header), self.part(header, 0, SALT), number, last, sealed)

    def key_headers(self):
        """KEYs that are intact, in their order."""
        those = [self.header(at) for (kind, _), places in self.found.items() if kind == KEY for at in places if at < self.end]
        return sorted(those, key=lambda one: one.at)

    def unlock(self):
        """Opens the keyring with the greatest number, the last of those."""
        if not self.sealed:
            return self.notes.append("the archive is not sealed, and needs no key") if self.keys.any() else None
        if not self.keys.any():
            raise Locked("the archive is sealed, and no key was given: --passphrase-file FILE or --identity FILE")
        newest = before = unknown = None
        for header in self.key_headers():
            with self.guard(f"KEY at byte {header.at}"):
                try:
                    one = KeyRecord(self.part(header))
                except Unsupported as error:
                    refuse(header.end == self.latest_at, error)
                    unknown = error
                    continue
                newest = one if not newest or one.number >= newest.number else newest
                before = one if header.end == self.latest_at else before
        refuse(unknown and not newest, unknown)
        must(newest, "no KEY is intact")
        if before and before.number < newest.number:
            self.harm("the KEY before the last COMMIT is older than another")
        self.newest, self.seals = newest, Seals(open_keyring(newest, self.keys, self.harm))
        self.block_hash = lambda block: blake3(block, key=self.seals.keyring.id_key).digest()
        self.zero_hash = self.block_hash(ZEROS)

    def check_refused(self):
        """Where not all commits may be known, a COMMIT or TAIL that is refused may be the last."""
        for (kind, _), why in self.refused.items():
            refuse(kind in (COMMIT, TAIL), why)

    def open(self):
        self.search()
        self.unlock()
        if not self.latest or not self.reach([self.latest]):
            self.check_refused()
            broken = ((key, self.header(at)) for key, places in self.broken.items() for at in places)
            whole = [key for key, its in broken if its.at < self.end or its.end <= self.size and not self.is_torn(its.at, its.end)]
            self.reach([its for kind, its in [*self.found, *whole] if kind == COMMIT] + [*filter(None, self.tails)])
        self.choose()
        self.check_end()
        for why in () if self.commits else self.refused.values():
            refuse(True, why)
        must(self.commits, "no COMMIT is found")
        for lane in {one.lane for one in self.commits}:
            commits = [one for one in self.commits if one.lane == lane]
            self.stores[lane], _ = (Store(commits, kind) for kind in (PACK, INDEX))
            alive = max(one.store_end for one in commits) - self.stores[lane].dead.count()
            must(alive // 1024 <= self.size // 48, "its commits have more blocks than the archive can hold")
        for commit in self.commits:
            heads = [entry for entry in commit.records.values() if entry.kind == HEAD]
            with self.guard(f"commit {commit.number}", commit.forgotten):
                must(len(heads) == 1, f"it lists {len(heads)} HEADs")
                body = self.record(HEAD, heads[0].hash, heads[0].length)
                must(len(body) >= 72, "its HEAD is cut")
                major, _, block, features = struct.unpack_from("<HHIQ", body)
                refuse(major != 1 or block != BLOCK or features & ~1, f"major {major}, blocks of {block} bytes, features {features:#x}")
                must(features == self.sealed, "its HEAD does not tell whether it is sealed")

    def check_end(self):
        """What stands behind the last intact COMMIT or TAIL is no part of the archive, and damage only if it may have been a commit."""
        if self.end < self.size:
            self.notes.append(f"what stands behind byte {self.end} is not part of the archive: an export was interrupted, or it was cut")
        malformed = [at for places in self.broken.values() for at in places if self.header(at).malformed]
        for at in [at for at, _ in self.gaps] + malformed:
            if self.end <= at <= self.size - 96 and not self.is_torn(at, at + 96):
                self.harm(f"the header at byte {at}, behind the last intact COMMIT or TAIL, is damaged")
        for header in (self.header(at) for (kind, _), places in self.broken.items() for at in places if kind in (COMMIT, TAIL)):
            if self.end <= header.at and header.end <= self.size and not self.is_torn(header.at, header.end):
                self.harm(f"a {name(header.kind)} behind the last that is intact is damaged")

    def is_torn(self, at, end):
        """Whether a write may have ended there: in zeros that go on behind it, or to the end of the file."""
        before, after = self.read(end - 8, 8), self.read(end, min(8, self.size - end))
        zeros, behind = 8 - len(before.rstrip(b"\0")), len(after) - len(after.lstrip(b"\0"))
        return self.read(at, 8) == bytes(8) or zeros and (zeros + behind >= 8 or end + behind == self.size)

    def reach(self, queue):
        """Loads these commits and all that they name. Says whether none is missing."""
        while queue:
            body_hash = queue.pop()
            if body_hash not in self.loaded:
                self.loaded[body_hash] = None
                with self.guard(f"COMMIT {body_hash.hex()[:16]}"):
                    body = self.record(COMMIT, body_hash)
                    commit = self.loaded[body_hash] = Commit(self.header(self.found[COMMIT, body_hash][-1]), body, self.budget)
                    must(not self.sealed or commit.keyring <= self.seals.keyring.number, "the keyring is older than it")
                    self.lists(commit, 0, RECORDS, commit.listed, commit.budget)
                    queue += commit.others + [commit.previous] * (commit.number > 1)
        return all(self.loaded.values())

    def lists(self, commit, part, known, do, budget):
        """Does something for each entry of a commit's LISTs. What is wrong ends its LIST, and is damage."""
        for length, body_hash in (one[-2:] for one in commit.lists if one[0] == part):
            with self.guard(f"commit {commit.number}: LIST"):
                for one in payload(LIST, self.record(LIST, body_hash, length), part, 0, 0).entries(known, "an entry of a LIST", budget):
                    do(*one)

    def choose(self):
        """Of each lane, the commits that the greatest number reaches; a gap is bridged by the greatest number below it."""
        last = None
        for commit in sorted(filter(None, self.loaded.values()), key=lambda one: (one.lane, one.number, one.at), reverse=True):
            last = last if last and last.lane == commit.lane else None
            before = self.loaded.get(last.previous) if last else None
            follows = before and (before.lane, before.number + 1) == (last.lane, last.number) and before.store_end <= last.store_end
            if not last or (commit is before if follows else commit.number < last.number):
                if before and not follows:
                    self.harm(f"COMMIT {last.id[:16]} does not follow the one before it")
                last = commit
                self.commits.append(commit)
        forgotten = {(commit.lane, body_hash) for commit in self.commits for body_hash in commit.forgets}
        for commit in self.commits:
            commit.forgotten = (commit.lane, commit.hash) in forgotten
        self.commits.sort(key=lambda one: (one.hash == self.latest, one.at))

    def listed_images(self, commit):
        listing = Plan(commit.store_end)
        self.lists(commit, 1, IMAGES, listing.add_listed, listing.budget)
        return listing.images

    def plan(self, commit, part):
        """All images and folders of a part of the plan."""
        plan, entries = Plan(commit.store_end), [entry for entry in commit.records.values() if (entry.kind, entry.part) == (PLAN, part)]
        for entry in sorted(entries, key=lambda one: one.sequence):
            try:
                body = self.record(PLAN, entry.hash, entry.length)
                fields = payload(PLAN, body, part, body[2] & 1, 0)
                must(fields.get("I") == [commit.number], "it is of another commit")
                for one in fields.entries(PLANS, "an entry of a PLAN", plan.budget):
                    plan.add(*one)
            except (Damaged, Unsupported) as error:
                plan.whole = False
                refuse(isinstance(error, Unsupported) and not commit.forgotten, error)
                if not commit.forgotten:
                    self.harm(f"commit {commit.number}: PLAN: {error}")
        return plan

    def check_announced(self, commit):
        """Blocks that PLANs announce are only a help; what makes no sense there is damage all the same."""
        for entry in (one for one in commit.records.values() if (one.kind, one.part) == (PLAN, 1)):
            with self.guard(f"commit {commit.number}: PLAN"):
                body = self.record(PLAN, entry.hash, entry.length)
                fields = payload(PLAN, body, 1, body[2] & 1, 0)
                number, first, function, *zeros, count = fields.get("IQBBBBI")
                chunks = fields.take(count)
                must(number == commit.number and function < 2 and not any(zeros), "it announces blocks of another kind")
                must(all(0 < one < 17 for one in chunks) and sum(chunks) <= 2**19 and first + sum(chunks) < U32, "its chunks are not allowed")
                must(len(fields.get("r")[0]) == 4 * sum(chunks), "its fingerprints are not as many as its blocks")

    def check_uses(self, commit, images):
        """Where a commit tells which addresses it uses, these cover all of its final runs."""
        uses, told = array("Q"), []

        def add(tag, _, fields):
            if tag == 4:
                end, count = 0, fields.varint(USES)
                told.append(count)
                must(sum(told) <= USES, "it tells too many uses")
                for _ in range(count):
                    first = end + fields.varint()
                    end = first + fields.varint()
                    must(end <= commit.store_end, "uses lie behind the store's end")
                    uses.append(first << 32 | end)

        self.lists(commit, 0, dict.fromkeys(RECORDS, ("", "")), add, Budget())
        uses = Ranges(uses)
        for length, address in (run for image in images if told for run in zip(image.lengths, image.addresses) if run[0] & 3 == 3):
            end = address + (length >> 2)
            while address < end:
                must(uses.until(address) > address, f"it does not tell that it uses block {address} of the store")
                address = uses.until(address)

    def images(self, commit):
        """Path, size, digest and manifest of each image, and all folders. No two names may be in each other's way."""
        plans, rows, names = [self.plan(commit, 2)], [], []
        plans += [] if plans[0].whole else [self.plan(commit, 0)]
        folders = {**plans[-1].folders, **plans[0].folders}
        with self.guard(f"commit {commit.number}", commit.forgotten):
            self.check_uses(commit, plans[0].images.values())
        for number, (path, size, digest) in self.listed_images(commit).items():
            those = [plan.images[number] for plan in plans if number in plan.images]
            image = next((one for one in those if (one.size, one.names[0], *one.covered) == (size, path, one.blocks)), None)
            rows.append((path, size, digest, image))
            names += image.names if image else [path]
        taken, ordered = set(names), sorted(names + list(folders), key=lambda path: path.replace(b"/", b"\0"))
        for one, after in zip(ordered, ordered[1:]):
            must(one not in taken or not (after + b"/").startswith(one + b"/"), "an image's name is that of another, or a folder of it")
        return rows, folders

    def places(self, entry):
        """Headers of the records that are a PACK, or what is left of it."""
        refuse((PACK, entry.hash) in self.refused, self.refused.get((PACK, entry.hash)))
        those = [*self.found.get((PACK, entry.hash), ()), *self.broken.get((PACK, entry.hash), ())]
        return [one for one in map(self.header, those[:COPIES_TRIED]) if not one.malformed and one.end - one.at == entry.length]

    def table(self, entry):
        """The frames of a PACK, whose table is proved by its hash. The rest of the PACK need not be there."""
        for header in self.places(entry):
            with self.guard("", True):
                fields = self.piece(header, 0, 0, 16)
                count, blocks = struct.unpack_from("<II", fields, 8)
                must(count <= 8192, "a PACK has too many frames")
                data, frames, end, at = fields + self.piece(header, 1, 16, 48 * count), [], entry.first, 16 + 48 * count
                whole = blake3(data).digest() == entry.table_hash and count and entry.first + blocks == entry.end
                for block, stored, length, encoding, zero, zeros, its_hash in struct.iter_unpack("<IIHBBI32s", data[16:]):
                    first = entry.first + block
                    whole = whole and first >= end and (frames or not block) and 1 <= length <= 1024 and not zero and not zeros
                    whole = whole and stored <= length * BLOCK and encoding <= 1 and (encoding or stored == length * BLOCK)
                    end, at = first + length, at + stored
                    frames.append(Frame(first, end, at - stored, stored, encoding, its_hash))
                must(whole and end == entry.end and 0 <= self.padding(header, at, count), "a PACK's table is wrong")
                return frames
        return []

    def padding(self, header, at, frames):
        """The length of what stands behind the frames of a PACK, which end there."""
        return header.end - header.at - 96 - at - (SALT + TAG * (frames + 3) if header.seal else 0)

    def frame(self, entry, number):
        """The bytes of a frame and the hash of each block, or None where it is lost."""
        frame = self.table(entry)[number]
        for header in self.places(entry):
            with self.guard("", True):
                data = self.piece(header, 2 + number, frame.at, frame.stored)
                must(blake3(data).digest() == frame.hash, "a frame does not match its hash")
                plain = zstd(data, (frame.end - frame.first) * BLOCK) if frame.encoding else data
                blocks = (plain[at : at + BLOCK] for at in range(0, len(plain), BLOCK))
                return plain, [self.zero_hash if block == ZEROS else self.block_hash(block) for block in blocks]
        return None

    def blocks(self, commit, first, end, but=None):
        """Pieces of the store: address, bytes and hashes, none where a block is lost. `but` is the hash or commit of PACKs not to use."""
        while first < end:
            piece = b"", []
            for entry in self.stores[commit.lane].holders(first, commit.number):
                table = () if but in (entry.hash, entry.number) else self.table(entry)
                number = bisect.bisect(table, (first, U64)) - 1
                frame = self.frame(entry, number) if number >= 0 and first < table[number].end else None
                if frame:
                    at = first - table[number].first
                    piece = frame[0][at * BLOCK : (at + end - first) * BLOCK], frame[1][at : at + end - first]
                    break
            yield first, *piece
            first += len(piece[1]) or 1

    def content(self, commit, image, digest, write):
        """Reads an image, hands its data to `write`, and checks its digest."""
        hasher, zeros, at = blake3(), 0, 0
        for length, address in zip(image.lengths, image.addresses):
            stored = length & 3 == 3
            for first, data, hashes in self.blocks(commit, address, address + (length >> 2)) if stored else ():
                must(hashes, f"block {first} of the store is lost")
                for number, block_hash in enumerate(hashes):
                    zeros, before = (zeros + 1, 0) if block_hash == self.zero_hash else (0, zeros)
                    if not zeros:
                        hasher.update((bytes(24) + struct.pack("<Q", before) if before else b"") + block_hash)
                        must((at + 1) * BLOCK <= image.size or not any(data[number * BLOCK + image.size % BLOCK : (number + 1) * BLOCK]), TAIL_ZEROS)
                        write(data[number * BLOCK : (number + 1) * BLOCK][: image.size - at * BLOCK], at * BLOCK)
                    at += 1
            zeros, at = (zeros, at) if stored else (zeros + (length >> 2), at + (length >> 2))
        hasher.update((bytes(24) + struct.pack("<Q", zeros) if zeros else b"") + struct.pack("<Q", image.size))
        must(hasher.digest() == digest, "its digest does not match")

    def lost(self, commit, entry):
        """Ranges of addresses that a listed record should hold or prove, and does not. An empty range is a record without addresses."""
        frames = self.table(entry) if entry.kind == PACK else []
        broken = [(frame.first, frame.end) for number, frame in enumerate(frames) if not self.frame(entry, number)]
        if broken:
            return broken
        try:
            body = self.record(entry.kind, entry.hash, entry.length)
        except Damaged:
            return [(entry.first, entry.end)]
        if entry.kind == PACK:
            must(frames, "its table is wrong")
            header, at = self.header(self.found[PACK, entry.hash][0]), frames[-1].at + frames[-1].stored
            padding = self.piece(header, 2 + len(frames), at, self.padding(header, at, len(frames)), True)
            must(not padding.strip(b"\0"), "its padding is wrong")
        elif entry.kind == INDEX:
            count = entry.end - entry.first
            must(len(body) == 16 + 32 * count and body[8:16] == struct.pack("<II", count, 0), "its length is wrong")
            for first, _, hashes in self.blocks(commit, entry.first, entry.end):
                must(body.startswith(b"".join(hashes), 16 + 32 * (first - entry.first)), f"its hashes differ from block {first} on")
        return []

    def verify(self, commit):
        """Reads each record of a commit. What is lost is damage, unless each address is dead, or intact in another PACK."""
        if not commit.forgotten:
            self.plan(commit, 0)
            self.check_announced(commit)
        for entry in commit.records.values():
            excused = commit.forgotten and entry.kind != PACK
            with self.guard(f"commit {commit.number}: {name(entry.kind)} {entry.hash.hex()[:16]}", excused):
                for first, end in self.lost(commit, entry):
                    must(first < end, "it is lost")
                    while first < end:
                        until = self.stores[commit.lane].dead.until(first)
                        if until == first:
                            until += len(next(self.blocks(commit, first, end, entry.hash if entry.kind == PACK else commit.number))[2])
                        must(until > first, f"block {first} of the store is lost")
                        first = until
                    self.spared.add((entry.kind, entry.hash))

    def verify_rest(self):
        """Checks copies, and what lies between records."""
        self.check_refused()
        forgotten, chosen = {commit.epoch for commit in self.commits if commit.forgotten}, {commit.hash for commit in self.commits}
        for first, end in self.gaps:
            if first < self.end:
                self.harm(f"bytes {first} to {end} are in no record")
        for header in (self.header(at) for places in self.broken.values() for at in places if at < self.end):
            if header.malformed or header.key not in self.spared and not (header.epoch in forgotten and header.kind not in (PACK, LIST, COMMIT, TAIL, KEY, NOTE)):
                self.harm(f"{name(header.kind)} at byte {header.at} does not match its hash, or is malformed")
        for commit in self.commits:
            if any((self.header(at).lane, self.header(at).epoch) != (commit.lane, commit.epoch) for at in self.found[COMMIT, commit.hash]):
                self.harm(f"COMMIT {commit.id[:16]} has the header of another record")
        self.verify_keys()
        for body_hash in [its for kind, its in self.found if kind == COMMIT] + self.tails:
            if body_hash not in chosen:
                self.harm("nothing leads to a COMMIT, or a TAIL to none")

    def verify_keys(self):
        """Checks that each KEY has the keys of its epoch, names the pair that they are wrapped for, and has a keyring that is intact."""
        opened = {self.newest.sealed} if self.newest else set()
        for header in self.key_headers():
            with self.guard(f"KEY at byte {header.at}"), contextlib.suppress(Unsupported):
                record, of = KeyRecord(self.part(header)), (header.lane, header.epoch)
                must(record.number <= self.seals.keyring.number, "it has a greater number than the keyring")
                if record.sealed not in opened:
                    opened.add(record.sealed)
                    self.check_keyring(record)
                must(self.seals.unwrap(record.wrapped, *of) == self.seals.epochs.get(of), "it has other keys than the COMMIT of its epoch, or there is none")

    def check_keyring(self, record):
        """Checks the slots of a keyring. One with the number of the open one opens by the same key; an older one may be for others."""
        for data in record.slots:
            Slot(data)
        try:
            if record.number == self.seals.keyring.number:
                open_keyring(record, self.keys, self.harm)
        except Locked:
            raise Damaged("its keyring does not open by the key that opens another one with its number") from None


def place(archive, commit, root, image, digest):
    """Writes an image under its first name, and links the others. What is not intact does not stay."""
    first, *others = paths = [os.path.join(root, path) for path in image.names]
    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(first, "xb") as file:
        try:
            archive.content(commit, image, digest, lambda data, at: (file.seek(at), file.write(data)))
            file.truncate(image.size)
        except BaseException:
            os.unlink(first)
            raise
    for path in others:
        os.link(first, path)
    # The group bits beside a list are its mask: without the list, the group keeps what its own entry allows.
    entries = image.attributes.get(5, [b""])[0][4:]
    allowed = [allowed << 3 & 0o070 for tag, allowed, _ in struct.iter_unpack("<HHI", entries[: len(entries) // 8 * 8]) if tag == 4]
    for mode in image.attributes.get(1, ()):
        os.chmod(first, mode & (0o707 | allowed[0] if allowed else 0o777))


def read_commit(archive, commit, arguments, rows):
    """Lists, verifies or restores a commit. Its images come into the rows, as JSON has them."""
    root, images, folders = os.fsencode(arguments.to or ""), [(*one, None) for one in archive.listed_images(commit).values()], {}
    with archive.guard(f"commit {commit.number}"):
        images, folders = archive.images(commit) if arguments.verify or root else (images, folders)
    for path, size, digest, image in images:
        row = {"path": os.fsdecode(path), "size": size, "digest": digest.hex(), "intact": False if arguments.verify or root else None}
        rows.append(row)
        with archive.guard(f"commit {commit.number}: {ascii(row['path'])}", row["intact"] is None or commit.forgotten and not root):
            must(image, "its manifest is lost")
            place(archive, commit, root, image, digest) if root else archive.content(commit, image, digest, lambda data, at: None)
            row["intact"] = True
    for path in folders if root else ():
        os.makedirs(os.path.join(root, path), exist_ok=True)
    if arguments.verify:
        archive.verify(commit)


def run(archive, arguments, commits):
    """Reads what the arguments ask for. What is said of the commits comes into a list."""
    if arguments.to:
        os.umask(0o077)
        os.makedirs(arguments.to, exist_ok=True)
        if os.listdir(arguments.to):
            raise FileExistsError(f"{arguments.to} is not empty")
    archive.open()
    wanted = arguments.commit or ("latest" if arguments.to else "")
    those = [one for one in archive.commits if str(one.number) == wanted or len(wanted) >= 8 and one.id.startswith(wanted)]
    those = archive.commits if not wanted else archive.commits[-1:] if wanted == "latest" else those
    if len(those) != 1 and wanted:
        raise argparse.ArgumentTypeError(f"{len(those)} commits are {wanted}")
    for one in those:
        commits.append({"number": one.number, "id": one.id, "lane": one.lane.hex(), "forgotten": one.forgotten, "images": []})
        read_commit(archive, one, arguments, commits[-1]["images"])
    if arguments.verify and not wanted:
        archive.verify_rest()


def read_keys(arguments):
    """What the user gave to open an archive with."""
    keys = Keys()
    if arguments.passphrase_file:
        with open(arguments.passphrase_file, "rb") as file:
            keys.passphrase = file.readline(4096).rstrip(b"\n")
    for path in arguments.identity:
        with open(path, encoding="ascii", errors="replace") as file:
            keys.secrets += identities(file.read(MIB))
    return keys


def main():
    parser = argparse.ArgumentParser(description="Reads archives of vmfold, version 1.")
    parser.add_argument("archive", metavar="ARCHIVE")
    parser.add_argument("--list", action="store_true", help="list commits and images, which it does without options too")
    parser.add_argument("--verify", action="store_true", help="read and check everything")
    parser.add_argument("--to", metavar="DIR", help="restore the images of a commit, the latest by default, to a new or empty folder")
    parser.add_argument("--commit", metavar="N|ID|latest")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--passphrase-file", metavar="FILE", help="file whose first line is the passphrase of a sealed archive")
    parser.add_argument("--identity", metavar="FILE", action="append", default=[], help="file of age identities that open a sealed archive")
    arguments, report, code, damage = parser.parse_args(), {"commits": [], "notes": []}, 0, {}
    try:
        with open(arguments.archive, "rb") as file:
            archive = Archive(file, damage, report["notes"], read_keys(arguments))
            run(archive, arguments, report["commits"])
    except (Unsupported, Locked, OSError, KeyboardInterrupt, argparse.ArgumentTypeError) as error:
        code = 3 if isinstance(error, Unsupported) else 2 if isinstance(error, argparse.ArgumentTypeError) else 1
        report["notes"].append(f"unsupported: {error}" if code == 3 else str(error) or "interrupted")
    except Exception as error:  # A hostile archive ends in a message, whatever was overlooked here.
        damage[str(error) if isinstance(error, Damaged) else f"unexpected {type(error).__name__}: {error}"] = True
    if arguments.json:
        print(json.dumps({**report, "damage": list(damage)}))
    for commit in () if arguments.json else report["commits"]:
        print(f"commit {commit['number']} {commit['id'][:16]} of lane {commit['lane']}{' (forgotten)' if commit['forgotten'] else ''}")
        for image in commit["images"]:
            print(f"{image['size']:>18} {ascii(image['path'])}{ {None: '', True: ' intact', False: ' DAMAGED'}[image['intact']]}")
    for what in [*report["notes"], *(f"damage: {what}" for what in damage)]:
        print(what, file=sys.stderr)
    return code or (4 if damage else 0)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
