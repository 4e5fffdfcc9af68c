#!/usr/bin/env python3
"""Runs formats/read_archive.py over the golden sealed archive, and over what damage and forgers make of it: check_sealed.py [ROUNDS [SEED]]

Checked are exit codes, the content of each image, the vectors in testdata/encryption-v1/vectors.json, and that nothing that was changed is told to be
intact. A forger has no key, or knows all of them but that of the signature, and makes all hashes right. With --write the vectors are made anew.
"""
import json, pathlib, random, struct, sys, tempfile
from check import ROOT, change, read, reader, records, restored
from blake3 import blake3
import archive_payloads
import archive_seals as seals
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FOLDER = ROOT / "testdata/encryption-v1"
PASSPHRASE, IDENTITY, VECTORS = FOLDER / "passphrase", FOLDER / "identity", FOLDER / "vectors.json"
HEAD, PLAN, PACK, INDEX, COMMIT, TAIL, KEY, LIST = (getattr(archive_payloads, one) for one in "HEAD PLAN PACK INDEX COMMIT TAIL KEY LIST".split())


class Sample:
    """The golden archive with all of its keys."""

    def __init__(self):
        self.data = (FOLDER / "archive.vmfold").read_bytes()
        self.records = list(records(self.data))
        self.key = max((seals.KeyRecord(body) for header, body in self.records if header[8] == KEY), key=lambda one: one.number)
        self.identity = seals.identities(IDENTITY.read_text())
        self.slots = [seals.Slot(one) for one in self.key.slots]
        self.keyring_key = next(filter(None, (slot.open(seals.Keys(None, self.identity)) for slot in self.slots)))
        self.keyring = seals.Keyring(self.key, self.keyring_key)
        self.seals = seals.Seals(self.keyring)
        for header, body in self.records:
            if header[8] == COMMIT:
                self.seals.learn(seals.associated(header), body)

    def key_of(self, header, number):
        return self.keyring.index_key if number == seals.INDEXES else self.seals.epochs[header[16:32], header[32:40]][number - 1]

    def segments(self, header, body):
        """Of each segment of a record: key, number, last, what is sealed, and what else the associated data have."""
        kind, of, salt, more = header[8], seals.associated(header), body[: seals.SALT], b""
        if kind == PACK:
            at, number, lengths = seals.SALT, 0, [16]
            while number < len(lengths):
                sealed = body[at : at + lengths[number] + seals.TAG]
                key, plain = (seals.METADATA if number < 2 else seals.DATA), None
                yield key, salt, number, 0, sealed, more
                if number < 2:
                    plain = self.seals.segment(key, of, salt, number, 0, sealed)
                if number == 0:
                    lengths.append(48 * struct.unpack_from("<I", plain, 8)[0])
                elif number == 1:
                    lengths += [struct.unpack_from("<I", plain, row + 4)[0] for row in range(0, len(plain), 48)]
                at, number = at + len(sealed), number + 1
            yield seals.DATA, salt, number, 1, body[at:], more
            return
        if kind == COMMIT:
            clear = struct.unpack_from("<I", body, 72)[0]
            more, body = unsigned(body[:clear]), body[clear:]
        yield header[13], body[: seals.SALT], 0, 1, body[seals.SALT :], more


def unsigned(clear):
    return clear[: seals.SIGNED_AT] + bytes(seals.SIGNATURE) + clear[seals.KEYS_AT :]


def vectors(sample):
    """What the sample and its keys make of each step of encryption-v1.md."""
    (lane, epoch), _ = list(sample.seals.epochs.items())[-1]
    key_body = next(body for header, body in sample.records if header[8] == KEY and header[32:40] == epoch)
    pair_name, *wrapped = seals.split(seals.KeyRecord(key_body).wrapped, seals.PAIR, seals.WRAPPED, seals.WRAPPED)
    said = {"archive": "archive.vmfold", "note": "Bytes are hexadecimal. Of a record, offset is that of its header in the archive."}
    seeds = [bytes(range(32)), *sample.keyring.pairs[0]]
    said["xwing"] = [{"seed": one.hex(), "public_key_hash": blake3(seals.xwing_pair(one)[0]).hexdigest()} for one in seeds]
    said["pair"] = {"data_seed": seeds[1].hex(), "meta_seed": seeds[2].hex(), "pair": pair_name.hex()}
    said["wrapped_keys"] = [
        {
            "seed": seed.hex(), "number": number, "archive": lane.hex(), "epoch": epoch.hex(), "wrapped": one.hex(),
            "shared_secret": seals.xwing_decapsulate(seed, one[:1120]).hex(), "key": sample.seals.epochs[lane, epoch][number - 1].hex(),
        }
        for number, seed, one in zip((1, 2), seeds[1:], wrapped)
    ]
    record = sample.key
    said["keyring"] = {
        "sealed": record.sealed.hex(), "passphrase": PASSPHRASE.read_text().rstrip("\n"), "identity": IDENTITY.read_text().strip(),
        "slots": [slot.stanzas[0][0].decode() for slot in sample.slots], "keyring_key": sample.keyring_key.hex(), "salt": record.salt.hex(),
        "key": seals.derive("vmfold 2026 keyring v1", sample.keyring_key + record.salt).hex(), "associated_length": len(record.associated),
        "content": sample.keyring.plain.hex(), "number": record.number, "pairs": len(sample.keyring.pairs), "index_key": sample.keyring.index_key.hex(),
        "id_key": sample.keyring.id_key.hex(), "signing_key": sample.keyring.signers[0].hex(),
    }
    said["block_hashes"] = [
        {"block": what, "hash": blake3(block, key=sample.keyring.id_key).hexdigest()}
        for what, block in (("4096 bytes 0", bytes(4096)), ("4096 bytes 1", b"\1" * 4096))
    ]
    said["records"] = []
    for kind in (PLAN, PACK, INDEX, LIST, COMMIT):
        header, body = min((one for one in sample.records if one[0][8] == kind and one[0][32:40] != epoch), key=lambda one: len(one[1]))
        said["records"].append(one := {"kind": archive_payloads.name(kind), "offset": sample.data.index(header), "header": header.hex(), "segments": []})
        for key, salt, number, last, sealed, more in sample.segments(header, body):
            material, of = sample.key_of(header, key), seals.associated(header)
            one["segments"].append({
                "key": material.hex(), "salt": salt.hex(), "record_key": seals.derive("vmfold 2026 record v1", material + salt).hex(), "number": number,
                "nonce": struct.pack("<Q3xB", number, last).hex(), "associated": (of + more).hex(), "sealed": sealed.hex(),
                "plain": sample.seals.segment(key, of, salt, number, last, sealed, more).hex(),
            })
        if kind == COMMIT:
            one["signed"] = seals.derive("vmfold 2026 commit v1", seals.associated(header) + unsigned(body)).hex()
            one["signature"], one["signing_key"] = body[seals.SIGNED_AT : seals.KEYS_AT].hex(), sample.keyring.signers[0].hex()
    lengths = [0, 1, 2, 3, 7, 8, 9, 16, 17, 100, 255, 256, 257, 4096, 4097, 65537, 2**20 + 1, 2**25 - 1, 2**25]
    said["padme"] = [[one, seals.padme(one)] for one in lengths]
    return said


def check_vectors(sample):
    said = json.loads(VECTORS.read_text())
    assert said == vectors(sample), "the vectors differ from what the reader makes of the sample"
    for one in said["records"]:
        at = one["offset"]
        assert sample.data[at : at + 96].hex() == one["header"]
        for part in one["segments"]:
            key, nonce, associated, sealed, plain = (bytes.fromhex(part[what]) for what in ("record_key", "nonce", "associated", "sealed", "plain"))
            assert AESGCM(key).encrypt(nonce, plain, associated) == sealed and sealed in sample.data
    for number, slot in enumerate(sample.slots):
        keys = seals.Keys(PASSPHRASE.read_bytes().rstrip(b"\n")) if slot.passphrase else seals.Keys(None, sample.identity)
        assert slot.open(keys).hex() == said["keyring"]["keyring_key"], number


def joined(all_records):
    """An archive of these records, with lengths, hashes and masks made right, and TAILs that tell the COMMIT before them."""
    out, before = bytearray(), None
    for number, (header, body) in enumerate(all_records):
        if header[8] == TAIL and before:
            body = struct.pack("<QQ32s", *before) * 2
        if header[8] == COMMIT:
            before = len(out), len(body) + 96, blake3(body).digest()
        mask = int(reader.MAGIC in body)
        header = header[:14] + struct.pack("<H", mask) + header[16:40] + struct.pack("<QQ", number, len(body)) + blake3(body).digest()
        stored = bytes(a ^ b for a, b in zip(body, blake3(header[14:48]).digest(length=len(body)))) if mask else body
        out += header + blake3(header).digest()[:8] + stored
    return bytes(out)


def resealed(sample, header, body, change_payload=bytes, change_clear=bytes, signer=None):
    """A COMMIT with another payload or clear part, sealed as its writer would. Without a signer the signature stays as it was."""
    of = seals.associated(header)
    plain, clear = sample.seals.commit(of, body), struct.unpack_from("<I", body, 72)[0]
    payload, clear, salt = change_payload(plain[clear:]), change_clear(body[:clear]), bytes(16)
    key = seals.derive("vmfold 2026 record v1", sample.key_of(header, 2) + salt)
    inner = struct.pack("<I", len(payload)) + payload
    inner += bytes(seals.padme(len(inner)) - len(inner))
    if signer:
        clear = clear[:108] + blake3(signer.public_key().public_bytes_raw()).digest()[:8] + clear[116:]
    body = clear + salt + AESGCM(key).encrypt(bytes(11) + b"\1", inner, of + unsigned(clear))
    if signer:
        message = seals.derive("vmfold 2026 commit v1", of + unsigned(body))
        body = body[: seals.SIGNED_AT] + signer.sign(message) + body[seals.KEYS_AT :]
    return body


def replaced(sample, kind, epoch, make):
    """The archive with all records of a kind and epoch made into others."""
    return joined([make(*one) if one[0][8] == kind and one[0][32:40] == epoch else one for one in sample.records])


def forgeries(sample):
    """What a forger may write, by name: the archive, and a part of what is said of it."""
    epochs = list(dict.fromkeys(header[32:40] for header, _ in sample.records))
    first, last = epochs[0], epochs[-1]
    own = ed25519.Ed25519PrivateKey.from_private_bytes(sample.keyring.plain[77:109])
    stranger = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    assert own.public_key().public_bytes_raw() == sample.keyring.signers[0]
    flip = lambda body, at: body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]

    def clear(header, body):
        plain = sample.seals.commit(seals.associated(header), body)
        length = struct.unpack_from("<I", body, 72)[0]
        plain = bytes(8) + plain[8:72] + struct.pack("<I", 104) + plain[76:104] + plain[length:]
        return header[:10] + b"\1\0\0\0" + header[14:], plain

    def small(header, body):
        """Signed for a key of small order, which proves nothing: the signature of the neutral point fits any message."""
        point = b"\1" + bytes(31)
        body = body[:108] + blake3(point).digest()[:8] + point + bytes(32) + body[seals.KEYS_AT :]
        return header, body

    yield "as it is", joined(sample.records), None
    yield "signed by its own key", replaced(sample, COMMIT, last, lambda header, body: (header, resealed(sample, header, body, signer=own))), None
    yield "a COMMIT that is clear", replaced(sample, COMMIT, last, clear), "lost"
    yield "a stranger's COMMIT", replaced(sample, COMMIT, last, lambda header, body: (header, resealed(sample, header, body, signer=stranger))), "signed by nobody"
    yield "a key of small order", replaced(sample, COMMIT, last, small), "signed by nobody"
    yield "resealed, not signed", replaced(sample, COMMIT, last, lambda header, body: (header, resealed(sample, header, body))), "signature"
    for at in (0, 8, 16, 20, 24, 40, 80, 104, 105, 106, 108, 116, 147, 148, 179, 180, 200, 1400, 2530, 2690):
        what = {104: "version 0", 105: "KEM 0", 108: "nobody"}.get(at, "")
        yield f"a COMMIT with another byte {at}", replaced(sample, COMMIT, last, lambda header, body: (header, flip(body, at))), what
    sign_anew = lambda header, body, at: (header, resealed(sample, header, body, change_clear=lambda part: flip(part, at), signer=own))
    for at, what in ((0, "whether it is sealed"), (106, "clear part"), (180, "pair"), (190, "does not open"), (1180, "does not open"), (1300, "does not open"), (2520, "does not open")):
        yield f"signed with another byte {at}", replaced(sample, COMMIT, last, lambda header, body: sign_anew(header, body, at)), what
    number = b"\x81\1" + bytes([sample.keyring.number])
    for new, what in ((number[:2] + b"\x7f", "older"), (b"", "number of its keyring"), (2 * number, "tells two"), (number[:2] + b"\0", "tells two")):
        change_payload = lambda payload: repacked(payload, number, new)
        yield f"a keyring's number {new.hex()}", replaced(sample, COMMIT, last, lambda header, body: (header, resealed(sample, header, body, change_payload, signer=own))), what
    old = [one for one in sample.records if one[0][8] != KEY or seals.KeyRecord(one[1]).number < sample.key.number]
    yield "an old keyring", joined(old), "pair|older"
    oldest = next(one for one in sample.records if one[0][8] == KEY)
    yield "an old KEY at the end", joined([*sample.records, oldest, *sample.records[-2:]]), "older than another"
    yield "no KEY at all", joined([one for one in sample.records if one[0][8] != KEY]), "no KEY"
    for at, what in ((0, "version 0"), (1, "KEM 0"), (2, "fields"), (4, "number"), (12, "pair"), (20, "does not open"), (1200, "does not open"), (2360, "check"), (16000, "padding")):
        yield f"KEYs with another byte {at}", replaced(sample, KEY, last, lambda header, body: (header, flip(body, at))), what
    for kind in (PLAN, PACK, INDEX, LIST, COMMIT):
        for at in (10, 12, 13, 16, 32):
            yield f"kind {kind} with another byte {at} of the header", replaced(sample, kind, last, lambda header, body: (flip(header, at), body)), ""
        moved = lambda header, body: (header[:32] + first + header[40:], body)
        yield f"kind {kind} in another epoch", replaced(sample, kind, last, moved), ""
    head = lambda header, body: (header, body[:8] + bytes(8) + body[16:])
    yield "HEADs without the feature", joined([head(*one) if one[0][8] == HEAD else one for one in sample.records]), ""
    tail = [(header[:10] + b"\1\0\0\0" + header[14:] if header[8] in (PLAN, PACK, INDEX, COMMIT, LIST) else header, body) for header, body in sample.records]
    yield "all flags are clear", joined(tail), ""


def repacked(payload, old, new):
    """A payload with other bytes at its end, stored raw."""
    length = struct.unpack_from("<I", payload, 4)[0]
    plain = archive_payloads.zstd(payload[8:], length) if payload[0] else payload[8:]
    assert plain.endswith(old), plain
    plain = plain[: -len(old)] + new
    return b"\0" + payload[1:4] + struct.pack("<I", len(plain)) + plain


class Checker:
    def __init__(self, folder, sample):
        self.path, self.to, self.key = folder / "archive.vmfold", folder, ("--identity", IDENTITY)
        code, self.known, err = read(FOLDER / "archive.vmfold", "--verify", *self.key)
        assert code == 0 and len(self.known["commits"]) == 3, err
        self.images = {(commit["id"], image["path"]): image for commit in self.known["commits"] for image in commit["images"]}
        self.contents = set()
        for number in (1, 2, 3):
            code, _, err = read(FOLDER / "archive.vmfold", "--commit", number, "--to", folder / str(number), *self.key)
            assert code == 0, err
            self.contents |= set(restored(folder / str(number)).values())
        wanted = dict(reversed(line.split("  ./", 1)) for line in (FOLDER / "archive.sha256").read_text().splitlines())
        assert restored(folder / "3") == wanted

    def check(self, data, forged=False):
        """Reads an archive. What is said to be intact must be as it was."""
        self.path.write_bytes(data)
        code, said, err = read(self.path, "--verify", *self.key)
        for commit in said["commits"]:
            for image in commit["images"]:
                known = self.images.get((commit["id"], image["path"]))
                assert known == image if image["intact"] and not forged else True, (known, image)
        with tempfile.TemporaryDirectory() as to:
            to_code, _, to_err = read(self.path, "--to", to, *self.key)
            assert set(restored(pathlib.Path(to)).values()) <= self.contents, to_err
            assert code or not to_code, (err, to_err)
        return code, err


def main():
    sample, options = Sample(), [one for one in sys.argv[1:] if one != "--write"]
    if "--write" in sys.argv:
        VECTORS.write_text(json.dumps(vectors(sample), indent=1) + "\n")
    rounds, random_ = int(options[0]) if options else 200, random.Random(int(options[1]) if len(options) > 1 else 18)
    check_vectors(sample)
    codes = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        checker = Checker(folder, sample)
        wrong = folder / "wrong"
        wrong.write_text("another passphrase\n")
        for options, expected, what in (([], 1, "no key"), (["--passphrase-file", wrong], 1, "wrong"), (["--passphrase-file", PASSPHRASE], 0, "")):
            code, _, err = read(FOLDER / "archive.vmfold", "--list", *options)
            assert code == expected and what in err, (code, err)
        for what, data, said in forgeries(sample):
            code, err = checker.check(data, forged=said is None)
            assert code == 0 if said is None else code in (3, 4) and any(one in err for one in said.split("|")), (what, code, err)
            codes["forgeries", code] = codes.get(("forgeries", code), 0) + 1
        at = 0
        for header, body in sample.records:
            for place in (at + random_.randrange(96), at + 96 + random_.randrange(len(body)), at + 95 + len(body)):
                code, err = checker.check(sample.data[:place] + bytes([sample.data[place] ^ 1 << random_.randrange(8)]) + sample.data[place + 1 :])
                assert code in (3, 4), (place, code, err)
                codes["flips", code] = codes.get(("flips", code), 0) + 1
            code, err = checker.check(sample.data[:at])
            assert code in (0, 4), (at, code, err)
            codes["cuts", code] = codes.get(("cuts", code), 0) + 1
            at += 96 + len(body)
        for number in range(rounds):
            if number % 2:
                data = change(random_, sample.data)
            else:
                swapped = list(sample.records)
                one, other = random_.sample(range(len(swapped)), 2)
                swapped[one], swapped[other] = (swapped[one][0], swapped[other][1]), (swapped[other][0], swapped[one][1])
                data = joined(swapped)
            code, err = checker.check(data)
            codes["mutations", code] = codes.get(("mutations", code), 0) + 1
    for (what, code), count in sorted(codes.items()):
        print(f"{count} {what}: exit {code}")


if __name__ == "__main__":
    main()
