"""What records of archives of vmfold, version 1, say: their fields, their limits, and what payloads of COMMIT, LIST and PLAN decode to.

It was written from archive-v1.md alone, is a part of read_archive.py, and knows nothing of files. It needs `zstandard` from PyPI.
"""
import bisect, collections, itertools, struct, sys
from array import array
try:
    import zstandard
except ImportError as missing:
    sys.exit(f"read_archive.py needs {missing.name}: pip install blake3 zstandard")

BLOCK, KIB, MIB, U32, U64 = 4096, 1 << 10, 1 << 20, 2**32 - 1, 2**64 - 1
HEAD, PLAN, PACK, INDEX, COMMIT, TAIL, KEY, NOTE, LIST, SIGNATURE = 1, 2, 3, 4, 5, 6, 8, 9, 10, 11
KINDS = dict(enumerate((  # name, whether it is critical, the greatest length of a body
    ("HEAD", 1, 4 * KIB), ("PLAN", 1, 5 * MIB), ("PACK", 1, 33 * MIB), ("INDEX", 0, 9 * MIB), ("COMMIT", 1, 128 * KIB), ("TAIL", 0, 96),
    ("PARITY", 0, 33 * MIB), ("KEY", 1, 64 * KIB), ("NOTE", 0, 64 * KIB), ("LIST", 1, 5 * MIB), ("SIGNATURE", 0, 4 * KIB)), 1))
PAYLOADS = {PLAN: (2, 4 * MIB), LIST: (1, 4 * MIB), COMMIT: (255, 96 * KIB)}  # the greatest part that is known; bytes once decoded
OF_FILE = {"records": 2**20, "listed records": 2**20, "dead ranges": 2**20, "forgotten commits": 2**20}
LIMITS = {**OF_FILE, "other lanes": 64, "images and folders": 2**18, "bytes of names and attributes": 64 * MIB, "runs": 2**24,
          "stored blocks": 2**36, "records that hold an address": 16, "": U64}
# Entries that are known, by their tags: what a limit counts; their fields and the limits of these, as Cursor.get has them.
RECORDS = {0x81: ("listed records", "BBBvvvvvh"), 0x82: ("forgotten commits", "h"), 0x83: ("dead ranges", "vv"), 4: ("", ""),
           5: ("other lanes", "lvvvh")}
SEALED = {0x81: ("", "v")}  # of a COMMIT: the number of the keyring
IMAGES = {0x81: ("images and folders", "vvvvhp")}
PLANS = {0x81: ("images and folders", "p"), 0x82: ("images and folders", "vvv", U32, 2**44 - BLOCK, 65535), 0x83: ("", "vvv")}
ATTRIBUTES = {1: ("", "v", 0o7777), 2: ("", "vvss", U32, U32, 256, 256), 3: ("", "zv", U64, 10**9 - 1), 4: ("", "sr", 255, 64 * KIB),
              5: ("", "r"), 6: ("", "r"), 7: ("", ""), 8: ("", "sr", 255, 64 * KIB)}
PACK_BLOCKS = 2**18
FIXED = {"B": 1, "H": 2, "I": 4, "Q": 8, "h": 32, "l": 16}
Entry = collections.namedtuple("Entry", "kind part sequence length first end hash table_hash number")
# Of each run of an image, lengths has blocks << 2 | kind, and addresses its first store address.
Image = collections.namedtuple("Image", "size blocks names attributes lengths addresses covered")


class Damaged(Exception):
    """Something is lost, or is not as the specification has it."""


class Unsupported(Exception):
    """Something that this reader does not know, and must not skip."""


def must(holds, what):
    if not holds:
        raise Damaged(what)


def refuse(unknown, what):
    if unknown:
        raise Unsupported(what)


def name(kind):
    return KINDS.get(kind, (f"kind {kind}",))[0]


class Budget(collections.Counter):
    """What was counted of a commit, or a part of its plan; what counts for the whole file is in the one above."""

    def __init__(self, above=None):
        self.above = self if above is None else above

    def spend(self, what, count=1):
        counter = self.above if what in OF_FILE else self
        counter[what] += count
        must(counter[what] <= LIMITS[what], f"there are too many {what}")


class Cursor:
    """Takes fields from a piece of a payload, and never more than there are."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        must(count <= len(self.data) - self.at, "an entry is shorter than its fields")
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self, at_most=U64):
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                must((byte or not shift) and value <= at_most, "a number is too large, or longer than it must be")
                return value
        raise Damaged("a varint is too long")

    def get(self, form, *limits):
        """A field for each letter: varint v, zigzag z, string s, path p, hash h, lane l, the rest r; B, H, I, Q as struct has them."""
        result = []
        for one, limit in itertools.zip_longest(form, limits):
            if one in "vz":
                value = self.varint(limit or U64)
                result.append(value >> 1 ^ -(value & 1) if one == "z" else value)
                continue
            result.append(self.take(FIXED.get(one) or (len(self.data) - self.at if one == "r" else self.varint(limit or 4096))))
            parts = result[-1].split(b"/") if one == "p" else ()
            must(all(0 < len(part) < 256 and part not in (b".", b"..") and 0 not in part for part in parts), "a path is not allowed")
            must(len(result[-1]) <= (limit or U64), "a field is too long")
            result[-1] = int.from_bytes(result[-1], "little") if one in "BHIQ" else result[-1]
        return result

    def entries(self, known, what, budget, count=None):
        """Tag, fields and what is left of each entry. An unknown one is passed over, unless it is critical."""
        while self.at < len(self.data) if count is None else count:
            tag, data = self.get("Bs", U64, U64)
            refuse(tag & 0x80 and tag not in known, f"{what} with the tag {tag:#04x}")
            (spent, *form), data, count = known.get(tag, ("", "")), Cursor(data), count and count - 1
            budget.spend(spent)
            yield tag, data.get(*form), data


def zstd(data, length):
    """Decodes exactly one frame of zstd with a known content size, without a dictionary, and with nothing behind it."""
    try:
        must(data[:4] == b"\x28\xb5\x2f\xfd", "this is no frame of zstd")
        frame = zstandard.get_frame_parameters(data)
        must(frame.content_size == length and not frame.dict_id and frame.window_size <= 8 * MIB, "a zstd frame's header is not allowed")
        return zstandard.ZstdDecompressor(max_window_size=8 * MIB).decompress(data, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Damaged(f"zstd: {error}") from None


def payload(kind, body, *named):
    """What a payload decodes to, whose three bytes are known."""
    (parts, at_most), (encoding, part, *more, length) = PAYLOADS[kind], struct.unpack_from("<BBBBI", body.ljust(8, b"\xff"))
    must(encoding <= 1 and length <= at_most and (encoding or length == len(body) - 8), "a payload's encoding or length is wrong")
    refuse(part > parts, f"part {part} of a {name(kind)}")
    must((part, *more) == named, "the three bytes of a payload are not what they should be")
    return Cursor(zstd(body[8:], length) if encoding else body[8:])


class Ranges:
    """Ranges of addresses, which are given as numbers: the first address in the upper half, the end in the lower one."""

    def __init__(self, ranges):
        ranges = sorted(ranges)
        self.starts = array("Q", (one >> 32 for one in ranges))
        self.ends = array("Q", itertools.accumulate((one & U32 for one in ranges), max))

    def count(self):
        """How many addresses lie in the ranges."""
        return sum(max(0, end - max(start, before)) for start, end, before in zip(self.starts, self.ends, [0, *self.ends]))

    def until(self, address):
        """How far all addresses from this one are in ranges that begin before it; the address itself if it is in none."""
        at = bisect.bisect(self.starts, address) - 1
        return max(address, self.ends[at]) if at >= 0 else address


class Store:
    """Which PACKs, or which INDEXes, of a lane hold an address. Their ranges are cut where one of them begins or ends."""

    def __init__(self, commits, kind):
        self.starts, self.held, begins, held = array("Q"), [], collections.defaultdict(list), []
        for entry in (entry for commit in commits for entry in commit.records.values() if entry.kind == kind and entry.first < entry.end):
            begins[entry.first].append(entry)
            begins.setdefault(entry.end, [])
        for at in sorted(begins):
            held = [entry for entry in held if entry.end > at] + begins[at]
            Budget().spend("records that hold an address", len(held))
            self.starts.append(at)
            self.held.append(held)
        self.dead = Ranges(one for commit in commits for one in commit.dead)

    def holders(self, address, number):
        """The newest one first of those that a commit proves, and then what later commits list."""
        at = bisect.bisect(self.starts, address) - 1
        return sorted(self.held[at] if at >= 0 else (), key=lambda entry: (entry.number > number, -entry.number))


class Commit:
    """What COMMIT and its LISTs of records say."""

    def __init__(self, header, body, budget):
        self.at, self.lane, self.epoch, self.hash, self.id = header.at, header.lane, header.epoch, header.key[1], header.key[1].hex()
        self.records, self.forgets, self.dead, self.others, self.budget = {}, [], [], [], Budget(budget)
        must(len(body) >= 104, "a COMMIT is cut")
        fields = struct.unpack_from("<QQIIQQ32sII16s8s", body)
        features, _, self.number, self.store_end, at, length, self.previous, clear, zero, *same = fields
        refuse(features & ~1, f"features {features:#x}, which COMMIT {self.id[:16]} tells")
        must(features == bool(header.seal), "a COMMIT does not tell whether it is sealed")
        must(1 <= self.number < U32 and self.store_end < U32, "a COMMIT has numbers beyond their limits")
        must(104 <= clear <= len(body) and not zero and same == [self.lane, self.epoch], "the clear part of a COMMIT is wrong")
        must(((at, length, self.previous) == (0, 0, bytes(32))) == (self.number == 1), "commit 1, and no other, has none before it")
        fields = payload(COMMIT, body[clear:], 0, 0, 0)
        lists = fields.get("zvssssv", U64, 10**9 - 1, 4096, 4096, 4096, 4096, 1024)[-1]
        self.lists = [fields.get("Bvvvh") for _ in range(lists)]
        refuse(any(part > 1 for part, *_ in self.lists), "an unknown part of a LIST")
        numbers = [values[0] for tag, values, _ in fields.entries(SEALED if header.seal else {}, "an entry of a COMMIT", self.budget) if tag == 0x81]
        must(len(numbers) == bool(header.seal) and 0 not in numbers, "a sealed COMMIT does not tell the number of its keyring, or tells two")
        self.keyring = max(numbers, default=0)

    def listed(self, tag, values, fields):
        """An entry of a LIST of records."""
        if tag == 0x81:
            self.listed_record(fields, *values)
        elif tag == 0x82:
            self.forgets += values
        elif tag == 0x83:
            must(sum(values) <= self.store_end, "a dead range lies behind the store's end")
            self.dead.append(values[0] << 32 | sum(values))
        elif tag == 5:
            self.others.append(values[-1])

    def listed_record(self, fields, kind, flags, part, sequence, _at, length, first, blocks, body_hash):
        known, critical, stores = kind in (HEAD, PLAN, PACK, INDEX), KINDS.get(kind, ("", 0))[1], kind in (PACK, INDEX)
        refuse(flags > 3 or not known and kind != KEY and flags & 1 or kind == PLAN and part > 2, f"a listed {name(kind)}, flags {flags:#x}, part {part}")
        must(kind not in (COMMIT, TAIL, KEY, NOTE, LIST) and sequence < 2**63, "a LIST names a record that it should not")
        must((flags & 1) == critical and (kind == PLAN or not part), "a listed record has another flag or part than its kind")
        table_hash = fields.take(32) if kind == PACK else None
        must(not flags & 2 or stores and fields.take(16) != self.lane, "a record of another lane is none")
        must(not stores or first + blocks <= self.store_end and (kind == PACK) <= blocks <= PACK_BLOCKS, "wrong addresses are listed")
        must(body_hash not in self.records and body_hash not in (one[-1] for one in self.lists), "a record is listed twice")
        first, end = (first, first + blocks) if stores else (0, 0)
        self.records[body_hash] = Entry(kind, part, sequence, length, first, end, body_hash, table_hash, self.number)


class Plan:
    """What the records of one part of the plan say together."""

    def __init__(self, store_end):
        self.store_end, self.whole, self.images, self.folders, self.budget = store_end, True, {}, {}, Budget()

    def add(self, tag, values, fields):
        if tag == 0x81:
            must(values[0] not in self.folders, "a folder stands twice")
            self.folders[self.kept(values[0])] = self.attributes(fields)
        elif tag == 0x82:
            number, size, names = values
            must(number not in self.images and names, "an image stands twice, or has no name")
            names, attributes = [self.kept(*fields.get("p")) for _ in range(names)], self.attributes(fields)
            self.images[number] = Image(size, -(-size // BLOCK), names, attributes, array("Q"), array("Q"), [0])
        elif tag == 0x83:
            self.add_runs(fields, *values)

    def add_listed(self, tag, values, _fields):
        """An entry of a LIST of images: path, size and digest."""
        if tag == 0x81:
            number, size, _stored, _added, digest, path = values
            must(number not in self.images, "it has an image twice")
            self.images[number] = self.kept(path), size, digest

    def kept(self, data):
        self.budget.spend("bytes of names and attributes", 64 + len(data))
        return data

    def attributes(self, fields):
        result = {}
        for tag, values, data in fields.entries(ATTRIBUTES, "an attribute", self.budget, fields.varint(65535)):
            self.kept(data.data)
            several = tag not in ATTRIBUTES or tag in (4, 8)
            must(several and values[:1] != [b""] or not several and tag not in result, "an attribute stands twice, or has no name")
            result[tag] = values
        return result

    def add_runs(self, fields, number, first, count):
        self.budget.spend("runs", count)
        image, after = self.images.get(number), 0
        if image is None or first != image.covered[0]:
            return must(not self.whole, "runs do not follow their image, or each other")
        for _ in range(count):
            length, address = fields.varint(), 0
            image.covered[0] += length >> 2
            must(length >> 2 and image.covered[0] <= image.blocks, "a run is empty, or goes beyond its image")
            if length & 3 == 3:
                address = after + fields.get("z")[0]
                after = address + (length >> 2)
                must(0 <= address and after <= self.store_end, "a run lies behind the store's end")
                self.budget.spend("stored blocks", length >> 2)
            image.lengths.append(length)
            image.addresses.append(address)
